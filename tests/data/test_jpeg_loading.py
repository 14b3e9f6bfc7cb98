"""Sets of JPEGs: what training and evaluation read of the whole images, and that damage is noticed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfw_dist.config import DataConfig
from sfw_dist.data.loading import build_loader, open_loader
from sfw_dist.data.loading import loader as loading
from sfw_dist.data.loading.augment import Augmentation, transform
from sfw_dist.data.loading.jpeg import jpeg_params
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import verify
from sfw_dist.data.sampler import TrainingSampler
from sfw_dist.errors import RankError, UserError
from tests.support.downloads import one_line
from tests.support.jpeg_sets import stored
from tests.support.loaders import AUGMENTATIONS, SLOW_FFCV, BackendName, epoch_of, same
from tests.support.raw_data import flip_byte

pytest.importorskip("ffcv")
FFCV_AND_RAM = [pytest.param("ffcv", marks=SLOW_FFCV), "ram"]


@pytest.fixture
def config(jpeg_root: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(build_loader, "ffcv_problem", lambda folder: None)  # its probe takes seconds, others test it
    return DataConfig("flowers", str(jpeg_root), "ram", batch_size=6, eval_batch_size=5, validation_fraction=0.0)


@pytest.fixture
def damaged(jpeg_root: Path, tmp_path: Path) -> Path:
    """A copy of the prepared set, to damage; its root."""
    shutil.copytree(jpeg_root / "flowers", tmp_path / "flowers")
    return tmp_path


@pytest.mark.parametrize("backend", FFCV_AND_RAM)
def test_evaluation_sees_the_middle(config: DataConfig, jpeg_root: Path, backend: BackendName) -> None:
    """Fails when the middle is scaled, shifted or of another sample."""
    images = torch.cat([images for images, _ in open_loader(replace(config, backend=backend), "test", seed=0)])
    kept = stored(jpeg_root, part="test")
    for number, row in enumerate(kept.table):
        pixels, (height, width) = kept.pixels(number).astype(int), (row["height"], row["width"])
        shown = images[number].permute(1, 2, 0).numpy().astype(int)
        if height >= 32 and width >= 32:
            top, left = (height - 32) // 2, (width - 32) // 2
            expected = pixels[top : top + 32, left : left + 32]
        else:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            box = Image.fromarray(pixels[top : top + side, left : left + side].astype(np.uint8))
            expected = np.asarray(box.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(shown - expected).mean() < (0.5 if backend == "ram" else 4)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("backend", FFCV_AND_RAM)
def test_training_sees_random_boxes_of_the_whole_image(
    config: DataConfig, jpeg_root: Path, backend: BackendName, augmentation: dict[str, Any]
) -> None:
    """Fails when a backend takes another box, flip or cutout than the definition, or boxes of the middle only."""
    config = replace(config, backend=backend, **augmentation)
    batches = epoch_of(open_loader(config, "train", seed=1), 2)
    kept = stored(jpeg_root)
    ids = TrainingSampler(np.arange(24), 6, 1, 0, 1).ids(2)
    params = jpeg_params(
        Augmentation(config.crop_padding, config.flip, config.cutout, config.random_resized_crop),
        kept.table, ids, (32, 32), seed=1, epoch=2,
    )  # fmt: skip
    zero = np.zeros(1, np.int64)
    for at, (number, (box, rest)) in enumerate(zip(ids, params, strict=True)):
        image = torch.from_numpy(kept.pixels(number).copy())[None]
        middle = transform(image, zero, box[None], (32, 32)).permute(0, 2, 3, 1).contiguous()
        expected = transform(middle, zero, rest[None])[0]
        shown = batches[at // 6][0][at % 6]
        if backend == "ram":
            assert torch.equal(shown, expected)
        assert (shown.int() - expected.int()).abs().float().mean() < 4
    boxes = params[:, 0, :4]
    assert (boxes[:, 1] + boxes[:, 3] <= kept.table["width"][ids]).all()
    if config.random_resized_crop:
        flat = kept.table["width"][ids] > 100
        assert len(set(boxes[flat, 1] // 32)) > 2  # all along the panorama


def test_ranks_threads_and_blocks_yield_the_same_bits(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a run depends on the number of ranks or threads, or on how many parameters are chosen at once."""
    config = replace(config, random_resized_crop=0.2, flip=True)
    one = epoch_of(open_loader(config, "train", seed=3), 1)
    monkeypatch.setattr(loading, "_BLOCK", 7)
    for rank in range(2):
        share = epoch_of(open_loader(replace(config, workers=2), "train", seed=3, rank=rank, world_size=2), 1)
        assert same(share, [(images[rank::2], labels[rank::2]) for images, labels in one])


def test_a_staged_copy_is_read(config: DataConfig, tmp_path: Path) -> None:
    """Fails when a node's own disk holds a part of what is read, or the set is read over the network all the same."""
    stage = tmp_path / "disk"
    loader = open_loader(replace(config, stage_dir=str(stage)), "test", seed=0)
    assert same(list(loader), list(open_loader(config, "test", seed=0)))
    (copy,) = stage.iterdir()
    assert {"test.beton", "test_jpegs.npy"} <= {path.name for path in copy.iterdir()}


def test_statistics_and_content_are_of_what_is_read(config: DataConfig, jpeg_root: Path) -> None:
    """Fails when images are normalised by other pixels' statistics, or a run takes changed pixels for the same."""
    images = torch.cat([images for images, _ in open_loader(config, "train", seed=0)]) / 255
    manifest = read_manifest(jpeg_root / "flowers")
    np.testing.assert_allclose(manifest.mean, images.mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(manifest.std, images.std((0, 2, 3)), atol=0.01)
    for file in ("train.beton", "test_jpegs.npy"):
        other = replace(manifest, files=manifest.files | {file: replace(manifest.files[file], sha256="another")})
        assert other.content != manifest.content


@pytest.mark.parametrize("backend", FFCV_AND_RAM)
def test_a_damaged_jpeg_is_named(damaged: Path, config: DataConfig, backend: BackendName) -> None:
    """Fails when a damaged JPEG becomes another sample's pixels, as in FFCV's loader."""
    kept = stored(damaged)
    flip_byte(damaged / "flowers" / "train.beton", at=int(kept.table["address"][9] + kept.table["bytes"][9] // 2))
    loader = open_loader(replace(config, backend=backend, root=str(damaged)), "train", seed=0)
    file = kept.files[9].strip(' ",')
    with pytest.raises(
        RankError, match=rf"flowers train sample 9 .*{Path(file).name}.*train.beton is damaged"
    ) as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert "train.beton is damaged" in verify("flowers", damaged)[0]


@pytest.mark.parametrize(
    ("backend", "file", "at"),
    [
        pytest.param("ffcv", "train.beton", 2200, marks=SLOW_FFCV, id="row of the beton"),
        pytest.param("ffcv", "train.beton", -5, marks=SLOW_FFCV, id="table of the beton"),
        pytest.param("ffcv", "train_jpegs.npy", -2, marks=SLOW_FFCV, id="width"),
        pytest.param("ram", "train_jpegs.npy", -13, id="address"),
        pytest.param("ram", "train_jpegs.npy", 20, id="header"),
    ],
)
def test_damaged_tables_are_found_at_opening(
    damaged: Path, config: DataConfig, backend: BackendName, file: str, at: int
) -> None:
    """Fails when a wrong address or size reaches the decoder, which writes where it is told."""
    flip_byte(damaged / "flowers" / file, at=at)
    with pytest.raises(UserError, match="is damaged") as error:
        open_loader(replace(config, backend=backend, root=str(damaged)), "train", seed=0)
    assert "--store jpeg --again" in one_line(error)


@pytest.mark.parametrize("backend", ["gpu", "folder"])
def test_other_backends_are_refused(config: DataConfig, backend: BackendName) -> None:
    """Fails when a backend reads files that are not there, or other pixels than were stored."""
    with pytest.raises(
        UserError, match=rf"data.backend {backend}: flowers is stored as JPEGs.*write data.backend auto"
    ):
        open_loader(replace(config, backend=backend), "test", seed=0)
