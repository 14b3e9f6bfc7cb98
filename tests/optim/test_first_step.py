"""What SFW looks at when a tensor takes its first step: the rate, the set, the weights that were loaded meanwhile."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained, constrain

BALL = LpBall(2, radius=1.0)
OPTIMIZERS = (SFW, AdaGradSFW, ProjectedSGD)


def linear(scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    layer.weight.data.mul_(scale)
    return layer


def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_loaded_after_the_optimizer_was_built_are_brought_into_their_set(
    kind: type[SFW], caplog: pytest.LogCaptureFixture
) -> None:
    """Fails when training goes on outside of the set, where no bound of the method holds."""
    layer, large = linear(0.01), linear(100.0)
    optimizer = kind(constrain(layer, BALL), lr=0.01)
    layer.load_state_dict(large.state_dict())
    with caplog.at_level(logging.WARNING):
        step(layer, optimizer)
    assert BALL.gauge(layer.weight.detach()) <= 1 + 1e-5
    if kind is not ProjectedSGD:  # which projects at every step
        assert "and scaled: 1 of the tensors, weight the farthest" in caplog.text


def test_a_tensor_that_has_taken_steps_is_left_as_it_is() -> None:
    """Fails when later steps scale: a resumed run would differ from one that was not interrupted."""
    layer, other = linear(), linear()
    optimizer, whole = SFW(constrain(layer, BALL), lr=0.1), SFW(constrain(other, BALL), lr=0.1)
    step(layer, optimizer), step(other, whole)
    with torch.no_grad():
        layer.weight.mul_(1.5 / layer.weight.norm())
        other.weight.copy_(layer.weight)
    again = SFW(constrain(layer, BALL), lr=0.1)
    layer.load_state_dict(other.state_dict())
    again.load_state_dict(optimizer.state_dict())
    step(layer, again, seed=1), step(other, whole, seed=1)
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_resumed_run_has_the_weights_that_were_saved(kind: type[SFW], weights_first: bool) -> None:
    """Fails when weights that were loaded before the optimizer are scaled into a set that the saved one replaces."""
    layer = linear(0.1)  # no draw of the initializer, so that the present norm counts
    optimizer = kind(constrain(layer, LpBall(2, tau=0.5)), lr=0.01)
    step(layer, optimizer)
    saved, state = {"weight": layer.weight.detach().clone()}, copy.deepcopy(optimizer.state_dict())
    again = linear(3.0)
    if weights_first:
        again.load_state_dict(saved)
    resumed = kind(constrain(again, LpBall(2, tau=0.5)), lr=0.1)
    if not weights_first:
        again.load_state_dict(saved)
    assert not weights_first or not torch.equal(again.weight, saved["weight"])
    resumed.load_state_dict(state)
    assert torch.equal(again.weight, saved["weight"])
    step(layer, optimizer, seed=1), step(again, resumed, seed=1)
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_rate_may_be_a_tensor_of_one_number(kind: type[SFW], shape: tuple[int, ...]) -> None:
    """Fails when a rate of shape (1,), which torch's optimizers take, stops the first step."""
    layer, other = linear(), linear()
    step(layer, kind(constrain(layer, BALL), lr=torch.full(shape, 0.25)))
    step(other, kind(constrain(other, BALL), lr=0.25))
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rate_of_two_numbers_is_refused_as_torch_refuses_it(kind: type[SFW]) -> None:
    """Fails when the refusal is a RuntimeError about an ambiguous truth value."""
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        kind(constrain(linear(), BALL), lr=torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_a_factor_on_the_rate_survives_a_schedule(kind: type[SFW], lr: float | torch.Tensor) -> None:
    """Fails when a script that writes one rate into every group overwrites the rate of biases and norms."""
    layer, other = linear(), linear()
    optimizer = kind([{"params": [layer.weight], "constraint": Unconstrained(), "lr_factor": 0.25}], lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    step(layer, optimizer)
    step(other, torch.optim.SGD([other.weight], lr=0.125))
    torch.testing.assert_close(layer.weight, other.weight)
    assert optimizer.state_dict()["param_groups"][0]["lr_factor"] == 0.25


def test_a_factor_scales_constrained_steps_too() -> None:
    """Fails when the compiled kernel or the statistics read the rate without its factor."""
    for fused in (True, False):
        layer, other = linear(), linear()
        groups = constrain(layer, BALL)
        groups[0]["lr_factor"] = 0.25
        one, two = SFW(groups, lr=0.4, fused=fused), SFW(constrain(other, BALL), lr=0.1, fused=fused)
        step(layer, one), step(other, two)
        assert torch.equal(layer.weight, other.weight)
        assert one.statistics() == two.statistics()


@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf])
def test_a_factor_outside_its_domain_is_refused(factor: float) -> None:
    """Fails when a negative rate reaches the step."""
    groups = constrain(linear(), BALL)
    groups[0]["lr_factor"] = factor
    with pytest.raises(ValueError, match=f"lr_factor must be at least 0, got {factor}"):
        SFW(groups)


def test_plain_parameters_are_told_of() -> None:
    """Fails when SFW(model.parameters()) is momentum SGD at rate 1.0 without a word."""
    with pytest.warns(UserWarning, match=r"no param group has a constraint.*momentum-SGD steps with lr 1\.0"):
        SFW(linear().parameters())


def test_tensors_of_two_models_with_equal_names_have_their_own_statistics() -> None:
    """Fails when the tensors of two models, both called weight, share one entry, or one NaN resets the other's."""
    one, two = linear(), linear(2.0)
    optimizer = SFW([*constrain(one, BALL), *constrain(two, KSparsePolytope(k=3, radius=0.5))], lr=0.1)
    step(one, optimizer)
    step(two, optimizer)
    assert sorted(optimizer.statistics()) == ["weight(group0.param0)", "weight(group1.param0)"]
    momentum = optimizer.state[one.weight]["momentum_buffer"].clone()
    one.weight.grad = None
    two.weight.grad = torch.full_like(two.weight, math.nan)
    with pytest.raises(ValueError, match=r"the gradient of weight\(group1\.param0\) is not finite"):
        optimizer.step()
    assert optimizer.state[one.weight]["step"] > 0
    assert torch.equal(optimizer.state[one.weight]["momentum_buffer"], momentum)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("named_first", [True, False])
def test_groups_with_names_may_stand_next_to_groups_without(kind: type[SFW], named_first: bool) -> None:
    """Fails when a layer that a framework adds without names, or with them, is refused, as torch alone refuses it."""
    one, two, three = linear(), linear(), linear()
    named = [{"params": [("one", one.weight)], "constraint": BALL}]
    plain = [{"params": iter([two.weight, three.weight]), "constraint": BALL}]
    first, second = (named, plain) if named_first else (plain, named)
    optimizer = kind(first, lr=0.1)
    for group in second:
        optimizer.add_param_group(group)
    names = [group["param_names"] for group in optimizer.param_groups]
    wanted = (
        [["one"], ["group1.param0", "group1.param1"]] if named_first else [["group0.param0", "group0.param1"], ["one"]]
    )
    assert names == wanted
    before = three.weight.detach().clone()
    step(three, optimizer)
    assert not torch.equal(three.weight, before)
    kind(optimizer.param_groups).load_state_dict(optimizer.state_dict())
