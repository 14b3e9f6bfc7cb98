"""What all tests share: bounded, repeatable property tests, and process-wide state that no test leaves changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sfw_dist.data.prepare import prepare

# Two threads that wait for each other by spinning make a busy machine fifty times slower.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Every test starts from one random state, and its thread count ends with it: their order does not matter."""
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
