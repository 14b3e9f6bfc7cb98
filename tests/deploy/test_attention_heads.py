"""Whole heads of timm's attention go."""

from __future__ import annotations

import timm
import torch
from torch import nn

from sfw_dist.deploy import compact
from tests.deploy.networks import differs, network, trained


def test_heads_without_values_go() -> None:
    """Fails when another head goes, its constant is lost, or queries and keys keep its channels."""
    net = network("ViT of timm")
    attention = net.blocks[1].attn
    with torch.no_grad():
        for head in (0, 2):  # the values of head h: channels h*8 to h*8 + 7 of the last third
            attention.qkv.weight[64 + 8 * head : 72 + 8 * head] = 0
        net.blocks[0].attn.qkv.weight[64:71] = 0  # all but one of a head's
    found = compact(net, 0.0, torch.zeros(1, 3, 32, 32))
    assert found.removed == {"blocks.1.attn.qkv": 48}
    assert differs(found.model, net, 3, 3, 32, 32) < 1e-5
    assert found.model.blocks[1].attn.num_heads == 2
    assert found.kept_because["blocks.0.attn.qkv"] == {"blocks.0.attn loses whole heads only": 7}


def test_one_head_stays() -> None:
    """Fails when an attention without any head is made."""
    net = nn.Sequential(nn.Linear(4, 8), timm.layers.Attention(8, 2, qkv_bias=True), nn.Linear(8, 2))
    net = trained(net)
    with torch.no_grad():
        net[1].qkv.weight[16:] = 0
    found = compact(net, 0.0, torch.randn(1, 5, 4))
    assert found.model[1].num_heads == 1
    # All that follows is constant, so that no difference tells whether values are.
    assert found.max_difference < 1e-6


def test_heads_with_a_gate_stay() -> None:
    """Fails when the gate keeps channels that its heads have lost."""
    net = trained(nn.Sequential(timm.layers.Attention(8, 2, gated=True), nn.Linear(8, 2)))
    with torch.no_grad():
        net[0].qkv.weight[16:20] = 0
    found = compact(net, 0.0, torch.randn(1, 5, 8))
    assert found.model[0].num_heads == 2
    assert differs(found.model, net, 2, 5, 8) < 1e-5
