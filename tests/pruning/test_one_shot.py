"""Pruning in place: the published masks, and that it applies exactly the masks it returns."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    Masks,
    Pruner,
    PruningOptions,
    prune,
)
from sfw_dist.pruning.granularity import Ranking
from sfw_dist.pruning.one_shot import MaskGranularity
from tests.support.pruning import (
    compute_masks,
    flat,
    four_layers,
    linears,
    small_net,
    sparsities,
    tied_matrices,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "global_prune.npz"


def golden_net() -> tuple[nn.Module, dict[str, np.ndarray]]:
    """The network whose parameters the published code pruned, and what it stored; ``w{j}`` is parameter j."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        stored = dict(archive)
    model = small_net()
    assert [name for name, _ in model.named_parameters()] == stored["names"].tolist()
    with torch.no_grad():
        for j, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.from_numpy(stored[f"w{j}"]))
    return model, stored


def published_values(stored: dict[str, np.ndarray], fraction: float) -> list[np.ndarray]:
    return [stored[f"keep{fraction}_w{j}"] for j in range(len(stored["names"]))]


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2, 0.1, 0.05, 0.01])
def test_masks_are_the_published_ones(fraction: float) -> None:
    """Another order of tensors, or BatchNorm left out of scope "all": masks unlike those behind the paper's curves.

    With a the ascending magnitudes of all N entries (none zero, none tied here), the published rule keeps
    |w| >= ([0] + a)[i], i = int((1 - f) * N). The extra leading 0 shifts the list by one: the threshold is a[i - 1],
    so N - i + 1 entries stay, 1 more than asked, and rounding (1 - f) * N down adds another 1 where its fraction is
    1/2 or more: at f = 0.9, 157.8, they keep 1,422 and we 1,420. At the same number of entries the masks are equal.
    """
    model, stored = golden_net()
    published = torch.from_numpy(np.concatenate([w.ravel() != 0 for w in published_values(stored, fraction)]))
    n, theirs = published.numel(), int(published.sum())
    asked = (1 - Decimal(str(fraction))) * n
    assert theirs == n - int(asked) + 1

    same_count = flat(compute_masks(model, (n - theirs) / n, scope="all"))
    assert torch.equal(same_count, published)

    ours = flat(compute_masks(model, float(1 - Decimal(str(fraction))), scope="all"))
    assert not (ours & ~published).any()
    assert theirs - int(ours.sum()) == (1 if asked % 1 < Decimal("0.5") else 2)


def test_pruned_values_are_the_published_ones() -> None:
    """Kept entries must keep their value and the others must be zero, in BatchNorm and biases too."""
    model, stored = golden_net()
    expected = published_values(stored, 0.1)
    removed = sum(int((w == 0).sum()) for w in expected)
    prune(model, removed / sum(w.size for w in expected), scope="all")
    for parameter, values in zip(model.parameters(), expected, strict=True):
        assert np.array_equal(parameter.detach().numpy(), values)


@given(tied_matrices(), sparsities)
@settings(max_examples=50, deadline=None)
def test_pruning_again_changes_nothing(tensors: list[Tensor], sparsity: float) -> None:
    """Zeros left out of the count: each call would remove the fraction again."""
    model = linears(tensors)
    once = flat(prune(model, sparsity))
    before = [p.clone() for p in model.parameters()]
    again = flat(prune(model, sparsity))
    assert int(once.sum()) == int(again.sum())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("ranking", get_args(Ranking))
@pytest.mark.parametrize("granularity", get_args(MaskGranularity))
def test_masks_leave_the_model_alone_and_prune_applies_exactly_them(
    granularity: MaskGranularity, ranking: Ranking
) -> None:
    """A mask computed on an already changed model, or weights rounded by multiplying them."""
    model = small_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = compute_masks(model, 0.5, granularity=granularity, ranking=ranking)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    applied = prune(model, 0.5, granularity=granularity, ranking=ranking)

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if name in masks:
            assert torch.equal(masks[name], applied[name])
            assert torch.equal(parameter, torch.where(masks[name], before[name], 0.0))
            assert not parameter.signbit()[~masks[name]].any()
        else:
            assert torch.equal(parameter, before[name])


def test_bad_arguments_are_user_errors() -> None:
    """A misspelt scope must not fall through to another one, nor "2:4" quietly remove half when 0.9 was asked."""
    with pytest.raises(UserError, match=r"unknown scope 'weight': choose one of weights, all"):
        compute_masks(small_net(), 0.5, scope="weight")
    with pytest.raises(UserError, match=r"unknown granularity '2:8': choose one of weight, 2:4, filter, rank"):
        compute_masks(small_net(), 0.5, granularity="2:8")
    with pytest.raises(UserError, match=r"granularity 2:4 removes exactly 0.5, got sparsity 0.9"):
        compute_masks(small_net(), 0.9, granularity="2:4")
    with pytest.raises(UserError, match="BatchNorm2d has nothing to prune"):
        compute_masks(nn.BatchNorm2d(3), 0.5)


def test_nan_weights_name_the_parameter_and_nothing_is_pruned() -> None:
    """NaN compares with nothing: the selection would be arbitrary, and a diverged network look merely inaccurate."""
    model = small_net()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 1, 0, 0] = torch.nan
    before = model.get_parameter("0.weight").detach().clone()
    with pytest.raises(UserError, match=r"^2\.weight holds NaN"):
        prune(model, 0.5)
    assert torch.equal(model.get_parameter("0.weight"), before)


def _restless(model: nn.Module) -> list[object]:
    """What pruning must leave of parameters, apart from the values."""
    return [(id(p), p.requires_grad, id(p.grad), p._backward_hooks) for p in model.parameters()]


@pytest.mark.parametrize("granularity", ["weight", "2:4", "filter"])
def test_gradients_hooks_and_what_stays_are_not_touched(granularity: MaskGranularity) -> None:
    """Fails when a frozen parameter trains afterwards, a gradient is gone, or autograd is told that all has changed."""
    model = four_layers()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    model[0].weight.requires_grad_(False)
    model[2].weight.register_hook(lambda gradient: gradient)
    before, modes = _restless(model), [module.training for module in model.modules()]
    versions = {name: p._version for name, p in model.named_parameters()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    masks = prune(model, 0.5, granularity=granularity)
    assert _restless(model) == before and [module.training for module in model.modules()] == modes
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    changed = {name for name, p in model.named_parameters() if p._version != versions[name]}
    assert changed == masks.keys() - set(masks.skipped)


def test_a_failure_while_writing_leaves_the_model() -> None:
    """Fails when the first layers are pruned and the last ones are not, and nobody knows which."""
    model = linears([torch.randn(4, 4), torch.randn(4, 4), torch.randn(1, 4)])
    pruner = Pruner(model)
    model[1].weight = nn.Parameter(torch.randn(4, 1).expand(4, 4))  # one number in memory for several entries
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        pruner.at(0.5).apply_to(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_interrupt_while_writing_leaves_the_model() -> None:
    """Fails when Ctrl-C leaves a network that is pruned in part."""

    class Interrupted(Masks):
        def pruned(self, name: str, parameter: Tensor) -> Tensor:
            if name == "2.weight":
                assert int(model[1].weight.count_nonzero()) < 16, "the test interrupts too early"
                raise KeyboardInterrupt
            return super().pruned(name, parameter)

    model = linears([torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        Interrupted({f"{i}.weight": torch.eye(4, dtype=torch.bool) for i in range(3)}).apply_to(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [PruningOptions(), PruningOptions(granularity="rank")], ids=["masks", "rank"])
def test_a_pruning_of_another_model_is_told(options: PruningOptions) -> None:
    """Fails when it is a KeyError, or a mask of another shape is stretched over the weights."""
    pruning = Pruner(linears([torch.randn(6, 6), torch.randn(6, 6)]), options).at(0.8)
    for other, told in (
        (linears([torch.randn(6, 6)]), r"1.weight is \(6, 6\), and ModuleList lacks it: apply it to the model"),
        (linears([torch.randn(6, 6), torch.randn(3, 6)]), r"1.weight is \(6, 6\), and ModuleList has it as \(3, 6\)"),
    ):
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(UserError, match=told):
            pruning.apply_to(other)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
