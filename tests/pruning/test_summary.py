"""The layer table and the FLOPs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.pruning import (
    Masks,
    count_flops,
    dead_layers,
    kept_flops,
    layer_table,
)
from tests.support.pruning import (
    compute_masks,
    linears,
    small_net,
)


def test_layer_table_and_dead_layers() -> None:
    """A layer without weights cuts the network in two; the report must say which."""
    model = linears([torch.full((2, 4), 0.1), torch.full((4, 2), 5.0)])
    masks = compute_masks(model, 0.5)
    assert dead_layers(masks) == ["0.weight"]
    assert layer_table(model, masks) == [
        {"name": "0.weight", "shape": [2, 4], "parameters": 8, "kept": 0, "sparsity": 1.0},
        {"name": "1.weight", "shape": [4, 2], "parameters": 8, "kept": 8, "sparsity": 0.0},
    ]


def test_flops_of_one_sample_by_hand() -> None:
    """A batch counted as one sample, multiply-adds counted once, or names that do not match those of the masks."""
    flops = count_flops(small_net(), torch.rand(5, 3, 5, 5))
    assert flops == {
        "0.weight": 2 * (8 * 3 * 3) * 3 * (3 * 3),  # (out * in * kh) * kw * output positions
        "2.weight": 2 * (16 * 8 * 3) * 3 * (1 * 1),
        "4.weight": 2 * 16 * 10,
    }


class CallsTwice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_flops_of_a_shared_module_count_each_call() -> None:
    """By module path, a shared layer's work appears under the name that no mask has."""
    model = CallsTwice()
    flops = count_flops(model, torch.rand(1, 4))
    assert flops == {"first.0.weight": 2 * (2 * 4 * 4)}
    assert set(flops) == set(compute_masks(model, 0.5))


def test_counting_flops_leaves_no_trace() -> None:
    """Running statistics moved by a random example, a frozen BatchNorm set to training, hooks that stay."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {name: b.clone() for name, b in model.named_buffers()}

    count_flops(model, torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        count_flops(model, torch.rand(2, 1, 8, 8))

    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_kept_flops_weigh_each_layer_by_its_own_density() -> None:
    """The network's overall density instead: wrong wherever layers differ in work per weight."""
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])})
    assert kept_flops({"a": 1000, "b": 10, "unmasked": 1}, masks) == 250 + 10 + 1
