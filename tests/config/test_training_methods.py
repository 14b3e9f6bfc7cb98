"""Fields of SFW-Init and the sparse-training methods, and what they may be combined with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from sfw_dist.config import (
    Config,
    ConstraintConfig,
    CramConfig,
    GMPConfig,
    InitConfig,
    KScheduleConfig,
    OptimizerConfig,
    SampledConfig,
)
from sfw_dist.errors import UserError


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"init": {"steps": -1}}, ["init.steps", "-1", "390"]),
        ({"init": {"kappa": 0.0}}, ["init.kappa", "0.0", "0.001"]),
        ({"init": {"floor": 1.0}}, ["init.floor", "1.0", "0.01"]),
        ({"optimizer": {"name": "sgd"}}, ["init.steps", "10", "sgd"]),
        ({"optimizer": {"k_schedule": KScheduleConfig(kind="linear")}}, ["k_schedule", "linear", "init.steps"]),
    ],
    ids=str,
)
def test_settings_of_sfw_init_are_checked(options: dict[str, dict[str, Any]], parts: list[str]) -> None:
    """Fails when a setting that does nothing, or cannot be, is taken."""
    with pytest.raises(UserError) as raised:
        init = InitConfig(**{"steps": 10, **options.get("init", {})})
        Config(name="a", init=init, optimizer=OptimizerConfig(**options.get("optimizer", {})))
    assert "\n" not in str(raised.value) and all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GMPConfig(sparsity=1.0), ("gmp.sparsity", "1.0", "write 0.9")),
        (lambda: GMPConfig(initial=0.95), ("gmp.initial", "0.95", "write 0")),
        (lambda: GMPConfig(begin=-0.1), ("gmp.begin", "-0.1", "write 0.1")),
        (lambda: GMPConfig(begin=0.8), ("gmp.end", "0.7", "write 0.7, and gmp.begin 0.1")),
        (lambda: GMPConfig(every=0), ("gmp.every", "0", "write 100")),
        (lambda: CramConfig(rho=-1), ("cram.rho", "-1", "write 0.05")),
        (lambda: CramConfig(rho=math.nan), ("cram.rho", "nan", "write 0.05")),
        (lambda: CramConfig(sparsities=[]), ("cram.sparsities", "[]", "write [0.5")),
        (lambda: SampledConfig([0.0, 1.0]), ("sampled.sparsities", "1.0", "write 0.9")),
        (lambda: SampledConfig([0.5, 0.9]), ("sampled.sparsities", "[0.5, 0.9]", "with 0", "write [0.0, 0.5")),
        (lambda: CramConfig(sparsities=[0.5, 90]), ("cram.sparsities", "90", "write 0.9")),
        (lambda: Config(name="x", method="gmp"), ("optimizer.name", "sfw", "sgd with method: gmp")),
        (
            lambda: Config(name="x", method="cram", optimizer=OptimizerConfig(grads="reduce_to_owner")),
            ("optimizer.grads", "reduce_to_owner", "all_reduce with method: cram"),
        ),
        (lambda: Config(name="x", engine="fsdp", method="cram"), ("method", "cram", "engine: ddp")),
        (
            lambda: Config(name="x", engine="fsdp", optimizer=OptimizerConfig(name="adagrad_sfw")),
            ("optimizer.name", "adagrad_sfw", "write engine: ddp"),
        ),
        (
            lambda: OptimizerConfig(name="projected_sgd"),
            ("optimizer.constraint.set", "k_sparse", "write set: lp and p: 2"),
        ),
        (
            lambda: OptimizerConfig(name="projected_sgd", constraint=ConstraintConfig(set="lp", p=3.0)),
            ("optimizer.constraint.set", "lp (LpBall(p=3.0", "write set: lp and p: 2"),
        ),
        (lambda: OptimizerConfig(name="sgd", grads="reduce_to_owner"), ("optimizer.grads", "without sfw")),
    ],
)
def test_what_does_not_go_together_is_one_line(make: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said
