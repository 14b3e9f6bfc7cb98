"""Opening a loader: splits, the ranks' shares, the choice of a backend, and what users get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfw_dist.config import DataConfig
from sfw_dist.data.datasets.array_sets import read_digits
from sfw_dist.data.datasets.raw import RawData, RawPart
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.loading import Split, build_loader, dataset_info, open_loader
from sfw_dist.data.prepare import prepare
from sfw_dist.data.sampler import split_validation
from sfw_dist.errors import UserError
from tests.support.downloads import one_line
from tests.support.loaders import (
    SLOW_FFCV,
    BackendName,
    epoch_of,
    same,
    truncate,
)
from tests.support.raw_data import register


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_pixels_of_one_rank(config: DataConfig, world_size: int) -> None:
    """The augmented pixels or the batches depend on the world size: scaling out changes the run."""
    one = epoch_of(open_loader(config, "train", seed=1), epoch=2)
    for rank in range(world_size):
        share = epoch_of(open_loader(config, "train", seed=1, rank=rank, world_size=world_size), epoch=2)
        assert same(share, [(images[rank::world_size], labels[rank::world_size]) for images, labels in one])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_test_sample_exactly_once(config: DataConfig, world_size: int) -> None:
    """Accuracy over 451 samples becomes accuracy over 452 or 450."""
    loaders = [open_loader(config, "test", seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    pixels = np.concatenate([images.numpy() for loader in loaders for images, _ in loader]).reshape(-1, 64)
    expected = read_digits(Path()).test.images.reshape(-1, 64)
    assert len(pixels) == sum(loader.samples for loader in loaders) == 451
    np.testing.assert_array_equal(pixels[np.lexsort(pixels.T)], expected[np.lexsort(expected.T)])


def test_validation_is_held_out_and_not_augmented(config: DataConfig) -> None:
    """Validation on training samples, or on cropped ones, or on others at another world size."""
    config = replace(config, batch_size=1)
    raw = read_digits(Path())
    train, validation = split_validation(raw.train.labels, config.validation_fraction, seed=5)
    loader = open_loader(config, "validation", seed=5)
    assert loader.samples == len(validation) == 136
    np.testing.assert_array_equal(
        torch.cat([images for images, _ in loader])[:, 0], raw.train.images[validation][..., 0]
    )
    assert open_loader(config, "train", seed=5).samples == len(train) == 1210
    share = open_loader(config, "validation", seed=5, rank=1, world_size=2)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in share]), raw.train.labels[validation[1::2]])


def test_dataset_info_counts_the_splits(config: DataConfig) -> None:
    """Steps per epoch are planned for samples that are held out."""
    info = dataset_info(config)
    assert info.counts == {"train": 1210, "validation": 136, "test": 451}
    assert info.classes == tuple("0123456789") and info.image_shape == (1, 8, 8)
    pixels = read_digits(Path()).train.images / 255
    np.testing.assert_allclose([*info.mean, *info.std], [pixels.mean(), pixels.std()])


@pytest.mark.parametrize(
    ("split", "changes", "world_size", "told"),
    [
        ("train", {"name": "digit"}, 1, "'digit'.*digits, fashion_mnist"),
        ("train", {"name": "fashion_mnist"}, 1, "not prepared.*sfw_dist.data prepare fashion_mnist --root"),
        ("train", {"root": "/nowhere"}, 1, "not prepared in /nowhere/digits.*prepare digits --root /nowhere"),
        ("train", {"batch_size": 2000}, 2000, "world size 2000.*1210 training samples"),
        ("train", {}, 3, "world size 3.*write 99"),
        ("test", {}, 452, "world size 452.*451 samples"),
        ("validation", {"validation_fraction": 0.0}, 1, "validation_fraction 0.0.*write 0.1"),
    ],
)
def test_user_errors_are_one_line(
    config: DataConfig, split: Split, changes: dict[str, Any], world_size: int, told: str
) -> None:
    """A traceback from deep within, or a run that waits for a rank without data."""
    with pytest.raises(UserError, match=told) as error:
        open_loader(replace(config, **changes), split, seed=0, world_size=world_size)
    one_line(error)


def overwrite(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)


@pytest.mark.parametrize(
    ("backend", "file", "damage"),
    [
        pytest.param("ffcv", "train.beton", truncate, marks=SLOW_FFCV, id="truncated beton"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=0), marks=SLOW_FFCV, id="beton version"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=8), marks=SLOW_FFCV, id="beton count"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=3000), marks=SLOW_FFCV, id="beton address"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=-24), marks=SLOW_FFCV, id="beton table"),
        pytest.param("ffcv", "train.beton", Path.unlink, marks=SLOW_FFCV, id="no beton"),
        pytest.param("ram", "train_images.npy", truncate, id="truncated array"),
        pytest.param("ram", "train_images.npy", partial(overwrite, offset=0), id="array magic"),
        pytest.param("ram", "train_images.npy", partial(overwrite, offset=20), id="array header"),
        pytest.param("ram", "train_labels.npy", partial(overwrite, offset=200), id="labels"),
        pytest.param("ram", "manifest.json", truncate, id="manifest"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(
    damaged_root: Path, backend: BackendName, file: str, damage: Callable[[Path], object]
) -> None:
    """FFCV crashes on a wrong address, hangs, or complains about negative dimensions."""
    path = damaged_root / "digits" / file
    if isinstance(damage, partial) and damage.keywords["offset"] < 0:
        damage = partial(overwrite, offset=path.stat().st_size + damage.keywords["offset"])
    damage(path)
    with pytest.raises(UserError) as error:
        open_loader(DataConfig(root=str(damaged_root), backend=backend), "train", seed=0)
    message = one_line(error)
    assert str(path) in message and f"sfw_dist.data prepare digits --root {damaged_root}" in message


def test_where_ffcv_fails_auto_takes_ram_and_ffcv_is_an_error(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow run without a word why; or an ImportError for who asked for FFCV."""
    monkeypatch.setattr(build_loader, "ffcv_problem", lambda folder: "its probe failed: apt-get install it")
    loader = open_loader(replace(config, backend="auto", workers=1), "train", seed=0)
    assert loader.description == "ram, 1 thread(s) (auto: no FFCV: its probe failed: apt-get install it)"
    assert same(list(loader), list(open_loader(config, "train", seed=0)))
    with pytest.raises(UserError, match=r"data.backend ffcv: its probe failed.*write data.backend ram") as error:
        open_loader(replace(config, backend="ffcv"), "train", seed=0)
    one_line(error)


@pytest.mark.parametrize(
    ("backend", "told"), [("gpu", "data.backend gpu needs a GPU"), ("folder", "digits was not prepared from image")]
)
def test_backends_that_cannot_be_are_refused(config: DataConfig, backend: BackendName, told: str) -> None:
    """A traceback, or silently another backend."""
    with pytest.raises(UserError, match=told) as error:
        open_loader(replace(config, backend=backend), "train", seed=0)
    one_line(error)


def test_single_images_leave_no_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the remedy is the fraction that was given."""

    def read(root: Path) -> RawData:
        images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
        part = RawPart(images, np.arange(2))
        return RawData(part, part)

    register(monkeypatch, read)
    monkeypatch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], image_shape=(3, 4, 4)))
    prepare("tiny", tmp_path)
    config = DataConfig(name="tiny", root=str(tmp_path), backend="ram", batch_size=1)
    with pytest.raises(UserError, match=r"validation_fraction 0.1 leaves.*no class has two training images, write 0"):
        open_loader(config, "validation", seed=0)
