"""What the tests of loaders share: the backends, epochs as lists, and a guard against hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from sfw_dist.data.loading import Loader

try:
    import sfw_dist.data.loading.ffcv  # noqa: F401
except (ImportError, OSError):
    ffcv_missing = True
else:
    ffcv_missing = False


BackendName = Literal["ffcv", "ram", "gpu", "folder"]


needs_ffcv = pytest.mark.skipif(ffcv_missing, reason="FFCV cannot be imported")


SLOW_FFCV = (needs_ffcv, pytest.mark.slow)
"""For parameters: FFCV compiles its pipeline for seconds."""
BACKENDS = [pytest.param("ffcv", marks=SLOW_FFCV), "ram"]


AUGMENTATIONS = [
    {"crop_padding": 2, "flip": True, "cutout": 3},
    {"crop_padding": 0, "random_resized_crop": 0.2, "flip": True},
]


def epoch_of(loader: Loader, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def within(seconds: float, act: Callable[[], object]) -> None:
    """Run ``act`` in a thread and fail, instead of hanging the suite, when it does not return."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if outcome:
        raise outcome[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
