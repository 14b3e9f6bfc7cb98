"""Sets bound by name: each parameter its own, sized by its layer's initializer, the model untouched."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfw_dist.constraints import (
    Constraint,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    Unconstrained,
    constrain,
    expected_initial_norm,
)

PAPER = KSparsePolytope(k_frac=0.05, k_min=10, tau=15.0)


def golden_net() -> nn.Sequential:
    """The net of the reference vectors; see golden/README.md."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Published(NamedTuple):
    """What the authors' published implementation made of one initialisation at k_frac 0.05, k_min 10, tau 15."""

    norm: float
    k: int
    radius: float


PUBLISHED = {
    "0.weight": Published(1.617139, 10, 7.67076315),
    "0.bias": Published(0.35025147, 8, 1.8574889),
    "1.weight": Published(math.sqrt(8), 8, 14.99999974),
    "1.bias": Published(1.0, 8, 5.30330086),  # of zeros
    "3.weight": Published(2.3643372, 57, 4.6974617),
    "4.weight": Published(4.0, 10, 18.97366596),
    "4.bias": Published(1.0, 10, 4.74341649),  # of zeros
    "8.weight": Published(1.8574749, 10, 8.81077662),
    "8.bias": Published(0.4621301, 10, 2.19207553),
}


def by_name(groups: list[dict[str, Any]]) -> dict[str, Constraint]:
    """Every parameter's constraint; fails where a name comes twice."""
    bound: dict[str, Constraint] = {}
    for group in groups:
        for name, _ in group["params"]:
            assert name not in bound
            bound[name] = group["constraint"]
    return bound


def unconstrained_names(model: nn.Module) -> set[str]:
    groups = constrain(model, PAPER, unconstrained="norm_and_bias")
    return {name for name, constraint in by_name(groups).items() if isinstance(constraint, Unconstrained)}


# Who gets which set


def test_k_and_radius_are_the_published_ones() -> None:
    """From the same norm exactly; from the expected norm within the spread of one draw, relatively 0.45/√n."""
    model = golden_net()
    bound = by_name(constrain(model, PAPER))
    assert bound.keys() == PUBLISHED.keys()
    for name, published in PUBLISHED.items():
        n = model.get_parameter(name).numel()
        batch_norm = name[0] in "14"
        for constraint, tolerance in (
            (PAPER.bind(n, published.norm), 1e-6),
            (bound[name], 1e-6 if batch_norm else 3 * 0.45 / math.sqrt(n)),
        ):
            assert isinstance(constraint, KSparsePolytope)
            assert constraint.k == published.k, name
            assert constraint.radius(n) == pytest.approx(published.radius, rel=tolerance), name


def test_every_parameter_is_bound_once_to_a_set_of_its_size() -> None:
    """Names and parameters are those of ``named_parameters``, in its order, one group each."""
    model = golden_net()
    for spec in (PAPER, KSupportBall(k_frac=0.1, diameter=3.0), LpBall(3, tau=2.0), KSparsePolytope(k=4, radius=0.5)):
        groups = constrain(model, spec)
        assert [group["params"] for group in groups] == [[pair] for pair in model.named_parameters()]
        for group in groups:
            (_, parameter), constraint = group["params"][0], group["constraint"]
            assert "tau" not in constraint.spec() and constraint.diameter(parameter.numel()) > 0
            assert type(constraint) is type(spec)


def test_a_concrete_set_stays_what_it_is() -> None:
    """A radius or a diameter given is that of every tensor, whatever its initializer."""
    model = golden_net()
    for name, constraint in by_name(constrain(model, KSparsePolytope(k=4, radius=0.5))).items():
        assert constraint == KSparsePolytope(k=4, radius=0.5), name
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, constraint in by_name(constrain(model, LpBall(3, diameter=7.0))).items():
        assert constraint.diameter(sizes[name]) == pytest.approx(7.0), name


def test_batchnorm_scale_and_shift_do_not_share_a_radius() -> None:
    """They have one shape, by which the published code finds the radius; it then shrinks the scale to fit."""
    bound = by_name(constrain(nn.BatchNorm2d(64), PAPER))
    assert bound["weight"].diameter(64) == pytest.approx(2 * 15 * 8)
    assert bound["bias"].diameter(64) == pytest.approx(2 * 15)


def test_two_layers_of_one_shape_do_not_share_a_radius() -> None:
    """The same shape, initialised by different rules."""

    class Wide(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 3.0)

    model = nn.Sequential(nn.Linear(20, 20, bias=False), Wide(20, 20, bias=False))
    bound = by_name(constrain(model, PAPER))
    assert bound["1.weight"].diameter(400) == pytest.approx(2 * 15 * 60)
    assert bound["0.weight"].diameter(400) < 2 * 15 * 5


def test_shared_parameters_are_bound_once() -> None:
    """A tied decoder, and a module used twice: two steps on one tensor otherwise."""
    tied = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    tied[1].weight = tied[0].weight
    assert list(by_name(constrain(tied, PAPER))) == ["0.weight"]
    layer = nn.Linear(4, 4)
    assert list(by_name(constrain(nn.Sequential(layer, nn.ReLU(), layer), PAPER))) == ["0.weight", "0.bias"]


def test_frozen_parameters_are_included() -> None:
    """They may be thawed later, and a frozen layer must not shift the sets of those after it."""
    model = golden_net()
    expected = by_name(constrain(model, PAPER))
    model[0].requires_grad_(False)
    assert by_name(constrain(model, PAPER)) == expected


# Unconstrained parameters


def test_norm_layers_and_biases_can_be_left_out() -> None:
    """All normalisation layers, whatever the number of their dimensions, and every bias; they form the last group."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.0))
            self.matrix = nn.Parameter(torch.ones(3, 3))

    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(3, 8, 3),
        "batch": nn.BatchNorm2d(8),
        "instance": nn.InstanceNorm2d(8, affine=True),
        "group": nn.GroupNorm(2, 8),
        "layer": nn.LayerNorm([8, 6, 6]),
        "rms": nn.RMSNorm([8, 6]),
        "linear": nn.Linear(8, 4),
        "scaled": Scaled(),
    }
    model = nn.ModuleDict(layers)
    constrained = {"conv.weight", "linear.weight", "scaled.matrix"}
    everything = {name for name, _ in model.named_parameters()}
    assert unconstrained_names(model) == everything - constrained
    groups = constrain(model, PAPER, unconstrained="norm_and_bias")
    assert [isinstance(group["constraint"], Unconstrained) for group in groups] == [False] * 3 + [True]
    assert by_name(constrain(model, PAPER)).keys() == everything
    assert not any(isinstance(group["constraint"], Unconstrained) for group in constrain(model, PAPER))


def test_no_empty_group_where_all_are_constrained() -> None:
    """torch refuses a group without parameters."""
    model = nn.Linear(4, 4, bias=False)
    assert len(constrain(model, PAPER, unconstrained="norm_and_bias")) == 1


def test_the_unconstrained_set_puts_everything_in_one_group() -> None:
    """Momentum SGD as a baseline, by the same code."""
    model = golden_net()
    (group,) = constrain(model, Unconstrained())
    assert group["params"] == list(model.named_parameters()) and group["constraint"] == Unconstrained()


def test_wrong_option_is_an_error_of_one_line() -> None:
    """A misspelt option would constrain BatchNorm silently."""
    with pytest.raises(ValueError) as error:
        constrain(golden_net(), PAPER, unconstrained="bias")  # type: ignore[arg-type]
    assert str(error.value) == "unconstrained must be none or norm_and_bias, got 'bias'"


# The expected norm


@pytest.mark.parametrize(
    ("module", "fan_in"),
    [
        (nn.Linear(64, 32), 64),
        (nn.Linear(1000, 200), 1000),
        (nn.Conv2d(3, 16, 3), 27),
        (nn.Conv2d(64, 64, 3), 576),
        (nn.Conv2d(32, 64, 3, groups=4), 72),
        (nn.Conv1d(8, 40, 5), 40),
    ],
    ids=str,
)
def test_linear_and_conv_norms_are_the_closed_forms(module: nn.Module, fan_in: int) -> None:
    """Both draw uniformly within ±1/√fan_in: ``E‖W‖ ≈ √n · (1/√fan_in) / √3``."""
    for name, parameter in module.named_parameters():
        closed = math.sqrt(parameter.numel()) / math.sqrt(fan_in) / math.sqrt(3)
        assert expected_initial_norm(module, name) == pytest.approx(closed, rel=0.02)


def test_norms_of_constant_initializers_are_exact() -> None:
    """Ones have norm √n; zeros count as 1, or the tensor could never move."""
    for layer, n in ((nn.BatchNorm2d(48), 48), (nn.LayerNorm([4, 5]), 20), (nn.GroupNorm(3, 12), 12)):
        assert expected_initial_norm(layer, "weight") == pytest.approx(math.sqrt(n), rel=1e-6)
        assert expected_initial_norm(layer, "bias") == 1.0
    assert expected_initial_norm(nn.Embedding(500, 40), "weight") == pytest.approx(math.sqrt(20_000), rel=0.02)


def test_present_weights_do_not_matter() -> None:
    """The norm is the initializer's, so that a pretrained or already trained model gets the same sets."""
    layer = nn.Linear(64, 32)
    before = expected_initial_norm(layer, "weight")
    with torch.no_grad():
        layer.weight.mul_(100)
    assert expected_initial_norm(layer, "weight") == before


def test_module_without_an_initializer_counts_with_its_present_norm() -> None:
    """There is nothing to draw from; and a tensor of zeros counts as 1."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.tensor([[3.0, 4.0]]))
            self.position = nn.Parameter(torch.zeros(2, 2))

    assert expected_initial_norm(Bare(), "token") == pytest.approx(5.0)
    assert expected_initial_norm(Bare(), "position") == 1.0
    assert by_name(constrain(Bare(), PAPER))["token"].diameter(2) == pytest.approx(2 * 15 * 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_norm_in_other_types(dtype: torch.dtype) -> None:
    """A norm rounded to bfloat16 is off by 0.1 %."""
    assert expected_initial_norm(nn.BatchNorm2d(48, dtype=dtype), "weight") == pytest.approx(math.sqrt(48), rel=1e-6)
    closed = math.sqrt(250 / 3)
    assert expected_initial_norm(nn.Linear(400, 250, dtype=dtype), "weight") == pytest.approx(closed, rel=0.02)


def test_model_and_random_state_stay_as_they_are() -> None:
    """The published code re-initialises the model and draws on: the run is then another one."""
    model = golden_net()
    model(torch.randn(4, 3, 8, 8)).sum().backward()  # running statistics and gradients that are not the initial ones
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    random_states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    constrain(model, PAPER)

    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (random.getstate(), str(np.random.get_state())) == random_states[1:]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is not None)
    assert len(gradients) == len(parameters) and model.training


def test_the_answer_does_not_depend_on_the_random_state() -> None:
    """Ranks with different seeds must come to the same radii, to the last bit."""
    torch.manual_seed(1)
    first = by_name(constrain(golden_net(), PAPER))
    torch.manual_seed(2)
    assert by_name(constrain(golden_net(), PAPER)) == first
