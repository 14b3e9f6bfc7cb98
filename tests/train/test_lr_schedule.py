"""Learning-rate rules: when rates change, by how much, and that a resumed schedule goes on as if never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Literal

import pytest
import torch
from torch import nn
from torch.optim import SGD

from sfw_dist.config import Config, OptimizerConfig, ScheduleConfig
from sfw_dist.distributed.world import World
from sfw_dist.train.lr_schedule import DynamicRate, LRSchedule
from sfw_dist.train.strategies.ddp import DDPStrategy

LONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
FLAT = 1.0
"""A loss for tests of rules that do not look at it."""


def optimizer(lr: float = 1.0) -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(config: ScheduleConfig, losses: Iterable[float], epochs: int) -> list[float]:
    """The rate that each epoch trains with, the first before any loss is known."""
    sgd = optimizer()
    schedule = LRSchedule(sgd, config, epochs)
    used = []
    for loss in losses:
        used.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step(loss)
    return used


def factors(losses: Iterable[float]) -> list[float]:
    """What the dynamic rule multiplies the rate by after each loss."""
    sgd = optimizer()
    rule = DynamicRate(sgd)
    found = []
    for loss in losses:
        sgd.param_groups[0]["lr"] = 1.0
        rule.step(loss)
        found.append(sgd.param_groups[0]["lr"])
    return found


def test_steps_divide_the_rate_by_ten_after_a_third_and_two_thirds() -> None:
    """Fails when a milestone of 180 epochs falls one epoch early or late, or the rate is not divided by 10."""
    used = rates(ScheduleConfig(dynamic=False), [FLAT] * 180, epochs=180)
    assert used == pytest.approx([1.0] * 60 + [0.1] * 60 + [0.01] * 60)


def test_no_milestone_comes_before_the_first_epoch() -> None:
    """Fails when a short run's first milestone rounds to 0, and its first epoch trains with a tenth of the rate."""
    assert rates(ScheduleConfig(dynamic=False), [FLAT], epochs=1) == [1.0]


def test_milestones_that_fall_together_all_count() -> None:
    """Fails when two milestones rounded to one epoch multiply the rate once."""
    config = ScheduleConfig(milestones=[0.24, 0.26], gamma=0.5, dynamic=False)
    assert rates(config, [FLAT] * 4, epochs=4) == [1.0, 0.25, 0.25, 0.25]


def test_cosine_falls_to_almost_nothing() -> None:
    """Fails when the cosine has another period than the training."""
    used = rates(ScheduleConfig(kind="cosine", dynamic=False), [FLAT] * 50, epochs=50)
    assert used == pytest.approx([(1 + math.cos(math.pi * epoch / 50)) / 2 for epoch in range(50)])
    assert 0 < used[-1] < 0.01


def test_constant_keeps_the_rate() -> None:
    """Fails when torch's ConstantLR is left with its own factor of 1/3."""
    assert rates(ScheduleConfig(kind="constant", dynamic=False), [FLAT] * 20, epochs=20) == [1.0] * 20


def test_the_dynamic_rule_waits_for_ten_epochs() -> None:
    """Fails when the rule acts on a shorter record, however wild."""
    assert factors([1, 9, 1, 9, 1, 9, 9, 9, 9, 99]) == [1.0] * 9 + [0.7]


@pytest.mark.parametrize(
    ("losses", "factor"),
    [
        (range(12, 0, -1), 1.06),
        (range(1, 13), 0.7),
        ([0.1] * 12, 1.0),
        ([3, 1, 2, 2, 2] * 3, 1.0),
    ],
    ids=["falling", "rising", "equal", "equal means"],
)
def test_the_dynamic_rule_raises_a_falling_loss_rate_and_lowers_a_rising_one(
    losses: Iterable[float], factor: float
) -> None:
    """Fails when the factors are wrong or swapped, or rounding decides between equal means."""
    assert set(factors(losses)[9:]) == {factor}


def test_the_dynamic_rule_counts_the_newest_epoch() -> None:
    """Fails when the newest loss enters one epoch late: all before it fall, it alone makes the mean rise."""
    assert factors([*range(10, 0, -1), 100])[-2:] == [1.06, 0.7]


def test_the_dynamic_rule_forgets_what_is_older_than_ten_epochs() -> None:
    """Fails when the mean is over all epochs: the first loss would outweigh the present rise."""
    assert factors([1000, *range(1, 11)])[-1] == 0.7


def test_the_dynamic_rule_and_milestones_multiply() -> None:
    """Fails when one rule overwrites the other's rate."""
    config = ScheduleConfig(kind="steps", milestones=[0.5], dynamic=True)
    used = rates(config, range(30, 10, -1), epochs=20)
    expected = [1.06 ** max(0, epoch - 9) * (0.1 if epoch >= 10 else 1.0) for epoch in range(20)]
    assert used == pytest.approx(expected)


EPOCHS = 24
LOSSES = [abs(math.sin(3 * epoch)) for epoch in range(EPOCHS)]


class Run:
    """The parts of a training that hold learning rates."""

    def __init__(self, config: ScheduleConfig) -> None:
        sfw = OptimizerConfig(lr=1.0, unconstrained="norm_and_bias", unconstrained_lr=0.05)
        self.engine = DDPStrategy(nn.Linear(4, 3), Config(name="x", optimizer=sfw), LONE)
        self.schedule = LRSchedule(self.engine.optimizer, config, EPOCHS)

    def rates(self, first_epoch: int = 0) -> list[list[float]]:
        """The rates of all groups in each epoch from ``first_epoch`` to the last."""
        return [self.epoch(loss) for loss in LOSSES[first_epoch:]]

    def epoch(self, loss: float) -> list[float]:
        used = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.schedule.step(loss)
        return used

    def saved(self) -> str:
        return json.dumps([self.engine.options(), self.schedule.state_dict()], allow_nan=False)

    def restore(self, saved: str) -> None:
        options, state = json.loads(saved)
        self.engine.load(self.engine.tensors(), options, source="test")
        self.schedule.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # no step is taken between epochs
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["steps", "cosine", "constant"])
def test_a_schedule_restored_from_json_continues_the_same_rates(
    kind: Literal["steps", "cosine", "constant"], dynamic: bool
) -> None:
    """Fails when a resumed run trains any later epoch with another rate than an uninterrupted one."""
    config = ScheduleConfig(kind=kind, dynamic=dynamic)
    uninterrupted = Run(config).rates()
    assert uninterrupted[0] == [1.0, 0.05]
    before = Run(config)
    for epoch in range(EPOCHS):
        resumed = Run(config)
        resumed.restore(before.saved())
        assert resumed.rates(epoch) == uninterrupted[epoch:], f"restored before epoch {epoch + 1}"
        before.epoch(LOSSES[epoch])
