"""A real Slurm of two nodes with four CPUs each, for the session; skipped where Slurm is not installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.on_slurm import Site, local_cluster, started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="Slurm is not installed: make slurm-packages"))


def site(tmp_path_factory: pytest.TempPathFactory, data: Path, *options: str) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    try:
        yield Site(started(folder / "cluster", *options), folder, data)
    finally:
        local_cluster("down", folder / "cluster")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Site]:
    """With accounting."""
    yield from site(tmp_path_factory, digits, "--nodes", "2", "--cpus", "4")


@pytest.fixture
def bare_cluster(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Site]:
    """Without accounting, and with arrays of at most two tasks."""
    yield from site(tmp_path_factory, digits, "--nodes", "2", "--cpus", "4", "--no-accounting", "--max-array-size", "3")
