"""K over the epochs: which K when, sets of one diameter, a network that stays in them, and the same run resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sfw_dist.config import Config, ConstraintConfig, KScheduleConfig, OptimizerConfig
from sfw_dist.constraints import KSparsePolytope
from sfw_dist.errors import UserError
from sfw_dist.train.k_schedule import KSchedule, k_frac
from sfw_dist.train.strategies import Strategy, build_strategy
from tests.support.training import ONE_PROCESS

EPOCHS = 6


def config(
    start: float, final: float, *, kind: Any = "linear", end: float = 0.5, chosen: Any = "k_sparse", **options: Any
) -> OptimizerConfig:
    return OptimizerConfig(
        lr=0.3,
        constraint=ConstraintConfig(set=chosen, k_frac=final, k_min=1, tau=1.0),
        k_schedule=KScheduleConfig(kind=kind, start=start, end=end),
        **options,
    )


class Run:
    """A small network, trained on made-up gradients."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        network = nn.Sequential(nn.Linear(20, 15), nn.BatchNorm1d(15), nn.Linear(15, 4))
        self.engine: Strategy = build_strategy(network, Config(name="x", optimizer=optimizer), ONE_PROCESS)
        self.schedule = KSchedule(self.engine.optimizer, optimizer, EPOCHS)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Those with a K."""
        return [group for group in self.engine.optimizer.param_groups if hasattr(group["constraint"], "k")]

    def epoch(self, epoch: int) -> None:
        self.schedule.begin_epoch(epoch)
        self.steps(epoch)

    def steps(self, seed: int, count: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for parameter in self.engine.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.engine.optimizer.step()

    def saved(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        return {name: tensor.clone() for name, tensor in self.engine.tensors().items()}, self.engine.options()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [0.01] * 6),
        ("linear", [0.16, 0.11, 0.06, 0.01, 0.01, 0.01]),
        ("geometric", [0.16, 0.16 ** (2 / 3) * 0.01 ** (1 / 3), 0.16 ** (1 / 3) * 0.01 ** (2 / 3), 0.01, 0.01, 0.01]),
        ("cosine", [0.16, 0.1225, 0.0475, 0.01, 0.01, 0.01]),
    ],
)
def test_k_goes_from_start_to_k_frac_by_the_end(kind: Any, expected: list[float]) -> None:
    """Fails when the way or its length is another, or the last epochs train with a K that is not the one wanted."""
    schedule = KScheduleConfig(kind=kind, start=0.16, end=0.5)
    assert [k_frac(schedule, 0.01, epoch, EPOCHS) for epoch in range(EPOCHS)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "geometric", "cosine"])
def test_k_frac_is_reached_in_the_last_epoch_at_latest(kind: Any) -> None:
    """Fails when end: 1 leaves a K that no epoch had asked for."""
    assert k_frac(KScheduleConfig(kind=kind, start=0.001, end=1.0), 0.05, EPOCHS - 1, EPOCHS) == 0.05
    assert k_frac(KScheduleConfig(kind=kind, start=0.001, end=1.0), 0.05, EPOCHS - 2, EPOCHS) < 0.05


@pytest.mark.parametrize("name", ["sfw", "adagrad_sfw"])
@pytest.mark.parametrize("chosen", ["k_sparse", "k_support"])
@pytest.mark.parametrize(("start", "final"), [(0.5, 0.02), (0.02, 0.5)], ids=["to sparse", "to dense"])
def test_the_network_stays_in_sets_of_one_diameter(start: float, final: float, chosen: Any, name: Any) -> None:
    """Fails when the radius does not follow K, or a tensor that a set has left behind is not brought in."""
    run = Run(config(start, final, chosen=chosen, name=name, unconstrained="norm_and_bias"))
    sizes = [group["params"][0].numel() for group in run.groups]
    diameters = [group["constraint"].diameter(n) for group, n in zip(run.groups, sizes, strict=True)]
    first = [group["constraint"].support(n) for group, n in zip(run.groups, sizes, strict=True)]
    assert first == [int(start * n) for n in sizes], "the first weights would be scaled into two sets"
    seen = []
    for epoch in range(EPOCHS):
        run.schedule.begin_epoch(epoch)
        for when in ("changed", "stepped"):
            for group, n, diameter in zip(run.groups, sizes, diameters, strict=True):
                assert group["constraint"].diameter(n) == pytest.approx(diameter, rel=1e-12)
                assert float(group["constraint"].gauge(group["params"][0].detach())) <= 1 + 1e-6, when
            run.steps(epoch)
        seen.append([group["constraint"].support(n) for group, n in zip(run.groups, sizes, strict=True)])
    fractions = [run.schedule.k_frac(epoch) for epoch in range(EPOCHS)]
    assert seen == [[max(1, int(fraction * n)) for n in sizes] for fraction in fractions]
    assert len(sizes) == 2 and seen[0] != seen[-1] == seen[-2]


def test_polytopes_of_one_diameter_are_not_nested() -> None:
    """Fails when a vertex of one set lies in another: then nothing would have to be scaled at a change."""
    few, many = KSparsePolytope(k=4, diameter=2.0), KSparsePolytope(k=36, diameter=2.0)
    x = torch.randn(100)
    assert float(many.gauge(few.lmo(x))) == pytest.approx(3.0)
    assert float(few.gauge(many.lmo(x))) == pytest.approx(3.0)


def test_momentum_goes_on_when_k_changes() -> None:
    """Fails when a new set starts the momentum anew, and each epoch's first step follows one batch alone."""
    run = Run(config(0.5, 0.02))
    run.epoch(0)
    before = [run.engine.optimizer.state[g["params"][0]]["momentum_buffer"].clone() for g in run.groups]
    run.schedule.begin_epoch(1)
    after = [run.engine.optimizer.state[g["params"][0]]["momentum_buffer"] for g in run.groups]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["sfw", "adagrad_sfw"])
@pytest.mark.parametrize(("start", "final"), [(0.5, 0.02), (0.02, 0.5)], ids=["to sparse", "to dense"])
@pytest.mark.parametrize("halves", [1, 2], ids=["before an epoch", "within it"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(start: float, final: float, name: Any, halves: int) -> None:
    """Fails when a restored set differs in its last bit, or a tensor is scaled a second time in the same epoch."""
    torch.manual_seed(0)
    run = Run(config(start, final, name=name))
    stops = {}
    for epoch in range(EPOCHS):
        if halves == 1:
            stops[epoch] = run.saved()
        run.schedule.begin_epoch(epoch)
        run.steps(epoch)
        if halves == 2:
            stops[epoch] = run.saved()
        run.steps(100 + epoch)
    expected = run.saved()
    for stop in range(EPOCHS):
        resumed = Run(config(start, final, name=name))
        resumed.engine.load(*stops[stop], source="test")
        for epoch in range(stop, EPOCHS):
            resumed.schedule.begin_epoch(epoch)
            if halves == 1 or epoch > stop:
                resumed.steps(epoch)
            resumed.steps(100 + epoch)
        tensors, options = resumed.saved()
        assert options == expected[1] and all(torch.equal(tensors[name], t) for name, t in expected[0].items()), stop


def test_without_a_schedule_the_sets_stay_as_they_are() -> None:
    """Fails when a plain run's sets are remade, and its plan with them."""
    run = Run(config(0.2, 0.02, kind="none"))
    before = [group["constraint"] for group in run.groups]
    run.schedule.begin_epoch(3)
    assert not run.schedule.changes
    assert all(group["constraint"] is old for group, old in zip(run.groups, before, strict=True))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: KScheduleConfig(start=0.0), ("optimizer.k_schedule.start", "0.0", "write 0.2")),
        (lambda: KScheduleConfig(end=1.5), ("optimizer.k_schedule.end", "1.5", "write 0.5")),
        (lambda: config(0.5, 0.1, chosen="lp"), ("optimizer.constraint.set", "lp", "k_schedule.kind: linear")),
        (lambda: config(0.5, 0.1, name="sgd"), ("optimizer.name", "sgd", "k_schedule.kind: none")),
        (
            lambda: OptimizerConfig(constraint=ConstraintConfig(radius=1.0), k_schedule=KScheduleConfig(kind="cosine")),
            ("optimizer.constraint.radius", "1.0", "write diameter or tau"),
        ),
        (
            lambda: Config(name="x", engine="deepspeed", optimizer=config(0.5, 0.1)),
            ("optimizer.k_schedule.kind", "linear", "engine: ddp or fsdp"),
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(make: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said


def test_groups_with_several_sets_need_no_schedule() -> None:
    """DeepSpeed's param groups have a tuple of sets; fails when no training with it begins."""
    run = Run(OptimizerConfig(lr=0.3))
    run.engine.optimizer.merge_param_groups()  # type: ignore[operator]
    schedule = KSchedule(run.engine.optimizer, OptimizerConfig(lr=0.3), EPOCHS)
    schedule.begin_epoch(1)
    assert not schedule.changes
