"""What each granularity removes, what it leaves alone, and which combinations it refuses."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    CRITERIA,
    Pruner,
    PruningOptions,
    count_flops,
    kept_flops,
    layer_table,
    prune,
)
from sfw_dist.pruning.granularity import Ranking
from tests.support.pruning import (
    compute_masks,
    filters_of,
    flat,
    four_layers,
)


def test_two_of_four_leaves_dense_what_has_no_such_layout() -> None:
    """Dimension 1 of a transposed convolution counts outputs, that of a BatchNorm weight does not exist."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    assert compute_masks(model, 0.5, granularity="2:4").skipped == ("0.weight",)
    masks = compute_masks(model, 0.5, granularity="2:4", scope="all")
    assert set(masks) - set(masks.skipped) == {"2.weight"}


def test_filters_of_a_network() -> None:
    """A count of entries instead of filters; a bias removed; FLOPs that do not follow."""
    model = four_layers()
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, 0.5, granularity="filter")
    kept = [sum(filters_of(masks[name])) for name in ("0.weight", "2.weight", "4.weight")]
    assert sum(kept) == 18
    assert masks.skipped == ("5.weight",)
    assert masks.kept == kept[0] * 27 + kept[1] * 72 + kept[2] * 16 + 120
    for name, tensor in model.state_dict().items():
        mask = masks.get(name, torch.ones((), dtype=torch.bool))
        assert torch.equal(tensor, torch.where(mask, before[name], 0))
    flops = count_flops(model, torch.rand(1, 3, 5, 5))
    expected = sum(flops[f"{i}.weight"] * k / n for i, k, n in zip((0, 2, 4), kept, (8, 16, 12), strict=True))
    assert kept_flops(flops, masks) == pytest.approx(expected + flops["5.weight"])
    assert layer_table(model, masks)[0]["kept"] == kept[0] * 27


def test_filters_leave_alone_what_has_none() -> None:
    """Dimension 0 of a transposed convolution counts inputs; a BatchNorm has no filters."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1))
    for scope, skipped in (("weights", 2), ("all", 7)):
        masks = compute_masks(model, 0.5, scope=scope, granularity="filter")
        assert len(masks.skipped) == skipped and "2.weight" not in masks.skipped
        assert sum(filters_of(masks["2.weight"])) == 2


def test_a_network_without_filters_says_so() -> None:
    """Rows of the only layer are the network's outputs: a class would vanish."""
    for model in (nn.Linear(4, 2), nn.ConvTranspose2d(4, 6, 3)):
        with pytest.raises(UserError, match=r"has no filters to prune: .*take granularity weight$") as caught:
            prune(model, 0.5, granularity="filter")
        assert "\n" not in str(caught.value)


def test_what_is_no_single_matrix_stays() -> None:
    """Each group of a grouped convolution is a matrix of its own; a bias has no rank."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 12))
    found = Pruner(model, PruningOptions(scope="all", granularity="rank")).at(0.5)
    assert found.skipped == ("0.weight", "0.bias", "1.bias", "3.bias")
    assert set(found.changed()) <= {"1.weight", "3.weight"}
    assert found.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{"ranking": "layerwise"}, {"criterion": "other"}, {"scores": {}}], ids=str)
def test_ranks_take_no_ranking_criterion_or_scores(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over, they would give a pruning that differs from what was asked for."""
    monkeypatch.setitem(CRITERIA, "other", CRITERIA["magnitude"])
    with pytest.raises(UserError, match=r"granularity rank .*, got .*: (write|leave)"):
        prune(four_layers(), 0.5, granularity="rank", **options)


def test_both_rankings_of_two_of_four_are_the_same() -> None:
    """Each four is ranked by itself; refusing one of them would make --granularity 2:4 depend on the run's ranking."""
    model = four_layers()
    first, second = (compute_masks(model, 0.5, granularity="2:4", ranking=r) for r in get_args(Ranking))
    assert torch.equal(flat(first), flat(second))
