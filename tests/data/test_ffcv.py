"""FFCV: its file format, its probe, and that it leaves other settings as they were."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig
from sfw_dist.data.loading import ffcv_probe, open_loader
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from sfw_dist.errors import UserError
from tests.support.downloads import forbidden
from tests.support.loaders import needs_ffcv
from tests.support.raw_data import register, visible


@pytest.mark.parametrize(("n", "side"), [(7, 5), (400, 64)])
def test_beton_is_what_ffcv_writes(tmp_path: Path, n: int, side: int) -> None:
    """Our writer strays from FFCV's format: (400, 64) fills several pages."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

    from sfw_dist.data.loading.ffcv import write_beton

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side + 1, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, n)
    fields = {"image": NDArrayField(np.dtype("uint8"), images.shape[1:]), "label": IntField()}
    writer = DatasetWriter(str(tmp_path / "theirs"), fields, page_size=MIN_PAGE_SIZE, num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels, strict=True)))
    with (tmp_path / "ours").open("wb") as file:
        write_beton(file, images, labels)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_betons_are_added_once_ffcv_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV is installed later, and training keeps the slow backend, or the data set is read again."""
    pytest.importorskip("ffcv")
    register(monkeypatch)
    with monkeypatch.context() as without_ffcv:
        without_ffcv.setattr(preparing, "_beton_writer", lambda: None)
        folder = prepare("tiny", tmp_path)
        assert not read_manifest(folder).has_betons and visible(folder) == sorted(
            ["manifest.json", *read_manifest(folder).files]
        )
    register(monkeypatch, read=forbidden)
    prepare("tiny", tmp_path)
    assert read_manifest(folder).has_betons and verify("tiny", tmp_path) == []


@needs_ffcv
def test_auto_takes_ffcv_and_says_why(config: DataConfig) -> None:
    """auto takes another backend although FFCV and its files are there, or does not say what it took."""
    loader = open_loader(replace(config, backend="auto", workers=1), "test", seed=0)
    assert loader.description == "ffcv, 1 thread(s) (auto: FFCV passed its probe)"


@needs_ffcv
def test_prepared_without_ffcv(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV is there, its files are not: auto does not train, or does not say what to do."""
    monkeypatch.setattr(preparing, "_beton_writer", lambda: None)
    prepare("digits", tmp_path)
    config = replace(config, root=str(tmp_path))
    description = open_loader(replace(config, backend="auto"), "test", seed=0).description
    assert description.startswith("ram") and "without it: run python -m sfw_dist.data prepare digits" in description
    with pytest.raises(UserError, match="prepared without it"):
        open_loader(replace(config, backend="ffcv"), "test", seed=0)


@needs_ffcv
def test_importing_the_backends_keeps_thread_counts() -> None:
    """``import ffcv`` sets torch's threads to 1, for all of the training."""
    script = (
        "import torch; torch.set_num_threads(3); import sfw_dist.data, sfw_dist.data.loading.ffcv, numba; "
        "assert torch.get_num_threads() == 3, torch.get_num_threads(); "
        "assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(__file__).parents[2])


@needs_ffcv
def test_the_probe_itself_passes() -> None:
    """FFCV is never used, because its probe is wrong."""
    ffcv_probe.try_ffcv()


def test_tables_of_many_samples_take_no_memory_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when every rank holds its own copy of the tables, as with FFCV's loader: 0.5 GB a million samples."""
    from sfw_dist.data.loading import ffcv

    labels = np.arange(100_000) % 10
    with (tmp_path / "many.beton").open("wb") as file:
        ffcv.write_beton(file, np.zeros((len(labels), 1, 1, 3), np.uint8), labels)
    monkeypatch.setattr(ffcv, "BLOCK", 1000)
    tracemalloc.start()
    backend = ffcv.FFCVBackend(tmp_path / "many.beton", labels, (3, 1, 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    backend.close()
    assert peak < 5 * len(labels)
