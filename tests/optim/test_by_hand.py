"""What scripts do by hand to parameters, gradients, options and state, compared with the plain step or a new start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sfw_dist import SFW, AdaGradSFW, Constraint, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained, constrain
from sfw_dist.optim.sharding.distribution import Distribution

BALL = LpBall(2, radius=1.0)
SPARSE = KSparsePolytope(k_frac=0.1, radius=0.05)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
    optimizer.step()


@pytest.mark.parametrize("constraint", [SPARSE, Unconstrained()], ids=["sparse", "unconstrained"])
def test_a_parameter_that_becomes_row_major_goes_on_training(constraint: Constraint) -> None:
    """Fails when the copy that was made for channels_last memory is written over the parameter for ever."""
    torch.manual_seed(0)
    net = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    fused, plain = (SFW(constrain(one, constraint), lr=0.1, fused=one is net) for one in (net, other))
    for number in range(4):
        if number == 2:
            net.to(memory_format=torch.contiguous_format)
        before = net.weight.detach().clone()
        step(net, fused, number), step(other, plain, number)
        assert not torch.equal(net.weight, before)
        assert torch.equal(net.weight, other.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_a_backward_pass_notices_a_step_in_between(fused: bool) -> None:
    """Fails when a kernel writes weights that autograd has saved, and the gradient is of neither old nor new ones."""
    net = nn.Linear(6, 6, bias=False)
    optimizer = SFW(constrain(net, SPARSE), lr=0.1, fused=fused)
    x = torch.randn(3, 6, requires_grad=True)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_a_wider_type_are_not_rounded() -> None:
    """Fails when float32 gradients of bfloat16 weights are rounded on their way into the compiled kernel."""
    torch.manual_seed(0)
    net = nn.Linear(64, 32, bias=False).bfloat16()
    other = copy.deepcopy(net)
    fused, plain = (SFW(constrain(one, SPARSE), lr=0.1, fused=one is net) for one in (net, other))
    for number in range(3):
        for one, optimizer in ((net, fused), (other, plain)):
            one.weight.grad_dtype = torch.float32
            one.weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
            optimizer.step()
    assert torch.equal(net.weight, other.weight)
    momenta = [optimizer.state[one.weight]["momentum_buffer"] for one, optimizer in ((net, fused), (other, plain))]
    assert torch.equal(*momenta)


@pytest.mark.parametrize("kind", [SFW, AdaGradSFW, ProjectedSGD])
def test_a_momentum_of_none_starts_afresh(kind: type[SFW]) -> None:
    """Fails when what torch's SGD takes for a new start ends the process or the step."""
    torch.manual_seed(0)
    net = nn.Linear(6, 6, bias=False)
    optimizer = kind(constrain(net, BALL), lr=0.1)
    step(net, optimizer, 0)
    optimizer.state[net.weight]["momentum_buffer"] = None
    step(net, optimizer, 1)
    assert torch.equal(optimizer.state[net.weight]["momentum_buffer"], net.weight.grad)


@pytest.mark.parametrize(
    "count",
    [
        lambda: 3,
        lambda: None,
        lambda: torch.tensor(3),
        lambda: torch.tensor([3.0]),
        lambda: torch.tensor(3.0, requires_grad=True),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_count_of_steps_may_be_any_number(count: Callable[[], Any], fused: bool) -> None:
    """Fails when a state that a script has built by hand stops the step."""
    net = nn.Linear(6, 6, bias=False)
    optimizer = SFW(constrain(net, SPARSE), lr=0.1, fused=fused)
    step(net, optimizer, 0)
    optimizer.state[net.weight]["step"] = count()
    step(net, optimizer, 1)
    assert optimizer.state[net.weight]["step"].item() in (1, 4)


def test_a_momentum_that_is_no_tensor_is_refused() -> None:
    """Fails when a list is taken for no momentum, or stops the step somewhere inside."""
    net = nn.Linear(6, 6, bias=False)
    optimizer = SFW(constrain(net, SPARSE), lr=0.1)
    step(net, optimizer, 0)
    optimizer.state[net.weight]["momentum_buffer"] = [0.0] * 36
    with pytest.raises(ValueError, match="the momentum_buffer of weight is a list"):
        step(net, optimizer, 1)


@pytest.mark.parametrize("kind", [SFW, AdaGradSFW, ProjectedSGD])
@pytest.mark.parametrize(("bad", "error"), [({"lr": "0.1"}, TypeError), ({"momentum": 2.0}, ValueError)])
def test_a_refused_group_is_not_kept(kind: type[SFW], bad: dict[str, Any], error: type[Exception]) -> None:
    """Fails when an error of any type leaves a group behind, at which every later step or state fails."""
    net, other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    optimizer = kind(constrain(net, BALL), lr=0.1)
    with pytest.raises(error):
        optimizer.add_param_group({"params": [("other", other.weight)], "constraint": BALL, **bad})
    assert len(optimizer.param_groups) == 1
    step(net, optimizer, 0)
    optimizer.add_param_group({"params": [("other", other.weight)], "constraint": BALL})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", [SFW, AdaGradSFW, ProjectedSGD])
def test_a_group_that_was_appended_by_hand_has_the_defaults(kind: type[SFW]) -> None:
    """Fails when a group without all options is a KeyError in the step."""
    net, other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    optimizer = kind(constrain(net, BALL), lr=0.1)
    optimizer.param_groups.append({"params": [other.weight]})
    before = other.weight.detach().clone()
    step(other, optimizer, 0)
    torch.testing.assert_close(other.weight.detach(), before - 0.1 * other.weight.grad)


def test_options_that_are_wrong_at_a_step_are_named() -> None:
    """Fails when a rate that is no number is taken for a gradient that is none, or a wrong rule is a KeyError."""
    net = nn.Linear(6, 6, bias=False)
    optimizer = SFW(constrain(net, SPARSE), lr=0.1)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be at least 0, got nan"):
        step(net, optimizer, 0)
    optimizer.param_groups[0] |= {"lr": 0.1, "rescale": "gradeint"}
    with pytest.raises(ValueError, match="rescale must be one of"):
        step(net, optimizer, 0)


def test_groups_that_are_added_are_planned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when each of many added groups assigns all tensors to ranks anew: minutes for a thousand."""
    plans = []
    plan = Distribution.plan
    monkeypatch.setattr(Distribution, "plan", lambda *args, **options: plans.append(1) or plan(*args, **options))
    net = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(20))
    optimizer = SFW(constrain(net[0], SPARSE), lr=0.1)
    for layer in net[1:]:
        for group in constrain(layer, SPARSE):
            optimizer.add_param_group(group)
    before = [p.detach().clone() for p in net.parameters()]
    step(net, optimizer, 0)
    assert len(plans) == 2
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("constraint", [SPARSE, BALL, Unconstrained()], ids=["sparse", "l2", "unconstrained"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_tensor_that_is_frozen_again_keeps_its_negative_zeros(constraint: Constraint, fused: bool) -> None:
    """Fails when a tensor without gradient is added to 0, which turns -0 into 0: equal, but not the same bits."""
    net = nn.Linear(6, 6, bias=False)
    optimizer = SFW(constrain(net, constraint), lr=0.1, fused=fused)
    step(net, optimizer, 0)
    net.weight.detach()[0] = -0.0
    before = net.weight.detach().clone().view(torch.int32)
    net.requires_grad_(False)
    optimizer.step()
    assert torch.equal(net.weight.detach().view(torch.int32), before)
