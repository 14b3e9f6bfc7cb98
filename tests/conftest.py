"""What all tests share: repeatable property tests, the mark of slow tests, process-wide state that is restored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sfw_dist.data.prepare import prepare

SLOW = (
    *("evaluate", "examples", "experiments", "launch", "multiprocess", "packaging", "slurm"),
    *("data/test_backend.py", "data/test_ffcv.py", "data/test_image_sets.py", "optim/test_kernels_cuda.py"),
    *("train/test_init_stage.py", "train/test_k_schedule.py", "train/test_sparse_training.py"),
    *("train/test_networks.py", "train/test_strategies.py", "train/test_trainer.py"),
)
"""Folders and files of tests that start processes, compile kernels or train for long, for ``make test-quick``."""

# Two threads that wait for each other by spinning make a busy machine fifty times slower.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test-quick`` leaves out, and say which tests one process runs (``pytest -n``).

    Those of a file share what it starts, and those of tests/slurm one cluster. They come first, because they take the
    longest.
    """
    folder = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(folder / part) for part in SLOW):
            item.add_marker(pytest.mark.slow)
        on_slurm = item.path.is_relative_to(folder / "slurm")
        item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else str(item.path.relative_to(folder))))
    items.sort(
        key=lambda item: (not item.path.is_relative_to(folder / "slurm"), item.get_closest_marker("slow") is None)
    )


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Every test starts from the same random state and thread count, so that their order does not matter."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder that holds the prepared digits."""
    root = tmp_path_factory.mktemp("data")
    prepare("digits", root)
    return root
