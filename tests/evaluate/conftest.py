"""One small trained run for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sfw_dist.config import Config
from sfw_dist.models import build_model
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.support.training import ONE_PROCESS, small_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunFolder:
    """The run; four epochs of a small network on the digits."""
    config = small_config(tmp_path_factory.mktemp("runs"), digits, epochs=4)
    config.schedule.dynamic = False
    config.schedule.milestones = [0.9]
    assert train(config, ONE_PROCESS) == 0
    return RunFolder(config.run_dir)


@pytest.fixture
def run(trained: RunFolder) -> RunFolder:
    """The run without results: its ``prune`` folder is deleted, as one does to measure again."""
    shutil.rmtree(trained.prune, ignore_errors=True)
    return trained


def trained_model(run: RunFolder, config: Config) -> torch.nn.Module:
    """The run's network with its final weights."""
    model = build_model("cnn", num_classes=10, in_channels=1, width=config.model.width)
    model.load_state_dict(run.load_weights())
    return model.eval()
