"""What all tests share: bounded, repeatable property tests, and process-wide state that no test leaves changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

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
