"""A small run for the tests that launch one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfw_dist.config import save_config
from sfw_dist.train.run_folder import RunFolder
from tests.support.training import small_config


@pytest.fixture
def file(tmp_path: Path, digits: Path) -> Path:
    config = small_config(tmp_path / "runs", digits, "here", epochs=1)
    path = tmp_path / "here.yaml"
    path.write_text(save_config(config))
    return path


@pytest.fixture
def run(file: Path) -> RunFolder:
    return RunFolder(file.parent / "runs" / "here")
