"""Criteria, and scores of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.pruning import CRITERIA, PruningOptions, prune
from sfw_dist.pruning.criteria import register
from sfw_dist.pruning.granularity import Ranking
from sfw_dist.pruning.one_shot import MaskGranularity
from tests.support.pruning import (
    compute_masks,
    filters_of,
    flat,
    four_layers,
    linears,
    magnitudes,
    removed_count,
    small_net,
    sparsities,
    tied_matrices,
)


@pytest.mark.parametrize("ranking", ["global", "layerwise"])
@pytest.mark.parametrize("granularity", ["weight", "2:4", "filter"])
def test_magnitudes_as_own_scores_give_the_masks_of_magnitude(granularity: MaskGranularity, ranking: Ranking) -> None:
    """Own scores take another way than criteria, with other ties or counts."""
    model = four_layers()
    expected = compute_masks(model, 0.5, granularity=granularity, ranking=ranking)
    found = compute_masks(model, 0.5, granularity=granularity, ranking=ranking, scores=magnitudes(model))
    assert torch.equal(flat(found), flat(expected)) and found.skipped == expected.skipped


@given(tied_matrices(), sparsities, st.sampled_from(["global", "layerwise"]))
def test_signed_scores_are_compared_with_their_sign(scores: list[Tensor], sparsity: float, ranking: Ranking) -> None:
    """Compared by absolute value, the entries that should go first would stay."""
    model = linears([torch.ones_like(score) for score in scores])
    masks = compute_masks(model, sparsity, ranking=ranking, scores={f"{i}.weight": s for i, s in enumerate(scores)})
    parts = [torch.cat([s.flatten() for s in scores])] if ranking == "global" else [s.flatten() for s in scores]
    kept = [flat(masks)] if ranking == "global" else [mask.flatten() for mask in masks.values()]
    for values, mask in zip(parts, kept, strict=True):
        count = len(values) - removed_count(sparsity, len(values))
        best = sorted(range(len(values)), key=lambda i, values=values: (-float(values[i]), i))[:count]  # type: ignore[misc]
        assert set(mask.nonzero().flatten().tolist()) == set(best)


def test_own_scores_choose_and_prune_applies() -> None:
    """The scores are looked up but the magnitudes decide."""
    model = linears([torch.tensor([[5.0, 1.0], [4.0, 2.0]])])
    prune(model, 0.5, scores={"0.weight": torch.tensor([[0, 3], [1, 2]])})
    assert model.get_parameter("0.weight").tolist() == [[0.0, 1.0], [0.0, 2.0]]


def test_scores_of_filters_are_their_root_mean_squares() -> None:
    """One large entry outweighs a filter whose entries are all good."""
    model = linears([torch.ones(2, 4), torch.ones(2, 2)])
    scores = {"0.weight": torch.tensor([[2.0, 0, 0, 0], [1.5, 1.5, 1.5, 1.5]]), "1.weight": torch.ones(2, 2)}
    masks = compute_masks(model, 0.5, granularity="filter", scores=scores)
    assert filters_of(masks["0.weight"]) == [False, True]


@pytest.mark.parametrize(
    ("change", "granularity", "told"),
    [
        ({"4.wieght": torch.zeros(10, 16)}, "weight", r"scores\['4.wieght'\] .*did you mean '4.weight'\?"),
        ({"2.weight": None}, "weight", r"scores lack '2.weight': give a tensor of shape \(16, 8, 3, 3\)"),
        ({"4.weight": torch.zeros(16, 10)}, "weight", r"has shape \(16, 10\): give one score an entry, \(10, 16\)"),
        ({"4.weight": np.zeros((10, 16))}, "weight", r"'4.weight'\] is ndarray: give a dense tensor"),
        (
            {"4.weight": torch.zeros(10, 16).to_sparse()},
            "weight",
            r"is torch.sparse_coo .*: give a dense",
        ),
        (
            {"4.weight": torch.zeros(10, 16, dtype=torch.complex64)},
            "weight",
            r"torch.complex64: give a dense",
        ),
        ({"4.weight": torch.full((10, 16), torch.nan)}, "weight", r"'4.weight'\] is not finite"),
        ({"4.weight": torch.full((10, 16), -torch.inf)}, "2:4", r"'4.weight'\] is not finite"),
        (
            {"0.weight": torch.full((8, 3, 3, 3), -1.0)},
            "filter",
            r"'0.weight'\] has negative .*: give numbers of at least 0",
        ),
    ],
)
def test_unfit_scores_are_told_in_one_line_and_nothing_is_pruned(
    change: dict[str, Tensor | None], granularity: MaskGranularity, told: str
) -> None:
    """A layer without scores is pruned by something else, or a transposed one by scores of other entries."""
    model = small_net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scores = {name: score for name, score in (magnitudes(model) | change).items() if score is not None}
    with pytest.raises(UserError, match=told) as caught:
        prune(model, 0.5, granularity=granularity, scores=scores)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_registered_criterion_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion must be one new function: not a list of names to extend elsewhere, too."""
    with pytest.raises(UserError, match="unknown criterion 'saliency': choose one of magnitude"):
        PruningOptions(criterion="saliency")

    def saliency(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: (p * p.grad).abs().detach() for name, p in parameters.items() if p.grad is not None}

    monkeypatch.setitem(CRITERIA, "saliency", CRITERIA["magnitude"])  # it is taken out again after the test
    assert register(saliency) is saliency
    assert PruningOptions(criterion="saliency").criterion == "saliency"
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    layer.weight.grad = torch.tensor([[8.0, 1.0, -2.0, 0.0]])
    assert compute_masks(layer, 0.5, criterion="saliency")["weight"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("give", "told"),
    [
        (
            lambda name, p: None if name == "4.weight" else p.abs(),
            "criterion odd gives no scores for 4.weight: it must",
        ),
        (lambda name, p: p * torch.nan if name == "2.weight" else p, "criterion odd gives NaN for 2.weight: it must"),
        (lambda name, p: p.flatten(), r"what criterion odd gives for 0.weight has shape \(216,\): give one score an"),
        (lambda name, p: p.to("meta"), "what criterion odd gives for 0.weight is .* on the meta device: give a dense"),
    ],
)
def test_a_criterion_that_gives_something_else_is_told(
    give: Callable[[str, Tensor], Tensor | None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when one's own criterion ends in a traceback of the selection, or NaN decides what stays."""

    def odd(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = {name: give(name, parameter) for name, parameter in parameters.items()}
        return {name: score for name, score in found.items() if score is not None}

    monkeypatch.setitem(CRITERIA, "odd", odd)
    with pytest.raises(UserError, match=told):
        prune(small_net(), 0.5, criterion="odd")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float8_e4m3fn, torch.float16])
def test_scores_of_any_real_type_choose(dtype: torch.dtype) -> None:
    """Fails when the selection has no bit pattern for a type, or compares rounded numbers."""
    model = linears([torch.ones(1, 4)])
    masks = compute_masks(model, 0.5, scores={"0.weight": torch.tensor([[0, 1, 0, 1]]).to(dtype)})
    assert masks["0.weight"].tolist() == [[False, True, False, True]]
