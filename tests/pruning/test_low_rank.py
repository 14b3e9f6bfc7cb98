"""Weights of low rank: exact counts, against numpy's SVD."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    LowRank,
    Masks,
    Pruner,
    PruningOptions,
    count_flops,
    dead_layers,
    kept_flops,
    layer_table,
    prune,
)
from tests.support.pruning import (
    four_layers,
    removed_count,
)


def low_rank(model: nn.Module, sparsity: float) -> LowRank:
    found = Pruner(model, PruningOptions(granularity="rank")).at(sparsity)
    assert isinstance(found, LowRank)
    return found


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.85])
def test_counts_are_those_of_the_factors(sparsity: float) -> None:
    """A count of nonzeros, as many in the product as before; or fewer saved than asked for."""
    model = four_layers()
    found = low_rank(model, sparsity)
    one_step = max(p.shape[0] + p[0].numel() for p in model.parameters() if p.ndim > 1)
    removed = found.total - found.kept
    assert removed_count(sparsity, found.total) <= removed < removed_count(sparsity, found.total) + one_step
    assert found.sparsity == removed / found.total
    rows = {row["name"]: row for row in layer_table(model, found)}
    assert list(rows) == ["0.weight", "2.weight", "4.weight", "5.weight"]
    for name, row in rows.items():
        pair, weight = found.pair(name), model.get_parameter(name)
        size = weight.numel() if pair is None else pair[0].numel() + pair[1].numel()
        assert row["kept"] == size <= row["parameters"] == weight.numel()
        if pair is not None:
            assert pair[0].shape == (len(weight), row["rank"])
            torch.testing.assert_close((pair[0] @ pair[1]).view(weight.shape), found.pruned(name, weight))
    assert not dead_layers(found)


def test_weights_are_the_nearest_of_their_rank() -> None:
    """Other triplets than the largest, or a kernel's places taken for columns of a batch."""
    model = four_layers()
    found = low_rank(model, 0.6)
    weights = found.pruned_parameters(model)
    assert weights
    for name, weight in weights.items():
        original = model.get_parameter(name).detach()
        u, s, vh = np.linalg.svd(original.flatten(1).double().numpy(), full_matrices=False)
        rank = found.ranks[name]
        expected = torch.from_numpy(u[:, :rank] * s[:rank] @ vh[:rank]).float().view(original.shape)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
        assert weight.dtype == original.dtype and weight.shape == original.shape


def test_energy_is_shared_out_over_the_layers() -> None:
    """The same rank everywhere instead: what carries the network goes, and noise stays."""
    first, second = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
    model = nn.ModuleList([first, second])
    first.weight.data.copy_(torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0] + [1e-3] * 16)))
    second.weight.data.copy_(torch.diag(torch.tensor([2.5] + [1e-3] * 19)))
    assert low_rank(model, 0.75).ranks == {"0.weight": 4, "1.weight": 1}
    # Of equal energy the first layer's stay.
    second.weight.data.copy_(first.weight.data)
    assert low_rank(model, 0.75).ranks == {"0.weight": 3, "1.weight": 2}


@pytest.mark.parametrize("seed", range(5))
def test_ranks_never_rise_with_sparsity(seed: int) -> None:
    """Ranks shared out from the start at each sparsity: a curve that goes up and down."""
    torch.manual_seed(seed)
    pruner = Pruner(four_layers(), PruningOptions(granularity="rank"))
    ranks = [pruner.at(i / 40) for i in range(40)]
    for more, less in itertools.pairwise(ranks):
        assert all(less.ranks[name] <= more.ranks[name] for name in more.ranks)
        assert less.kept <= more.kept


def test_sparsity_0_is_the_network_itself() -> None:
    """A product of all its triplets would differ in rounding, and cost more."""
    model = four_layers()
    found = low_rank(model, 0.0)
    assert found.pruned_parameters(model) == {} and found.sparsity == 0 and found.kept == found.total
    assert found.ranks == {"0.weight": 8, "2.weight": 16, "4.weight": 12, "5.weight": 10}


def test_rank_1_always_stays() -> None:
    """Rank 0 cuts the network in two; what is saved then is told, not what was asked for."""
    found = low_rank(four_layers(), 0.99)
    assert set(found.ranks.values()) == {1}
    assert found.kept == (8 + 27) + (16 + 72) + (12 + 16) + (10 + 12)
    assert found.sparsity < 0.99


def test_pruning_in_place_gives_the_same_weights() -> None:
    """``prune``, the evaluation and the export must be of one network."""
    model = four_layers()
    before = copy.deepcopy(model)
    found = prune(model, 0.7, granularity="rank")
    assert isinstance(found, LowRank) and not isinstance(found, Masks)
    expected = low_rank(before, 0.7).pruned_parameters(before)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, expected.get(name, before.get_parameter(name)))
    flops = count_flops(model, torch.rand(1, 3, 5, 5))
    parts = [flops[name] * kept / entries for name, (entries, kept) in found.counts.items()]
    assert kept_flops(flops, found) == pytest.approx(sum(parts))


def test_errors_name_value_and_remedy() -> None:
    """An SVD of NaN fails with words about convergence, or not at all."""
    model = four_layers()
    with pytest.raises(UserError, match=r"sparsity must be in \[0, 1\), got 90: write 0.9 for 90 %"):
        prune(model, 90, granularity="rank")
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model.get_parameter("2.weight")[3, 1, 0, 0] = bad
        with pytest.raises(UserError, match=r"^2\.weight is not finite, so it has no rank"):
            prune(model, 0.5, granularity="rank")
