"""The checks that PyTorch runs on state, hooks and copies of each of its own optimizers, and GradScaler's, on ours.

They are those of PyTorch's ``test/test_optim.py`` and ``test/test_cuda.py``, written anew.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

from sfw_dist import Unconstrained
from sfw_dist.constraints import Constraint
from tests.support.optimizer_infos import Problem, assert_same, each_optimizer, every_option, every_set

LR = OptimizerInput(None, {"lr": 1e-2})
pytestmark = pytest.mark.filterwarnings("ignore:no param group has a constraint")


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# State


@every_option
def test_a_loaded_state_continues_bitwise(info: OptimizerInfo, options: OptimizerInput, constraint: Constraint) -> None:
    """Fails when a file read with ``weights_only`` loses state or options, or loading changes what it is given."""
    first = Problem(info, options, constraint)
    first.train(3)
    state = saved_and_loaded(first.optimizer.state_dict())
    assert_same(state, saved_and_loaded(first.optimizer.state_dict()))

    second = Problem(info, options, constraint)
    for p, q in zip(second.parameters, first.parameters, strict=True):
        p.data.copy_(q)
    before = copy.deepcopy(state)
    second.optimizer.load_state_dict(state)
    assert_same(state, before)
    for _ in range(3):
        assert_same(second.train(1), first.train(1))
    assert_same(second.optimizer.state_dict(), first.optimizer.state_dict())


@every_set
def test_state_is_kept_of_every_parameter(info: OptimizerInfo, options: OptimizerInput, constraint: Constraint) -> None:
    """Fails when momentum is lost, or kept under other keys for one of the tensors."""
    problem = Problem(info, options, constraint)
    problem.train(2)
    state = problem.optimizer.state_dict()["state"]
    assert state.keys() == {0, 1}
    assert state[0].keys() == state[1].keys() >= {"momentum_buffer"}
    for number, p in enumerate(problem.parameters):
        assert state[number]["momentum_buffer"].shape == p.shape
        assert state[number]["momentum_buffer"].any()


@pytest.mark.parametrize("loading", ["named", "unnamed"])
@pytest.mark.parametrize("saving", ["named", "unnamed"])
@each_optimizer
def test_states_with_and_without_names_load_into_each_other(info: OptimizerInfo, saving: str, loading: str) -> None:
    """Fails when names are needed, or lost where one of the two has them."""

    def optimizer(kind: str) -> Optimizer:
        net = nn.Linear(3, 2)
        made: Optimizer = info.optim_cls(net.named_parameters() if kind == "named" else net.parameters(), lr=0.1)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        made.step()
        return made

    saved, loaded = optimizer(saving), optimizer(loading)
    loaded.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert_same(loaded.state_dict()["state"], saved.state_dict()["state"])
    names = loaded.state_dict()["param_groups"][0].get("param_names")
    assert names == (None if saving == loading == "unnamed" else ["weight", "bias"])
    loaded.step()


@each_optimizer
def test_a_state_of_other_groups_is_refused(info: OptimizerInfo) -> None:
    """Fails when a state of more groups or parameters is loaded in part."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = info.optim_cls([one])
    for more in ([{"params": [one]}, {"params": [two]}], [one, two]):
        with pytest.raises(ValueError, match=r"parameter groups|size of optimizer's group|state is of 2 parameters"):
            optimizer.load_state_dict(info.optim_cls(more).state_dict())


@every_set
def test_a_group_that_joins_late_leaves_the_others_as_they_are(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint
) -> None:
    """Fails when add_param_group loses momentum, or takes a parameter twice."""
    alone, joined = (Problem(info, options, constraint) for _ in range(2))
    alone.train(2)
    joined.train(2)
    late = nn.Parameter(torch.ones(4))
    joined.optimizer.add_param_group({"params": late, "lr": 0.5})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        joined.optimizer.add_param_group({"params": late})
    assert len(joined.optimizer.param_groups) == 2
    assert joined.optimizer.param_groups[1]["momentum"] == joined.optimizer.defaults["momentum"]
    assert_same(joined.train(2), alone.train(2))
    late.grad = torch.ones(4)
    joined.optimizer.step()
    torch.testing.assert_close(late.data, torch.full((4,), 0.5))


@each_optimizer
def test_a_state_may_be_loaded_again_and_into_a_copy(info: OptimizerInfo) -> None:
    """Fails when loading or copying leaves something in an optimizer that makes the same state another's."""
    optimizer = Problem(info, LR, Unconstrained()).optimizer
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.load_state_dict(state)
    copy.deepcopy(optimizer).load_state_dict(state)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("to_none", [True, False])
@each_optimizer
def test_gradients_are_cleared(info: OptimizerInfo, to_none: bool) -> None:
    """Fails when zero_grad leaves a gradient, or puts zeros where there was none."""
    with_gradient, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = info.optim_cls([with_gradient, without])
    with_gradient.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=to_none)
    assert without.grad is None
    if to_none:
        assert with_gradient.grad is None
    else:
        assert_same(with_gradient.grad, torch.zeros(2))


# Hooks


@each_optimizer
def test_step_hooks_run_in_order_and_may_change_the_arguments(info: OptimizerInfo) -> None:
    """Fails when a hook of the optimizer or of all optimizers is left out, or a pre-hook's arguments are."""
    problem, seen = Problem(info, LR, Unconstrained()), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all, before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all, after")),
        problem.optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        problem.optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
    ]
    try:
        problem.optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all, before", "before", "after", "all, after"]

    handle = problem.optimizer.register_step_pre_hook(lambda optimizer, *_: ((optimizer, lambda: 5.0), {}))
    assert problem.optimizer.step(lambda: 1.0) == 5.0
    handle.remove()
    assert problem.optimizer.step(lambda: 1.0) == 1.0
    assert len(seen) == 4


@every_set
def test_state_dict_hooks_see_the_state_and_may_replace_it(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint
) -> None:
    """Fails when a hook runs before the state is complete, in another order, or what it returns is not handed on."""
    problem, seen = Problem(info, options, constraint), []
    problem.train(1)
    plain = problem.optimizer.state_dict()
    hooks = [
        problem.optimizer.register_state_dict_pre_hook(lambda _: seen.append("before")),
        problem.optimizer.register_state_dict_pre_hook(lambda _: seen.append("first before"), prepend=True),
        problem.optimizer.register_state_dict_post_hook(lambda _, state: seen.append(copy.deepcopy(state))),
        problem.optimizer.register_state_dict_post_hook(lambda _, state: seen.append("first after"), prepend=True),
    ]
    assert_same(problem.optimizer.state_dict(), plain)
    assert seen[:3] == ["first before", "before", "first after"]
    assert_same(seen[3], plain)
    replaced = {"state": {}, "param_groups": [], "version": 2}
    hooks.append(problem.optimizer.register_state_dict_post_hook(lambda *_: replaced))
    assert problem.optimizer.state_dict() is replaced
    for hook in hooks:
        hook.remove()
    assert_same(problem.optimizer.state_dict(), plain)


@every_set
def test_load_hooks_see_the_state_and_may_replace_it(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint
) -> None:
    """Fails when a pre-hook sees a part of the state, a post-hook runs too early, or a replaced state is not loaded."""
    problem, other = Problem(info, options, constraint), Problem(info, options, constraint)
    problem.train(1)
    other.train(2)
    state, given = problem.optimizer.state_dict(), copy.deepcopy(other.optimizer.state_dict())
    seen: list[Any] = []

    def momentum_now(optimizer: Optimizer) -> None:
        seen.append(optimizer.state[problem.weight]["momentum_buffer"].clone())

    hooks = [
        problem.optimizer.register_load_state_dict_pre_hook(lambda _, s: seen.append(copy.deepcopy(s))),
        problem.optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("first"), prepend=True),
        problem.optimizer.register_load_state_dict_post_hook(momentum_now),
        problem.optimizer.register_load_state_dict_post_hook(lambda _: seen.append("first after"), prepend=True),
    ]
    problem.optimizer.load_state_dict(given)
    assert [seen[0], seen[2]] == ["first", "first after"]
    assert_same(seen[1], given)
    assert_same(seen[3], given["state"][0]["momentum_buffer"])
    hooks.append(problem.optimizer.register_load_state_dict_pre_hook(lambda *_: state))
    problem.optimizer.load_state_dict(given)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 8
    assert_same(problem.optimizer.state_dict(), state)


# Copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@every_set
def test_a_copy_has_all_attributes_and_steps_on(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, duplicate: Callable[[Any], Any]
) -> None:
    """Fails when a copy shares tensors with its original, lacks an attribute, or steps otherwise."""
    problem = Problem(info, options, constraint)
    problem.train(2)
    twin = duplicate(problem)
    assert twin.optimizer.param_groups[0]["params"][0] is twin.weight is not problem.weight

    def public(optimizer: Optimizer) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    assert public(twin.optimizer) == public(problem.optimizer)
    before = problem.weight.detach().clone()
    after = twin.train(2)
    assert_same(problem.weight.data, before)
    assert_same(problem.train(2), after)


# GradScaler on the CPU


@every_set
def test_scaled_gradients_give_the_same_steps(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint
) -> None:
    """Fails when a step takes scaled gradients, or clipping after ``unscale_`` is of scaled ones.

    The scale is a power of two, which rounds nothing.
    """
    plain, scaled = (Problem(info, options, constraint) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for _ in range(4):
        plain.loss()
        nn.utils.clip_grad_norm_(plain.parameters, 0.5)
        plain.optimizer.step()

        scaled.optimizer.zero_grad()
        loss = (scaled.weight.mv(scaled.input) + scaled.bias - 1).pow(2).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(scaled.optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters, 0.5)
        scaler.step(scaled.optimizer)
        scaler.update()
        assert_same([p.data for p in scaled.parameters], [p.data for p in plain.parameters])
    assert scaler.get_scale() == 2.0**14


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@every_set
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, bad: float
) -> None:
    """Fails when such a step moves parameters or momentum, or the next one is taken with the old scale."""
    problem = Problem(info, options, constraint)
    problem.train(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights = [p.detach().clone() for p in problem.parameters]
    state = copy.deepcopy(problem.optimizer.state_dict())
    for p in problem.parameters:
        p.grad = scaler.scale(torch.ones_like(p))
    problem.bias.grad[0] = bad
    assert scaler.step(problem.optimizer) is None
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same([p.data for p in problem.parameters], weights)
    assert_same(problem.optimizer.state_dict(), state)

    expected = copy.deepcopy(problem)
    for p in problem.parameters:
        p.grad = scaler.scale(torch.ones_like(p))
    scaler.step(problem.optimizer)
    for p in expected.parameters:
        p.grad = torch.ones_like(p)
    expected.optimizer.step()
    assert_same([p.data for p in problem.parameters], [p.data for p in expected.parameters])
