"""Every scheduler of ``torch.optim.lr_scheduler`` moves our optimizers' groups as it moves those of torch's SGD."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained

pytestmark = pytest.mark.filterwarnings("ignore:no param group has a constraint")
KINDS = (SFW, ProjectedSGD, AdaGradSFW)
STEPS = 12
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=[0.01, 0.02], max_lr=[0.1, 0.2], step_size_up=3),
    "CyclicLR of the rate alone": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5, cooldown=1, min_lr=[1e-3, 1e-2]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=STEPS - 3)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.2], anneal_epochs=4),
}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def optimizer_of(kind: type[Optimizer], *, constrained: bool = True) -> Optimizer:
    """Two groups, each with a learning rate and a momentum of its own."""
    weight, bias = parameters()
    groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "lr": 0.5, "momentum": 0.8}]
    if kind is not SGD and constrained:
        groups[0]["constraint"] = LpBall(2, radius=9.0) if kind is ProjectedSGD else KSparsePolytope(k=3, radius=9.0)
    return kind(groups, lr=0.1, momentum=0.9)  # type: ignore[call-arg]


def step(optimizer: Optimizer, schedule: Any, number: int) -> list[Tensor]:
    """One step, then the schedule's; the parameters afterwards."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = (torch.arange(p.numel()).float() + number).cos().reshape(p.shape)
    optimizer.step()
    loss = (3.0, 2.0, 2.5, 2.5, 2.4, 2.3, 1.0)[number % 7]
    schedule.step(*([loss] if isinstance(schedule, ReduceLROnPlateau) else []))
    return [p.detach().clone() for p in params]


def options(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(float(group["lr"]), float(group["momentum"])) for group in optimizer.param_groups]


def test_no_scheduler_of_torch_is_left_out() -> None:
    """Fails when torch gets a scheduler that is not tried here."""
    public = (getattr(lr_scheduler, name) for name in lr_scheduler.__all__)
    known = {kind.__name__ for kind in public if inspect.isclass(kind) and kind is not LRScheduler}
    assert {*known, "SWALR"} == {name.split(" ")[0] for name in SCHEDULERS}


@every_scheduler
@every_kind
def test_each_step_has_the_options_that_sgd_gets(kind: type[Optimizer], name: str) -> None:
    """Fails when a scheduler misses a group, or the step before it undoes what it wrote."""
    ours, theirs = optimizer_of(kind), optimizer_of(SGD)
    schedules = [SCHEDULERS[name](optimizer) for optimizer in (ours, theirs)]
    seen = [options(theirs)]
    assert options(ours) == seen[0]
    for number in range(STEPS):
        step(ours, schedules[0], number)
        step(theirs, schedules[1], number)
        seen.append(options(theirs))
        assert options(ours) == seen[-1]
        if hasattr(schedules[0], "get_last_lr"):
            assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert len(set(map(tuple, seen))) > 1, "the schedule moved nothing: the test shows nothing"


@every_scheduler
@every_kind
def test_without_a_set_scheduled_steps_are_those_of_sgd(kind: type[Optimizer], name: str) -> None:
    """Fails when a step takes a learning rate or momentum of the step before."""
    ours, theirs = optimizer_of(kind, constrained=False), optimizer_of(SGD)
    schedules = [SCHEDULERS[name](optimizer) for optimizer in (ours, theirs)]
    for number in range(STEPS):
        for actual, expected in zip(step(ours, schedules[0], number), step(theirs, schedules[1], number), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@every_scheduler
@every_kind
def test_a_schedule_resumes_from_its_state(kind: type[Optimizer], name: str) -> None:
    """Fails when a resumed run has other learning rates, momenta or weights than one that went on."""
    whole = optimizer_of(kind)
    schedule = SCHEDULERS[name](whole)
    for number in range(5):
        step(whole, schedule, number)
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = optimizer_of(kind)
    for group, other in zip(resumed.param_groups, whole.param_groups, strict=True):
        group["params"][0].data.copy_(other["params"][0])
    again = SCHEDULERS[name](resumed)
    resumed.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["schedule"])
    for number in range(5, STEPS):
        for actual, expected in zip(step(resumed, again, number), step(whole, schedule, number), strict=True):
            assert torch.equal(actual, expected)
        assert options(resumed) == options(whole)


@every_kind
def test_schedulers_that_follow_one_another_on_one_optimizer(kind: type[Optimizer]) -> None:
    """Fails when a second scheduler starts from other rates than the first has left, or ``initial_lr`` is lost."""
    ours, theirs = optimizer_of(kind), optimizer_of(SGD)
    for optimizer in (ours, theirs):
        first, second = SCHEDULERS["ExponentialLR"](optimizer), SCHEDULERS["CosineAnnealingLR"](optimizer)
        for number in range(4):
            step(optimizer, first, number)
        for number in range(4):
            step(optimizer, second, number)
    assert options(ours) == options(theirs)
    assert [group["initial_lr"] for group in ours.param_groups] == [0.1, 0.5]


@every_kind
def test_a_scheduled_learning_rate_may_be_a_tensor(kind: type[Optimizer]) -> None:
    """Fails when a scheduler that fills a tensor in place is not followed."""
    numbers, tensors = optimizer_of(kind), optimizer_of(kind)
    for group in tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    schedules = [SCHEDULERS["StepLR"](optimizer) for optimizer in (numbers, tensors)]
    for number in range(STEPS):
        for actual, expected in zip(
            step(tensors, schedules[1], number), step(numbers, schedules[0], number), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert all(isinstance(group["lr"], Tensor) for group in tensors.param_groups)


@every_kind
def test_the_order_of_step_and_schedule_is_noticed(kind: type[Optimizer]) -> None:
    """Fails when torch warns of the right order, or does not of the wrong one: it watches ``optimizer.step``."""
    optimizer = optimizer_of(kind)
    schedule = SCHEDULERS["StepLR"](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, schedule, 0)
    optimizer = optimizer_of(kind)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        SCHEDULERS["StepLR"](optimizer).step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@every_kind
def test_a_scheduled_optimizer_can_be_copied(kind: type[Optimizer], duplicate: Callable[[Any], Any]) -> None:
    """Fails when a copy of both steps the original, or with its learning rate."""
    optimizer = optimizer_of(kind)
    schedule = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    step(optimizer, schedule, 0)
    twin, its_schedule = duplicate((optimizer, schedule))
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    after = step(twin, its_schedule, 1)
    assert options(twin) == [(0.025, 0.9), (0.125, 0.8)]
    assert options(optimizer) == [(0.05, 0.9), (0.25, 0.8)]
    assert all(torch.equal(p, old) for p, old in zip(_all(optimizer), before, strict=True))
    assert all(torch.equal(p, new) for p, new in zip(step(optimizer, schedule, 1), after, strict=True))


def _all(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@every_kind
def test_a_group_that_joins_a_scheduled_optimizer_has_its_own_rate(kind: type[Optimizer]) -> None:
    """Fails when add_param_group beside a scheduler loses the option that the next scheduler starts from."""
    optimizer = optimizer_of(kind)
    schedule = SCHEDULERS["StepLR"](optimizer)
    for number in range(3):
        step(optimizer, schedule, number)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.3, "constraint": Unconstrained()})
    assert [lr for lr, _ in options(optimizer)] == [0.05, 0.25, 0.3]
    later = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    assert later.base_lrs == [0.1, 0.5, 0.3]
