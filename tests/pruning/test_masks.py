"""Masks: exact counts, ties, subsets between sparsities, patterns, against brute force."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist.pruning import dead_layers
from sfw_dist.pruning.granularity import Ranking
from sfw_dist.pruning.masks import filter_masks
from tests.support.pruning import (
    compute_masks,
    filters_of,
    flat,
    four_layers,
    linears,
    removed_count,
    small_net,
    sparsities,
    tied_matrices,
    tied_networks,
)


@given(tied_matrices(), sparsities)
@settings(max_examples=100, deadline=None)
def test_global_masks_equal_a_brute_force_sort(tensors: list[Tensor], sparsity: float) -> None:
    """A threshold removes all ties or none; a sort that is not stable keeps others of them on other devices."""
    values = [abs(v) for t in tensors for v in t.double().flatten().tolist()]
    kept = len(values) - removed_count(sparsity, len(values))
    expected = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:kept])

    masks = compute_masks(linears(tensors), sparsity)

    assert set(flat(masks).nonzero().flatten().tolist()) == expected
    assert (masks.kept, masks.total) == (kept, len(values))
    assert masks.sparsity == pytest.approx(1 - kept / len(values))


@given(tied_matrices(), sparsities)
@settings(max_examples=100, deadline=None)
def test_layerwise_counts_are_exact_in_every_layer(tensors: list[Tensor], sparsity: float) -> None:
    """Counts rounded down in each layer add up to a network far denser than asked for."""
    masks = compute_masks(linears(tensors), sparsity, ranking="layerwise")
    for tensor, mask in zip(tensors, masks.values(), strict=True):
        assert mask.shape == tensor.shape
        assert int((~mask).sum()) == removed_count(sparsity, tensor.numel())
        if mask.any() and not mask.all():
            assert tensor[mask].abs().min() >= tensor[~mask].abs().max()


@given(tied_matrices(), sparsities, sparsities, st.sampled_from(["global", "layerwise"]))
@settings(max_examples=100, deadline=None)
def test_masks_of_higher_sparsity_are_subsets(tensors: list[Tensor], a: float, b: float, ranking: Ranking) -> None:
    """Ties broken differently at each sparsity: pruning a pruned network further would bring removed weights back."""
    low, high = sorted((a, b))
    model = linears(tensors)
    dense, sparse = (flat(compute_masks(model, s, ranking=ranking)) for s in (low, high))
    assert not (sparse & ~dense).any()


@pytest.mark.parametrize(("sparsity", "n", "removed"), [(0.5, 5, 3), (0.29, 50, 15), (0.35, 10, 4), (0.1, 4, 0)])
def test_counts_round_half_up_of_the_decimal_product(sparsity: float, n: int, removed: int) -> None:
    """0.29 * 50 is 14.499999999999998 in floating point and would lose an entry; round() takes half to even."""
    masks = compute_masks(linears([torch.arange(1.0, n + 1).view(1, n)]), sparsity)
    assert masks.total - masks.kept == removed


def test_mixed_precision_compares_across_types() -> None:
    """float64 magnitudes rounded to the float32 of another layer would tie, and the wrong entry would go."""
    fine = torch.tensor([[1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64)
    model = linears([torch.tensor([[1.0, 1.0]]), fine, torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)])
    assert flat(compute_masks(model, 1 / 6)).tolist() == [True, True, True, False, True, True]
    assert flat(compute_masks(model, 4 / 6)).tolist() == [False, False, True, False, True, False]


def test_channels_last_weights_tie_in_the_order_of_their_shape() -> None:
    """Flat positions taken from memory instead of shape: the masks would depend on the memory format."""
    layer = nn.Conv2d(4, 4, 3, bias=False)
    nn.init.ones_(layer.weight)
    expected = flat(compute_masks(layer, 0.4))
    assert torch.equal(flat(compute_masks(layer.to(memory_format=torch.channels_last), 0.4)), expected)
    assert expected.tolist() == sorted(expected.tolist(), reverse=True)


def test_each_mask_owns_its_memory() -> None:
    """Views into one flat mask: each saved mask would carry those of the whole network."""
    for mask in compute_masks(small_net(), 0.5).values():
        assert mask.untyped_storage().nbytes() == mask.numel()


def test_two_of_four_runs_along_the_input_channels() -> None:
    """Groups along the kernel's width: a mask that sparse tensor cores cannot use, where channels are innermost."""
    model = small_net()
    masks = compute_masks(model, 0.5, granularity="2:4")
    assert masks.skipped == ("0.weight",)  # 3 input channels
    assert masks["0.weight"].all()
    for name in ("2.weight", "4.weight"):
        weight, mask = model.get_parameter(name).detach(), masks[name]
        fours = mask.movedim(1, -1).reshape(-1, 4)
        magnitudes = weight.abs().movedim(1, -1).reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
        assert (magnitudes.where(fours, torch.inf).amin(1) >= magnitudes.where(~fours, 0).amax(1)).all()
    eligible = masks.total - masks["0.weight"].numel()
    assert masks.total - masks.kept == eligible // 2


def test_two_of_four_breaks_ties_by_the_lowest_channel() -> None:
    """An unstable sort: masks that differ between devices."""
    masks = compute_masks(
        linears([torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 0], [0, 2, 0, 0, 1, 1, -2, 1]])]), 0.5, granularity="2:4"
    )
    assert masks["0.weight"].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]]


@given(tied_networks(), sparsities)
def test_filters_equal_a_brute_force_sort(model: nn.Module, sparsity: float) -> None:
    """Norms that favour wide layers, ties broken by memory, or a layer left without a filter."""
    masks = compute_masks(model, sparsity, granularity="filter")
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
    masks = list(compute_masks(model, sparsity, granularity="filter", ranking="layerwise").values())
    for mask in masks[:-1]:
        n = len(mask)
        assert sum(filters_of(mask)) == max(n - removed_count(sparsity, n), 1)


@pytest.mark.parametrize("ranking", get_args(Ranking))
@given(model=tied_networks(), a=sparsities, b=sparsities)
def test_filters_of_higher_sparsity_are_subsets(ranking: Ranking, model: nn.Module, a: float, b: float) -> None:
    """The filter that a layer keeps at any rate must be the one that it keeps longest."""
    low, high = sorted((a, b))
    dense, sparse = (compute_masks(model, s, granularity="filter", ranking=ranking) for s in (low, high))
    assert all(not (sparse[name] & ~dense[name]).any() for name in dense)


def test_channels_last_filters_are_the_same() -> None:
    """Filters cut out of memory instead of shape."""
    model = four_layers()
    expected = compute_masks(model, 0.5, granularity="filter")
    found = compute_masks(model.to(memory_format=torch.channels_last), 0.5, granularity="filter")
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_filters_are_ranked_at_any_scale_of_the_scores(scale: float) -> None:
    """Fails when squares of float64 scores overflow or vanish, and the wrong filters go, or none."""
    scores = {"w": scale * torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 8.0], [7.0, 6.0]], dtype=torch.float64)}
    assert filter_masks(scores, 0.5, [["w"]])["w"][:, 0].tolist() == [False, False, True, True]
