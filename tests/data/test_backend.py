"""All backends: the same batches, bit for bit."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfw_dist.config import DataConfig
from sfw_dist.data.datasets.array_sets import read_digits
from sfw_dist.data.loading import open_loader
from sfw_dist.data.loading.augment import Augmentation
from sfw_dist.data.loading.gpu import GPUBackend
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare
from sfw_dist.data.sampler import TrainingSampler
from sfw_dist.errors import UserError
from tests.support.loaders import (
    AUGMENTATIONS,
    BACKENDS,
    BackendName,
    epoch_of,
    same,
    within,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_stored_samples(config: DataConfig, backend: BackendName) -> None:
    """Wrong layout or order of a batch; labels of another sample; tensors that the next batch overwrites."""
    config = replace(config, backend=backend, eval_batch_size=50)
    loader = open_loader(config, "test", seed=0)
    batches = list(loader)  # kept, and more than FFCV has buffers, so that a reused one would show
    assert [len(labels) for _, labels in batches] == [50] * 9 + [1] and len(loader) == 10 and loader.samples == 451
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 1, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and labels.dim() == 1
    raw = read_digits(Path())
    np.testing.assert_array_equal(torch.cat([images for images, _ in batches])[:, 0], raw.test.images[..., 0])
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]), raw.test.labels)
    assert same(list(loader), batches)  # evaluated again without set_epoch
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_backends_threads_and_ranks_yield_the_same_bits(
    config: DataConfig, backend: BackendName, augmentation: dict[str, Any]
) -> None:
    """A run depends on whether FFCV is installed, on the number of threads or on the number of ranks."""
    config = replace(config, **augmentation)
    expected = epoch_of(open_loader(config, "train", seed=1), 1)
    for threads, world_size in [(1, 1), (2, 2), (2, 4)]:
        shares = []
        for rank in range(world_size):
            options = replace(config, backend=backend, workers=threads)
            loader = open_loader(options, "train", seed=1, rank=rank, world_size=world_size)
            shares.append(epoch_of(loader, 1))
            loader.close()
        for number, (images, labels) in enumerate(expected):
            for rank, share in enumerate(shares):
                assert same([share[number]], [(images[rank::world_size], labels[rank::world_size])])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_folder_and_gpu_yield_the_bits_of_the_array(tmp_path: Path, augmentation: dict[str, Any]) -> None:
    """The reference and the fast backends train different runs. The gpu backend runs on the CPU here."""
    draw = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "raw" / "imagefolder" / ("train" if number < 20 else "val") / f"class{number % 2}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (14, 11, 3), dtype=np.uint8)).save(path / f"{number}.png")
    prepare("imagefolder", tmp_path, options=Options(size=(8, 8)))
    config = DataConfig(name="imagefolder", root=str(tmp_path), batch_size=6, validation_fraction=0, **augmentation)
    batches = [
        epoch_of(open_loader(replace(config, backend=backend), "train", seed=2), 3) for backend in ("folder", "ram")
    ]
    assert same(*batches) and len(batches[0]) == 3

    images, labels = torch.cat([b[0] for b in batches[1]]), torch.cat([b[1] for b in batches[1]])
    stored = np.load(tmp_path / "imagefolder" / "train_images.npy")
    order = TrainingSampler(np.arange(20), 6, 2, 0, 1).ids(3)
    params = Augmentation(flip=True, **{k: v for k, v in augmentation.items() if k != "flip"}).sample_params(
        order, (8, 8), seed=2, epoch=3
    )
    resident = GPUBackend(stored, np.load(tmp_path / "imagefolder" / "train_labels.npy"), torch.device("cpu"))
    assert same([resident.fetch(order, params)], [(images, labels)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_epochs_left_early_or_not_leave_nothing_behind(config: DataConfig, backend: BackendName) -> None:
    """A thread or a batch's memory for every epoch: long runs end when either is used up."""
    others = set(threading.enumerate())
    loader = open_loader(replace(config, backend=backend, workers=2), "train", seed=0)

    def epochs(first: int, last: int) -> None:
        for epoch in range(first, last):
            loader.set_epoch(epoch)
            for number, _ in enumerate(loader, start=1):
                if number == epoch % 14:
                    break

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return len(set(threading.enumerate()) - others), tensors

    epochs(0, 20)
    before = held()
    memory = resident_bytes()
    epochs(20, 220)
    assert held() == before
    assert resident_bytes() - memory < 16 << 20
    loader.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_in_the_middle_of_an_epoch(config: DataConfig, backend: BackendName) -> None:
    """close() leaves a thread behind, or the iterator waits for it for ever."""
    before = set(threading.enumerate())
    loader = open_loader(replace(config, backend=backend, workers=2), "train", seed=0)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises((RuntimeError, UserError), match=r"closed|cannot be loaded"):
        within(60, lambda: list(batches))
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("backend", BACKENDS)
def test_loaders_keep_thread_counts_and_random_state(config: DataConfig, backend: BackendName) -> None:
    """FFCV sets torch's and numba's threads, so that training slows down, and params from numpy's global generator."""
    import numba

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts = torch.get_num_threads(), numba.get_num_threads()
        np.random.seed(0)
        loader = open_loader(replace(config, backend=backend, workers=1), "train", seed=0)
        list(loader)
        loader.close()
        assert (torch.get_num_threads(), numba.get_num_threads()) == counts
        drawn = np.random.randint(1 << 30)
        np.random.seed(0)
        assert drawn == np.random.randint(1 << 30)
    finally:
        torch.set_num_threads(threads)
