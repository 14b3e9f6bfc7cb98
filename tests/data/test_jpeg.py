"""Sets of whole images as JPEGs: what is stored, what is read, and that damage is noticed."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig
from sfw_dist.data.__main__ import main
from sfw_dist.data.loading import build_loader, open_loader
from sfw_dist.data.loading import loader as loading
from sfw_dist.data.loading.augment import Augmentation, transform
from sfw_dist.data.loading.jpeg import jpeg_params
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare, verify, write
from sfw_dist.data.sampler import TrainingSampler
from sfw_dist.data.writing import disk_cost, image_writer, jpeg_store
from sfw_dist.errors import RankError, UserError
from tests.support.downloads import one_line
from tests.support.loaders import AUGMENTATIONS, SLOW_FFCV, BackendName, epoch_of, same
from tests.support.raw_data import flip_byte

pytest.importorskip("ffcv")
OPTIONS = Options(size=(32, 32), store="jpeg")
FFCV_AND_RAM = [pytest.param("ffcv", marks=SLOW_FFCV), "ram"]


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Blots of colour: what JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


SIZES = {"as is": (30, 40), "large": (90, 70), "flat": (36, 600), "small": (20, 25)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 test images of four sizes in two classes; some are no JPEGs in RGB."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for number in range(32):
        name, size = list(SIZES.items())[number % 4]
        image = picture(number, *size)
        path = folder / ("train" if number < 24 else "val") / f"class{number // 4 % 2}" / f"{number:02d} {name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:
            image.save(path.with_suffix(".png"))
        else:
            image.convert({5: "L", 6: "CMYK"}.get(number, "RGB")).save(path, quality=95)
    return folder


@pytest.fixture(scope="module")
def flowers(photos: Path) -> Path:
    """The root of the prepared set."""
    prepare(photos, photos.parent, name="flowers", options=OPTIONS)
    return photos.parent


@pytest.fixture
def config(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(build_loader, "ffcv_problem", lambda folder: None)  # its probe takes seconds, others test it
    return DataConfig("flowers", str(flowers), "ram", batch_size=6, eval_batch_size=5, validation_fraction=0.0)


@pytest.fixture
def damaged(flowers: Path, tmp_path: Path) -> Path:
    """A copy of the prepared set, to damage; its root."""
    shutil.copytree(flowers / "flowers", tmp_path / "flowers")
    return tmp_path


class Stored(NamedTuple):
    files: list[str]
    table: NDArray[Any]
    beton: bytes

    def content(self, number: int) -> bytes:
        row = self.table[number]
        return self.beton[row["address"] : row["address"] + row["bytes"]]

    def pixels(self, number: int) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(self.content(number))))


def stored(root: Path, name: str = "flowers", part: str = "train") -> Stored:
    folder = root / name
    files = (folder / f"{part}_files.json").read_text().splitlines()[1:-1]
    return Stored(files, np.load(folder / f"{part}_jpegs.npy"), (folder / f"{part}.beton").read_bytes())


def test_whole_images_are_stored_no_larger_than_needed(flowers: Path, photos: Path) -> None:
    """Fails when details are lost that a box needs, small images are enlarged, or a panorama fills the disk."""
    kept = stored(flowers)
    wanted = {"as is": (30, 40), "large": (48, 37), "flat": (36, 288), "small": (20, 25)}  # 37 = 32 · 8/7, 288 = 8 · 36
    for number, file in enumerate(kept.files):
        size = next(size for name, size in wanted.items() if name in file)
        assert (kept.table[number]["height"], kept.table[number]["width"]) == kept.pixels(number).shape[:2] == size
    names = [Path(file.strip(' ",')).name for file in kept.files]
    original = photos / "train" / "class0" / "00 as is.jpg"
    assert kept.content(names.index(original.name)) == original.read_bytes()  # not encoded a second time
    grey = kept.pixels(names.index("05 large.jpg")).astype(int)
    assert np.ptp(grey, axis=2).max() <= 1 and np.ptp(grey) > 50


@pytest.mark.parametrize("backend", FFCV_AND_RAM)
def test_evaluation_sees_the_middle(config: DataConfig, flowers: Path, backend: BackendName) -> None:
    """Fails when the middle is scaled, shifted or of another sample."""
    images = torch.cat([images for images, _ in open_loader(replace(config, backend=backend), "test", seed=0)])
    kept = stored(flowers, part="test")
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
    config: DataConfig, flowers: Path, backend: BackendName, augmentation: dict[str, Any]
) -> None:
    """Fails when a backend takes another box, flip or cutout than the definition, or boxes of the middle only."""
    config = replace(config, backend=backend, **augmentation)
    batches = epoch_of(open_loader(config, "train", seed=1), 2)
    kept = stored(flowers)
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


def test_an_interrupted_preparation_continues(photos: Path, flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when hours of encoding are done again, or what they left is not what one call makes."""
    monkeypatch.setattr(image_writer, "CHUNK_SAMPLES", 5)
    encode, made = jpeg_store.JpegStore.write, []

    def write_some(store: Any, file: Any, chunk: range, samples: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(chunk)
        return encode(store, file, chunk, samples)

    again = partial(prepare, photos, flowers, name="again", options=OPTIONS)
    monkeypatch.setattr(jpeg_store.JpegStore, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        again()
    place = int(stored(flowers).table["address"][7]) + 500
    flip_byte(flowers / ".again.unfinished" / "train.beton", at=place)  # the second chunk, by a disk that lost power
    made.clear()
    monkeypatch.setattr(jpeg_store.JpegStore, "write", lambda *args: made.append(args[2]) or encode(*args))
    again()
    assert [chunk.start for chunk in made] == [5, 10, 15, 20, 0, 5]
    assert (stored(flowers, "again").beton == stored(flowers).beton) is True  # no listing of the bytes
    first, second = (read_manifest(flowers / name) for name in ("flowers", "again"))
    assert (first.mean, first.std, first.content) == (second.mean, second.std, second.content)


def test_what_the_other_store_has_left_is_removed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the pixels of an interrupted call, which fill the disk, come to lie beside the JPEGs."""

    def interrupt(images: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(image_writer._PixelStore, "write", lambda *args: interrupt(args))
        with pytest.raises(KeyboardInterrupt):
            prepare(photos, tmp_path, name="flowers", options=Options(size=(32, 32)))
    assert list((tmp_path / ".flowers.unfinished").iterdir())
    folder = prepare(photos, tmp_path, name="flowers", options=OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *read_manifest(folder).files])


def test_bad_files_are_named_and_left_out(photos: Path, tmp_path: Path) -> None:
    """Fails when a JPEG that ends in the middle is stored, or a sample behind it has its label."""
    shutil.copytree(photos, tmp_path / "photos")
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


def test_statistics_and_content_are_of_what_is_read(config: DataConfig, flowers: Path) -> None:
    """Fails when images are normalised by other pixels' statistics, or a run takes changed pixels for the same."""
    images = torch.cat([images for images, _ in open_loader(config, "train", seed=0)]) / 255
    manifest = read_manifest(flowers / "flowers")
    np.testing.assert_allclose(manifest.mean, images.mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(manifest.std, images.std((0, 2, 3)), atol=0.01)
    for file in ("train.beton", "test_jpegs.npy"):
        other = replace(manifest, files=manifest.files | {file: replace(manifest.files[file], sha256="another")})
        assert other.content != manifest.content


@contextmanager
def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # type: ignore[attr-defined]
        yield


def test_the_disk_cost_is_told_before_and_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a disk is filled for hours until it is full."""
    raw = partial(prepare, photos, tmp_path, name="flowers", options=Options(size=(32, 32)))
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
    prepare(photos, tmp_path, name="flowers", options=OPTIONS, again=True)
    assert capsys.readouterr().err == ""  # little
    with disk_of(monkeypatch, 20_000), pytest.raises(UserError, match=r"take 4\d\.\d kB as JPEGs, .*free some space"):
        prepare(photos, tmp_path, name="jpegs", options=OPTIONS)


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
    photos: Path,
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
        prepare(photos if source == "photos" else source, tmp_path, options=options)
    one_line(error)


def test_the_command_knows_the_store(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when options do not reach the file, or another quality is taken for the one that is there."""
    command = ["prepare", str(photos), "--root", str(tmp_path), "--size", "32", "--store", "jpeg", "--jpeg-quality"]
    assert main([*command, "60", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["store"] == "jpeg" and manifest["image_shape"] == [3, 32, 32]
    assert manifest["arguments"][-4:] == ["--store", "jpeg", "--jpeg-quality", "60"]
    assert main([*command, "60"]) == 0
    assert main([*command, "70"]) != 0
    assert "was prepared with --jpeg-quality 60, not with --jpeg-quality 70" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["gpu", "folder"])
def test_other_backends_are_refused(config: DataConfig, backend: BackendName) -> None:
    """Fails when a backend reads files that are not there, or other pixels than were stored."""
    with pytest.raises(
        UserError, match=rf"data.backend {backend}: flowers is stored as JPEGs.*write data.backend auto"
    ):
        open_loader(replace(config, backend=backend), "test", seed=0)


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
