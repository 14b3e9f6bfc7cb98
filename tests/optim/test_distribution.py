"""The optimizer follows what a script or a framework does to its groups, parameters and state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained, constrain
from tests.support.changing_groups import (
    CHANGE_AT,
    KEEPS_MOMENTUM,
    LOSES_ALL,
    LOSES_B,
    STEPS,
    Run,
    append_to_a_group,
    clear_and_add,
    expected,
    parameter,
    pop_the_first,
    replace_groups_by_copies,
)


@pytest.mark.parametrize("change", [*KEEPS_MOMENTUM, *LOSES_ALL, *LOSES_B], ids=lambda change: change.__name__)
def test_what_changed_is_followed(change: Callable[[Run], None]) -> None:
    """Fails when a tensor is trained no longer, or without a word not at all, or loses a momentum that stayed."""
    found, wanted = Run("abc").train(change), expected(change)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_cleared_groups_that_come_again_train() -> None:
    """Fails when groups that were cleared and added are stepped with the old ones' options, or not at all."""
    run = Run("abc")
    before = {name: p.detach().clone() for name, p in run.tensors.items()}
    after = run.train(clear_and_add)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_a_rate_that_is_set_after_groups_were_copied_counts() -> None:
    """Fails when the step reads the options of groups that are no longer the optimizer's."""
    run = Run("ab")
    replace_groups_by_copies(run)
    run.step(0)
    before = {name: p.detach().clone() for name, p in run.tensors.items()}
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.step(1)
    assert all(torch.equal(p, before[name]) for name, p in run.tensors.items())


def test_states_can_be_saved_after_a_change() -> None:
    """Fails when the state of a tensor that left is in the way of a checkpoint."""
    run = Run("abc")
    run.train(pop_the_first)
    state = run.optimizer.state_dict()
    assert len(state["state"]) == len(run.tensors) == 2
    again = Run("bc")
    again.optimizer.load_state_dict(state)


def test_a_new_parameter_is_brought_into_its_set() -> None:
    """Fails when a parameter that joins by hand is stepped from outside of its set."""
    run = Run("ab")
    run.step(0)
    append_to_a_group(run)
    run.tensors["d"].data.fill_(3.0)
    run.step(1)
    ball = KSparsePolytope(k_frac=0.1, radius=0.5)
    assert ball.gauge(run.tensors["d"].detach()) <= 1 + 1e-6


def test_a_parameter_that_cannot_be_trained_is_refused() -> None:
    """Fails when a complex tensor that was put into a group stops the step somewhere inside."""
    run = Run("a")
    run.optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3) * 1j))
    with pytest.raises(ValueError, match="real floating-point"):
        run.step(0)


def test_a_flat_tensor_in_the_place_of_others_is_refused() -> None:
    """Fails when a slice of many tensors, as DeepSpeed's ZeRO gives one, is stepped in the set of a single tensor."""
    run = Run("a")
    (replaced,) = run.optimizer.param_groups[0]["params"]
    run.optimizer.param_groups[0]["params"] = [torch.nn.Parameter(replaced.detach().flatten())]
    with pytest.raises(
        ValueError, match=r"replaced 1 parameters by one of 12000 entries.*optim\.deepspeed\.initialize"
    ):
        run.optimizer.step()


@pytest.mark.parametrize("kind", [SFW, AdaGradSFW, ProjectedSGD])
def test_a_compiled_step_is_the_step(kind: type[SFW]) -> None:
    """Fails when torch.compile traces the step: errors inside of it, or other bits than the ranks' without compiler."""
    torch.manual_seed(0)
    net, other = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    other.load_state_dict(net.state_dict())
    ours, theirs = (kind(constrain(one, LpBall(2, radius=0.5)), lr=0.1) for one in (net, other))
    compiled = torch.compile(ours.step)
    for step in range(3):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        compiled(), theirs.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_group_made_by_hand_has_the_defaults() -> None:
    """Fails when a group that was not added by add_param_group lacks options."""
    p = parameter("c")
    optimizer = SFW([{"params": [parameter("b")], "constraint": Unconstrained()}], lr=0.01)
    optimizer.param_groups.append({"params": [p]})
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_parameters_that_change_their_type_are_followed(dtype: torch.dtype, fused: bool) -> None:
    """Fails when the compiled kernel reads memory with the old type: wrong numbers, or the end of the process."""
    torch.manual_seed(0)
    net, other = torch.nn.Linear(300, 40), torch.nn.Linear(300, 40)
    other.load_state_dict(net.state_dict())
    optimizers = []
    for model, each in ((net, fused), (other, False)):
        optimizer = SFW(
            [{"params": list(model.parameters()), "constraint": KSparsePolytope(k=9, radius=0.5)}], lr=0.1, fused=each
        )
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        model.to(dtype)
        optimizers.append(optimizer)
    for number in range(3):
        for model, optimizer in zip((net, other), optimizers, strict=True):
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.dtype == dtype and torch.equal(p, q) and p.isfinite().all()


def test_a_plan_that_is_refused_leaves_momentum_as_it_was() -> None:
    """Fails when a mistake in a group, which is then mended, costs all momentum."""
    run, wanted = Run("abc"), expected(replace_groups_by_copies)
    for number in range(STEPS):
        run.step(number)
        if number == CHANGE_AT:
            groups = run.optimizer.param_groups
            groups.reverse()
            good, groups[0]["constraint"] = groups[0]["constraint"], KSparsePolytope(k=3, tau=1.0)
            with pytest.raises(ValueError, match="bind it"):
                run.optimizer.state_dict()
            groups[0]["constraint"] = good
    for name, p in run.tensors.items():
        assert torch.equal(p.detach(), wanted[name]), name


def test_states_are_saved_and_loaded_as_the_groups_are_now() -> None:
    """Fails when a change that no step has seen yet gives momenta to the wrong tensors, or skips a new one's set."""
    run = Run("abc")
    run.step(0)
    run.optimizer.param_groups.reverse()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for name, p in run.tensors.items():
        assert run.optimizer.state[p]["momentum_buffer"].shape == p.shape, name
    append_to_a_group(run)
    run.tensors["d"].data.fill_(3.0)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.param_groups[0]["constraint"].gauge(run.tensors["d"].detach()) <= 1 + 1e-6
