"""Sets of JPEGs: what is stored of whole images, after an interruption too, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig
from sfw_dist.data.__main__ import main
from sfw_dist.data.loading import open_loader
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare, verify, write
from sfw_dist.data.writing import disk_cost, image_writer, jpeg_store
from sfw_dist.errors import UserError
from tests.support.downloads import one_line
from tests.support.jpeg_sets import OPTIONS, picture, stored
from tests.support.raw_data import flip_byte

pytest.importorskip("ffcv")


def test_whole_images_are_stored_no_larger_than_needed(jpeg_root: Path, jpeg_photos: Path) -> None:
    """Fails when details are lost that a box needs, small images are enlarged, or a panorama fills the disk."""
    kept = stored(jpeg_root)
    wanted = {"as is": (30, 40), "large": (48, 37), "flat": (36, 288), "small": (20, 25)}  # 37 = 32 · 8/7, 288 = 8 · 36
    for number, file in enumerate(kept.files):
        size = next(size for name, size in wanted.items() if name in file)
        assert (kept.table[number]["height"], kept.table[number]["width"]) == kept.pixels(number).shape[:2] == size
    names = [Path(file.strip(' ",')).name for file in kept.files]
    original = jpeg_photos / "train" / "class0" / "00 as is.jpg"
    assert kept.content(names.index(original.name)) == original.read_bytes()  # not encoded a second time
    grey = kept.pixels(names.index("05 large.jpg")).astype(int)
    assert np.ptp(grey, axis=2).max() <= 1 and np.ptp(grey) > 50


@pytest.mark.slow
def test_stock_ffcv_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the beton is none for FFCV's own loader, which reads whole pages here, of three JPEGs each."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    from sfw_dist.data.loading import ffcv

    monkeypatch.setattr(ffcv, "largest_jpeg", lambda shape: 1 << 12)
    monkeypatch.setattr(ffcv, "MIN_PAGE_SIZE", 1 << 12)
    pictures = [np.asarray(picture(number, 40, 50)) for number in range(10)]
    classes = [0, 1, 1, 0, 1, 0, 0, 1]
    write(tmp_path, "pets", (pictures[:8], classes), (pictures[8:], [0, 1]), options=OPTIONS)
    table = np.load(tmp_path / "pets" / "train_jpegs.npy")
    assert len({*(table["address"] >> 12)}) > 1
    with ffcv._kept_thread_counts():
        pipelines = {"image": [SimpleRGBImageDecoder()]}
        loader = Loader(str(tmp_path / "pets" / "train.beton"), 8, 1, os_cache=False, pipelines=pipelines)
        ((images, labels),) = [(images.copy(), labels.clone()) for images, labels in loader]
    assert labels[:, 0].tolist() == classes
    assert images.shape == (8, 37, 46, 3)
    for number, image in enumerate(images):
        assert np.abs(image.astype(int) - np.asarray(picture(number, 37, 46)).astype(int)).mean() < 6


def test_an_interrupted_preparation_continues(
    jpeg_photos: Path, jpeg_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when hours of encoding are done again, or what they left is not what one call makes."""
    monkeypatch.setattr(image_writer, "CHUNK_SAMPLES", 5)
    encode, made = jpeg_store.JpegStore.write, []

    def write_some(store: Any, file: Any, chunk: range, samples: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(chunk)
        return encode(store, file, chunk, samples)

    again = partial(prepare, jpeg_photos, jpeg_root, name="again", options=OPTIONS)
    monkeypatch.setattr(jpeg_store.JpegStore, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        again()
    place = int(stored(jpeg_root).table["address"][7]) + 500
    flip_byte(jpeg_root / ".again.unfinished" / "train.beton", at=place)  # the second chunk, by a disk that lost power
    made.clear()
    monkeypatch.setattr(jpeg_store.JpegStore, "write", lambda *args: made.append(args[2]) or encode(*args))
    again()
    assert [chunk.start for chunk in made] == [5, 10, 15, 20, 0, 5]
    assert (stored(jpeg_root, "again").beton == stored(jpeg_root).beton) is True  # no listing of the bytes
    first, second = (read_manifest(jpeg_root / name) for name in ("flowers", "again"))
    assert (first.mean, first.std, first.content) == (second.mean, second.std, second.content)


def test_what_the_other_store_has_left_is_removed(
    jpeg_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the pixels of an interrupted call, which fill the disk, come to lie beside the JPEGs."""

    def interrupt(images: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(image_writer._PixelStore, "write", lambda *args: interrupt(args))
        with pytest.raises(KeyboardInterrupt):
            prepare(jpeg_photos, tmp_path, name="flowers", options=Options(size=(32, 32)))
    assert list((tmp_path / ".flowers.unfinished").iterdir())
    folder = prepare(jpeg_photos, tmp_path, name="flowers", options=OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *read_manifest(folder).files])


def test_bad_files_are_named_and_left_out(jpeg_photos: Path, tmp_path: Path) -> None:
    """Fails when a JPEG that ends in the middle is stored, or a sample behind it has its label."""
    shutil.copytree(jpeg_photos, tmp_path / "photos")
    bad = tmp_path / "photos" / "train" / "class0" / "00 as is.jpg"
    bad.write_bytes(bad.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"1 image.*00 as is.jpg .*truncated"):
        prepare(tmp_path / "photos", tmp_path, name="flowers", options=OPTIONS)
    folder = prepare(tmp_path / "photos", tmp_path, name="flowers", options=replace(OPTIONS, skip_bad=True))
    manifest, labels = read_manifest(folder), np.load(folder / "train_labels.npy")
    assert manifest.counts["train"] == 23 and "00 as is.jpg" in manifest.skipped[0]
    kept = stored(tmp_path)
    assert all(f"class{label}" in file for label, file in zip(labels, kept.files, strict=True))
    assert (kept.table["bytes"] > 0).all() and verify("flowers", tmp_path) == []
    config = DataConfig("flowers", str(tmp_path), "ram", batch_size=23, validation_fraction=0.0)
    assert len(next(iter(open_loader(config, "train", seed=0)))[1]) == 23


@contextmanager
def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # type: ignore[attr-defined]
        yield


def test_the_disk_cost_is_told_before_and_refused(
    jpeg_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a disk is filled for hours until it is full."""
    raw = partial(prepare, jpeg_photos, tmp_path, name="flowers", options=Options(size=(32, 32)))
    monkeypatch.setattr(disk_cost, "LEAST", 100_000)
    needed = 2 * 32 * 32 * 32 * 3
    with (
        disk_of(monkeypatch, needed - 1),
        pytest.raises(UserError, match=r"32 images for 32×32 pixels take 196.6 kB as pixels.*--store jpeg") as error,
    ):
        raw()
    one_line(error)
    with disk_of(monkeypatch, needed):
        raw()
    assert "flowers: 32 images for 32×32 pixels take 196.6 kB as pixels, half of it for FFCV; 196.6" in (
        capsys.readouterr().err
    )
    capsys.readouterr()
    prepare(jpeg_photos, tmp_path, name="flowers", options=OPTIONS, again=True)
    assert capsys.readouterr().err == ""  # little
    with disk_of(monkeypatch, 20_000), pytest.raises(UserError, match=r"take 4\d\.\d kB as JPEGs, .*free some space"):
        prepare(jpeg_photos, tmp_path, name="jpegs", options=OPTIONS)


def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_beton_writer", lambda: None)


@pytest.mark.parametrize(
    ("source", "options", "act", "told"),
    [
        ("photos", Options(store="jpeg"), None, "write --size 224"),
        ("photos", replace(OPTIONS, channels=1), None, "stores colours"),
        ("photos", replace(OPTIONS, jpeg_quality=96), None, r"\[1, 95\], got 96"),
        ("photos", Options(size=(32, 32), jpeg_quality=80), None, "only for --store jpeg"),
        ("photos", OPTIONS, no_ffcv, r"needs FFCV.*sfw-dist\[ffcv\]"),
        ("digits", Options(store="jpeg"), None, "grey images"),
    ],
    ids=["no size", "grey", "quality", "quality of pixels", "no FFCV", "digits"],
)
def test_what_cannot_be_is_refused(
    jpeg_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    options: Options,
    act: Callable[[pytest.MonkeyPatch], None] | None,
    told: str,
) -> None:
    """Fails when something else is stored than was asked for, or a traceback says why not."""
    if act:
        act(monkeypatch)
    with pytest.raises(UserError, match=told) as error:
        prepare(jpeg_photos if source == "photos" else source, tmp_path, options=options)
    one_line(error)


def test_the_command_knows_the_store(jpeg_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when options do not reach the file, or another quality is taken for the one that is there."""
    command = [
        "prepare",
        str(jpeg_photos),
        "--root",
        str(tmp_path),
        "--size",
        "32",
        "--store",
        "jpeg",
        "--jpeg-quality",
    ]
    assert main([*command, "60", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["store"] == "jpeg" and manifest["image_shape"] == [3, 32, 32]
    assert manifest["arguments"][-4:] == ["--store", "jpeg", "--jpeg-quality", "60"]
    assert main([*command, "60"]) == 0
    assert main([*command, "70"]) != 0
    assert "was prepared with --jpeg-quality 60, not with --jpeg-quality 70" in capsys.readouterr().err
