"""Whole filters, and weights of low rank: exact counts, against brute force and numpy's SVD."""

from __future__ import annotations

import copy
import itertools
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.pruning.low_rank import LowRank
from sfw_dist.pruning.masks import MaskKind, Masks, magnitude_masks
from sfw_dist.pruning.one_shot import masked_parameters, prune, singular_factors, truncated
from sfw_dist.pruning.sparsities import PAPER_SPARSITIES
from sfw_dist.pruning.summary import count_flops, dead_layers, kept_flops, layer_table

sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from(PAPER_SPARSITIES))
FILTERS = ("filters", "filters-layerwise")


def small_net() -> nn.Sequential:
    """Layers of 8, 16 and 12 filters before the last."""
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(16, 12), nn.Linear(12, 10))


def removed_count(sparsity: float, n: int) -> int:
    return int((Decimal(str(sparsity)) * n).quantize(Decimal(1), ROUND_HALF_UP))


def filters_of(mask: Tensor) -> list[bool]:
    """Whether each filter stays; it must be as a whole."""
    kept = mask.flatten(1)
    assert (kept.all(1) == kept.any(1)).all(), "a part of a filter is removed"
    return [bool(stays) for stays in kept.all(1)]


@st.composite
def tied_networks(draw: st.DrawFn) -> nn.Module:
    """Up to three linear layers of few different rows, and the last."""
    heights = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    layers = [nn.Linear(3 + i, height, bias=False) for i, height in enumerate([*heights, 2])]
    for layer in layers:
        values = torch.randint(0, 4, (layer.out_features, 1), generator=generator).float()
        layer.weight = nn.Parameter(values.expand(layer.weight.shape).clone())
    return nn.ModuleList(layers)


@given(tied_networks(), sparsities)
def test_filters_equal_a_brute_force_sort(model: nn.Module, sparsity: float) -> None:
    """Norms that favour wide layers, ties broken by memory, or a layer left without a filter."""
    masks = magnitude_masks(model, sparsity, kind="filters")
    weights = [p.detach() for p in model.parameters()][:-1]
    sizes = [(float(row.square().mean().sqrt()), i, j) for i, w in enumerate(weights) for j, row in enumerate(w)]
    first = {(*min((-size, j) for size, i, j in sizes if i == layer), layer) for layer in range(len(weights))}
    staying = {(layer, j) for _, j, layer in first}
    order = sorted(sizes, key=lambda f: ((f[1], f[2]) not in staying, -f[0], f[1], f[2]))
    count = max(len(sizes) - removed_count(sparsity, len(sizes)), len(weights))
    expected = {(i, j) for _, i, j in order[:count]}

    found = {(i, j) for i, m in enumerate(list(masks.values())[:-1]) for j, k in enumerate(filters_of(m)) if k}
    assert found == expected
    assert list(masks.values())[-1].all() and masks.skipped == (f"{len(weights)}.weight",)
    assert not dead_layers(masks)


@given(tied_networks(), sparsities)
def test_layerwise_filters_are_counted_in_every_layer(model: nn.Module, sparsity: float) -> None:
    """A layer whose filters are all small would lose most of them, which "layerwise" promises not to do."""
    masks = list(magnitude_masks(model, sparsity, kind="filters-layerwise").values())
    for mask in masks[:-1]:
        n = len(mask)
        assert sum(filters_of(mask)) == max(n - removed_count(sparsity, n), 1)


@pytest.mark.parametrize("kind", FILTERS)
@given(model=tied_networks(), a=sparsities, b=sparsities)
def test_filters_of_higher_sparsity_are_subsets(kind: MaskKind, model: nn.Module, a: float, b: float) -> None:
    """The filter that a layer keeps at any rate must be the one that it keeps longest."""
    low, high = sorted((a, b))
    dense, sparse = (magnitude_masks(model, s, kind=kind) for s in (low, high))
    assert all(not (sparse[name] & ~dense[name]).any() for name in dense)


def test_filters_of_a_network() -> None:
    """A count of entries instead of filters; a bias removed; FLOPs that do not follow."""
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, 0.5, kind="filters")
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
        masks = magnitude_masks(model, 0.5, scope=scope, kind="filters")  # type: ignore[arg-type]
        assert len(masks.skipped) == skipped and "2.weight" not in masks.skipped
        assert sum(filters_of(masks["2.weight"])) == 2


def test_a_network_without_filters_says_so() -> None:
    """Rows of the only layer are the network's outputs: a class would vanish."""
    for model in (nn.Linear(4, 2), nn.ConvTranspose2d(4, 6, 3)):
        with pytest.raises(UserError, match=r"has no filters to prune: .*take kind global$") as caught:
            prune(model, 0.5, kind="filters")
        assert "\n" not in str(caught.value)


def test_channels_last_filters_are_the_same() -> None:
    """Filters cut out of memory instead of shape."""
    model = small_net()
    expected = magnitude_masks(model, 0.5, kind="filters")
    found = magnitude_masks(model.to(memory_format=torch.channels_last), 0.5, kind="filters")
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


# Low rank


def low_rank(model: nn.Module, sparsity: float) -> LowRank:
    return truncated(singular_factors(model), sparsity)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.85])
def test_counts_are_those_of_the_factors(sparsity: float) -> None:
    """A count of nonzeros, of which the product has as many as before; or fewer saved than asked for."""
    model = small_net()
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
            torch.testing.assert_close((pair[0] @ pair[1]).view(weight.shape), found.weights()[name])
    assert not dead_layers(found)


def test_weights_are_the_nearest_of_their_rank() -> None:
    """Other triplets than the largest, or a kernel's places taken for columns of a batch."""
    model = small_net()
    found = low_rank(model, 0.6)
    weights = found.weights()
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
    """Ranks shared out anew at each sparsity: a curve that goes up and down."""
    torch.manual_seed(seed)
    factors = singular_factors(small_net())
    ranks = [truncated(factors, i / 40) for i in range(40)]
    for more, less in itertools.pairwise(ranks):
        assert all(less.ranks[name] <= more.ranks[name] for name in more.ranks)
        assert less.kept <= more.kept


def test_sparsity_0_is_the_network_itself() -> None:
    """A product of all its triplets would differ in rounding, and cost more."""
    model = small_net()
    found = low_rank(model, 0.0)
    assert found.weights() == {} and found.sparsity == 0 and found.kept == found.total
    assert found.ranks == {"0.weight": 8, "2.weight": 16, "4.weight": 12, "5.weight": 10}


def test_rank_1_always_stays() -> None:
    """Rank 0 cuts the network in two; what is saved then is told, not what was asked for."""
    found = low_rank(small_net(), 0.99)
    assert set(found.ranks.values()) == {1}
    assert found.kept == (8 + 27) + (16 + 72) + (12 + 16) + (10 + 12)
    assert found.sparsity < 0.99


def test_pruning_in_place_gives_the_same_weights() -> None:
    """``prune``, the evaluation and the export must be of one network."""
    model = small_net()
    before = copy.deepcopy(model)
    found = prune(model, 0.7, kind="low_rank")
    assert isinstance(found, LowRank) and not isinstance(found, Masks)
    expected = masked_parameters(before, low_rank(before, 0.7))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, expected.get(name, before.get_parameter(name)))
    flops = count_flops(model, torch.rand(1, 3, 5, 5))
    parts = [flops[name] * kept / entries for name, (entries, kept) in found.counts.items()]
    assert kept_flops(flops, found) == pytest.approx(sum(parts))


def test_what_is_no_single_matrix_stays() -> None:
    """Each group of a grouped convolution is a matrix of its own; a bias has no rank."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 12))
    found = truncated(singular_factors(model, scope="all"), 0.5)
    assert found.skipped == ("0.weight", "0.bias", "1.bias", "3.bias")
    assert set(found.weights()) <= {"1.weight", "3.weight"}
    assert found.total == sum(p.numel() for p in model.parameters())


def test_errors_name_value_and_remedy() -> None:
    """An SVD of NaN fails with words about convergence, or not at all."""
    model = small_net()
    with pytest.raises(UserError, match=r"unknown kind 'low_rank': choose one of global"):
        magnitude_masks(model, 0.5, kind="low_rank")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sparsity must be in \[0, 1\), got 90: write 0.9 for 90 %"):
        prune(model, 90, kind="low_rank")
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model.get_parameter("2.weight")[3, 1, 0, 0] = bad
        with pytest.raises(UserError, match=r"^2\.weight is not finite, so it has no rank"):
            prune(model, 0.5, kind="low_rank")
