"""A loader: resuming, samples that cannot be loaded, stalls."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfw_dist.config import DataConfig
from sfw_dist.data.loading import open_loader
from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.loading.loader import ShardedLoader
from sfw_dist.data.prepare import prepare
from sfw_dist.data.sampler import EvaluationSampler, Ids
from sfw_dist.errors import RankError, UserError
from tests.support.downloads import one_line
from tests.support.loaders import BACKENDS, BackendName, epoch_of, same, within
from tests.support.raw_data import images_of


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_in_the_middle_is_bitwise(config: DataConfig, backend: BackendName) -> None:
    """After a preemption samples come twice or never, or with other pixels."""
    config = replace(config, backend=backend)
    loader = open_loader(config, "train", seed=1)
    whole = epoch_of(loader, 3)
    loader.set_epoch(3)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    assert state == {"epoch": 3, "batch": 5}
    loader.close()

    resumed = open_loader(config, "train", seed=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(3)  # as a training loop does before each epoch
    assert same(list(resumed), whole[5:])
    assert same(list(resumed), whole)  # the place holds for one iteration
    assert same(epoch_of(resumed, 4), epoch_of(open_loader(replace(config, backend="ram"), "train", seed=1), 4))
    resumed.close()


def test_resume_at_the_end_of_an_epoch_yields_nothing_more(config: DataConfig) -> None:
    """A checkpoint after the last step of an epoch, and the resumed run trains that epoch again."""
    loader = open_loader(config, "train", seed=1)
    epoch_of(loader, 3)
    resumed = open_loader(config, "train", seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert epoch_of(resumed, 3) == []
    assert len(epoch_of(resumed, 4)) == 12


class Recorder:
    """A backend that notes what is asked of it, and fails for the ids in ``bad``."""

    threaded = False

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.asked: list[int] = []
        self.bad = bad

    def fetch(self, ids: Ids, params: SampleParams) -> tuple[Tensor, Tensor]:
        self.asked += ids.tolist()
        if set(ids.tolist()) & set(self.bad):
            raise ValueError("broken\ndata stream")
        return torch.zeros(len(ids), 1, 1, 1, dtype=torch.uint8), torch.from_numpy(ids)

    def close(self) -> None: ...


def recorded(backend: Recorder, **options: Any) -> ShardedLoader:
    """Ten samples, in batches of two."""
    sampler = EvaluationSampler(np.arange(10), 2, 0, 1)
    params = partial(np.zeros, dtype=np.int64)
    return ShardedLoader(
        backend, sampler, sample_params=lambda ids, epoch: params((len(ids), 8)), name=lambda i: f"s{i}", **options
    )


def test_resume_fetches_only_what_is_left() -> None:
    """Resuming late in an epoch of ImageNet decodes all of it first."""
    backend = Recorder()
    loader = recorded(backend)
    loader.load_state_dict({"epoch": 0, "batch": 3})
    list(loader)
    assert backend.asked == [6, 7, 8, 9]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_sample_that_cannot_be_loaded_is_named(threads: int) -> None:
    """One bad image among a million ends the run, and the message does not say which; or the run hangs."""
    loader = recorded(Recorder(bad=(5, 7)), threads=threads)
    labels: list[int] = []
    with pytest.raises(RankError, match=r"s5 cannot be loaded \(ValueError: broken data stream\)") as error:
        within(60, lambda: labels.extend(int(label) for _, batch in loader for label in batch))
    assert labels == [0, 1, 2, 3] and "\n" not in str(error.value)


def test_a_stall_is_an_error_that_names_the_place() -> None:
    """A file system that hangs: the run waits for ever, on all nodes, at full price."""
    hang = threading.Event()

    class Stuck(Recorder):
        def fetch(self, ids: Ids, params: SampleParams) -> tuple[Tensor, Tensor]:
            if 4 in ids:
                hang.wait()
            return super().fetch(ids, params)

    loader = recorded(Stuck(), threads=2, stall_timeout=0.2, description="folder, 2 threads")
    try:
        with pytest.raises(RankError, match=r"no batch for 0.2 s .* from s4 on \(folder, 2 threads\).*stall_timeout"):
            within(60, lambda: list(loader))
    finally:
        hang.set()


@pytest.mark.parametrize("batch", [13, -1])
def test_a_state_of_another_run_is_refused(config: DataConfig, batch: int) -> None:
    """A state beyond the epoch resumes as an epoch without batches."""
    with pytest.raises(UserError, match="12 batches") as error:
        open_loader(config, "train", seed=1).load_state_dict({"epoch": 0, "batch": batch})
    one_line(error)


def test_an_image_that_went_bad_later_is_named_while_training(tiny: Path) -> None:
    """A run over image files ends with PIL's traceback, and nobody knows which of 100,000 it was."""
    prepare("tiny_imagenet", tiny)
    config = DataConfig("tiny_imagenet", str(tiny), "folder", batch_size=4, validation_fraction=0.0)
    loader = open_loader(config, "train", seed=0)
    (images_of(tiny) / "n02_1.JPEG").write_bytes(b"gone bad")
    with pytest.raises(RankError, match=r"tiny_imagenet train sample 5 \(.*n02_1.JPEG\) cannot be loaded"):
        list(loader)
    loader.close()
