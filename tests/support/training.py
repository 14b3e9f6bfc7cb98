"""A small training run for the tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfw_dist.config import (
    Config,
    ConstraintConfig,
    DataConfig,
    GMPConfig,
    KScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from sfw_dist.distributed.world import World

ONE_PROCESS = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def small_config(runs: Path, data_root: Path, name: str = "small", *, epochs: int = 2, **optimizer: Any) -> Config:
    """Ten steps an epoch on digits with a network of a few hundred weights."""
    return Config(
        name=name,
        runs_dir=str(runs),
        data=DataConfig(name="digits", root=str(data_root), backend="ram", batch_size=120, crop_padding=1),
        model=ModelConfig(name="cnn", width=0.0625),
        optimizer=OptimizerConfig(**optimizer),
        schedule=ScheduleConfig(dynamic=True),
        train=TrainConfig(epochs=epochs, log_every=4),
    )


def baselines() -> dict[str, dict[str, Any]]:
    """Fields of a small configuration for each baseline and sparse-training method, by name."""
    sgd = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.01)
    ball = ConstraintConfig(set="lp", p=2.0, tau=15.0)
    return {
        "adagrad_sfw": {"optimizer": OptimizerConfig(name="adagrad_sfw", lr=0.01)},
        "projected_sgd": {"optimizer": OptimizerConfig(name="projected_sgd", lr=0.1, constraint=ball)},
        "k_schedule": {"optimizer": OptimizerConfig(lr=0.3, k_schedule=KScheduleConfig(kind="geometric", end=1.0))},
        "gmp": {"optimizer": sgd, "method": "gmp", "gmp": GMPConfig(end=0.6, every=3)},
        "cram": {"optimizer": sgd, "method": "cram"},
        "sampled": {"optimizer": OptimizerConfig(lr=0.3), "method": "sampled"},
        "cram_sfw": {"optimizer": OptimizerConfig(lr=0.3), "method": "cram"},
    }
