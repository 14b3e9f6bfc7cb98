"""A small training run for the tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfw_dist.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from sfw_dist.distributed import World

ONE_PROCESS = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def small_config(runs: Path, data_root: Path, name: str = "small", *, epochs: int = 2, **optimizer: Any) -> Config:
    """Ten steps an epoch on digits with a network of a few hundred weights."""
    return Config(
        name=name,
        runs_dir=str(runs),
        data=DataConfig(name="digits", root=str(data_root), backend="torch", batch_size=120, crop_padding=1),
        model=ModelConfig(name="cnn", width=0.0625),
        optimizer=OptimizerConfig(**optimizer),
        schedule=ScheduleConfig(dynamic=True),
        train=TrainConfig(epochs=epochs, log_every=4),
    )
