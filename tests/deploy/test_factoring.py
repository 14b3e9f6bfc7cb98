"""Weights of low rank become two layers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.deploy import compact
from sfw_dist.errors import MissingExtraError, UserError
from sfw_dist.pruning import layer_table, prune
from tests.deploy.networks import differs, network, trained


@pytest.mark.parametrize("name", ["VGG-16", "ViT of timm", "MobileNetV3"])
def test_low_ranks_become_two_layers_that_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a factor, stride or bias is lost, a parameter is counted wrongly, or an extra is needed."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    net = network(name)
    before = sum(parameter.numel() for parameter in net.parameters())
    pruning = prune(net, 0.5, granularity="rank")
    state = torch.get_rng_state()
    found = compact(net, pruning, torch.zeros(1, 3, 32, 32))
    assert torch.equal(state, torch.get_rng_state())
    assert differs(found.model, net, 3, 3, 32, 32) < 1e-4
    assert found.parameters == (before, before - (pruning.total - pruning.kept))
    assert found.flops[1] < 0.8 * found.flops[0]
    rows = {row["name"]: row for row in layer_table(net, pruning)}
    assert found.ranks == {name: rows[name]["rank"] for name in pruning.changed()}
    assert found.kept_because == {}


def test_what_is_no_layer_of_its_own_stays_a_product() -> None:
    """Fails when attention's weight is replaced, or the reason is not told."""
    net = network("ViT")
    found = compact(net, prune(net, 0.6, granularity="rank"), torch.zeros(1, 3, 32, 32))
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert found.kept_because[f"{attention}.in_proj_weight"] == {"a MultiheadAttention does not become two layers": 1}
    assert "not called" in next(iter(found.kept_because[f"{attention}.out_proj.weight"]))
    assert found.ranks and not set(found.kept_because) & set(found.ranks)
    assert differs(found.model, net, 2, 3, 32, 32) < 1e-4


def test_networks_of_words_become_two_layers_too() -> None:
    """Fails when an input of integers is refused, or made to floating point."""
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.Flatten(), nn.Linear(48, 2))
    found = compact(net, prune(net, 0.6, granularity="rank"), torch.tensor([[1, 2, 3]]))
    words = torch.randint(10, (5, 3))
    torch.testing.assert_close(found.model(words), net(words))
    assert "1.weight" in found.ranks


class ReadsWeight(nn.Module):
    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(16, 16), nn.Linear(16, 2), calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.calls else x
        return self.last(nn.functional.linear(x, self.first.weight, self.first.bias))


def test_a_weight_that_is_read_by_another_module_stays_or_is_refused() -> None:
    """Fails when the result cannot run."""
    net = trained(ReadsWeight(calls=False))
    found = compact(net, prune(net, 0.7, granularity="rank"), torch.randn(1, 16))
    assert found.kept_because["first.weight"] == {"first is not called as a layer": 1}
    net = trained(ReadsWeight(calls=True))
    with pytest.raises(UserError, match="ReadsWeight does not compute the same with two layers"):
        compact(net, prune(net, 0.7, granularity="rank"), torch.randn(1, 16))


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a missing package is a traceback."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"compact .*pip install 'sfw-dist\[deploy\]'"):
        compact(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5, torch.randn(1, 4))
