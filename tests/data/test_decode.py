"""Image files that are bad, and decoding that was interrupted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfw_dist.data.decode as decoding
from sfw_dist.data.__main__ import main
from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.decode import decode_image
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from tests.support.downloads import error_of
from tests.support.raw_data import damage, flip_byte, images_of, save_image

RGB_64 = ImageFormat(3, 64, 64)


def test_every_bad_file_is_named(tiny: Path) -> None:
    """Only the first of several bad files is named, or a truncated JPEG is trained on half grey."""
    names = damage(tiny)
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert message.startswith("4 image(s)") and all(name in message for name in names)
    for reason in ("not an image", "truncated", "missing", "64×65 pixels"):
        assert reason in message
    assert not (tiny / "tiny_imagenet").exists()


def test_many_bad_files_are_ten_and_a_count(tiny: Path) -> None:
    """A wrong mount fills the terminal with 100,000 names."""
    for path in images_of(tiny).parents[1].rglob("*.JPEG"):
        path.write_bytes(b"")
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert message.count(".JPEG") == 10 and "and 2 more" in message


def test_skip_bad_goes_on_and_lists_them(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels shift against the images behind a skipped file, or nobody learns what was left out."""
    names = damage(tiny)
    assert main(["prepare", "tiny_imagenet", "--root", str(tiny), "--skip-bad"]) == 0
    assert "9 train, 5 test samples, 4 skipped" in capsys.readouterr().out
    folder = tiny / "tiny_imagenet"
    manifest = read_manifest(folder)
    assert all(name in line for name, line in zip(names, manifest.skipped, strict=True))
    level = np.load(folder / "train_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.load(folder / "train_labels.npy"), (level / 60).astype(int))
    assert verify("tiny_imagenet", tiny) == []


def test_interrupted_twice_it_finishes_what_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each interruption costs everything done so far, or half-done work ends up in the data set."""
    try_decode, decoded = decoding._try_decode, []

    def interrupted_after(limit: int) -> Callable[..., np.ndarray | str]:
        def decode(path: Path, form: ImageFormat) -> np.ndarray | str:
            if len(decoded) >= limit:
                raise RuntimeError("killed")
            decoded.append(path.name)
            return try_decode(path, form)

        return decode

    for limit in (7, 14):
        monkeypatch.setattr(decoding, "_try_decode", interrupted_after(limit))
        with pytest.raises(RuntimeError, match="killed"):
            prepare("tiny_imagenet", tiny)
        assert not (tiny / "tiny_imagenet").exists()
        (tiny / ".tiny_imagenet.unfinished" / "stray.npy").write_bytes(b"of a killed process")
    flip_byte(tiny / ".tiny_imagenet.unfinished" / "train_images.npy", at=500)  # in the first chunk
    monkeypatch.setattr(decoding, "_try_decode", interrupted_after(1000))
    folder = prepare("tiny_imagenet", tiny)

    assert decoded.count("n01_1.JPEG") == 2, "a damaged chunk is done again"
    assert decoded.count("n02_2.JPEG") <= 2 and decoded.count("val_5.JPEG") == 1
    assert len(decoded) < 2 * 18
    level = np.load(folder / "train_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level, [60 * i + 10 * j + 4 for i in range(3) for j in range(4)], atol=1)
    assert sorted(path.name for path in tiny.iterdir() if not path.name.endswith(".lock")) == ["raw", "tiny_imagenet"]
    assert verify("tiny_imagenet", tiny) == []


def test_a_repaired_file_is_decoded_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user replaces the bad files and still reads of them; or the good chunks are decoded twice."""
    names = damage(tiny)
    error_of(lambda: prepare("tiny_imagenet", tiny))
    for name in names[:3]:
        save_image(images_of(tiny) / name, 99)
    save_image(images_of(tiny).parents[2] / "val" / "images" / "val_0.JPEG", 98)
    decode_image, decoded = decoding.decode_image, []

    def counted(path: Path, form: ImageFormat) -> np.ndarray:
        decoded.append(path.name)
        return decode_image(path, form)

    monkeypatch.setattr(decoding, "decode_image", counted)
    assert read_manifest(prepare("tiny_imagenet", tiny)).counts == {"train": 12, "test": 6}
    assert set(names) <= set(decoded) and "n03_3.JPEG" not in decoded


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bits_become_their_upper_8(tmp_path: Path, suffix: str) -> None:
    """Fails when a grey image of 16 bits is clipped at 255: nearly all of it is white."""
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    decoded = decode_image(tmp_path / f"x.{suffix}", RGB_64)
    np.testing.assert_array_equal(decoded, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("low", "high", "kind", "expected"),
    [
        (0, 1, np.float32, 255),
        (0, 255, np.int32, 255),
        (0, 200, np.int32, 200),
        (0, 255, np.float32, "real numbers of 0 to 255, wanted 0 to 1"),
        (-1, 1, np.float32, "real numbers of -1 to 1"),
        (0, np.nan, np.float32, "real numbers of nan"),
        (0, 256, np.int32, "32-bit numbers of 0 to 256, wanted 0 to 255"),
        (-1, 9, np.int32, "32-bit numbers of -1 to 9"),
    ],
)
def test_wide_numbers_are_scaled_or_refused(
    tmp_path: Path, low: float, high: float, kind: type, expected: int | str
) -> None:
    """Fails when images of integers become white and images of real numbers black, without a word."""
    values = np.zeros((8, 8), kind)
    values[0, 0], values[0, 1], values[0, 2] = low, high, high / 2
    Image.fromarray(values).save(tmp_path / "x.tif")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            decode_image(tmp_path / "x.tif", ImageFormat(3, 8, 8))
    else:
        decoded = decode_image(tmp_path / "x.tif", ImageFormat(3, 8, 8))
        assert decoded[0, 1].tolist() == [expected] * 3 and abs(int(decoded[0, 2, 0]) - expected / 2) <= 0.5


@pytest.mark.parametrize("damaged", ["png", "avif", "jp2", "webp", "tif", "bmp"])
def test_whatever_a_decoder_raises_is_a_bad_file(tiny: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    """Fails when a damaged AVIF file, whose decoder raises RuntimeError, ends in a traceback despite --skip-bad."""
    path = images_of(tiny) / "n02_0.JPEG"
    Image.new("RGB", (64, 64)).save(path, format={"jp2": "JPEG2000", "tif": "TIFF"}.get(damaged, damaged))
    content = path.read_bytes()
    for length in range(0, len(content) // 2, max(1, len(content) // 20)):
        path.write_bytes(content[:length])
        assert isinstance(decoding._try_decode(path, RGB_64), str)

    def fail(*_: object) -> np.ndarray:
        raise RuntimeError("Missing or empty\nimage item")

    monkeypatch.setattr(decoding, "decode_image", fail)
    assert decoding._try_decode(path, RGB_64) == "RuntimeError: Missing or empty image item"


def test_an_elongated_image_is_cut_before_it_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a line of 20,000 pixels is scaled to 1,280,000×64, which takes gigabytes; or when the centre moves."""
    values = np.zeros((1, 20_000, 3), np.uint8)
    values[:, 10_000 - 4 : 10_000 + 4] = 200
    sizes = []
    resize = Image.Image.resize

    def measured(image: Image.Image, size: tuple[int, int], *args: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", measured)
    for name, array in (("wide", values), ("high", values.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        assert (decode_image(tmp_path / f"{name}.png", RGB_64._replace(fit=True)) == 200).all()
    assert sizes == [(512, 64), (64, 512)]


@pytest.mark.parametrize("left", ["fewer images", "half a line"])
def test_what_was_left_makes_no_difference(tiny: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """Fails when an interrupted call leaves bytes behind the last image, so that equal data have another hash."""
    expected = read_manifest(prepare("tiny_imagenet", tiny)).content
    unfinished = tiny / ".tiny_imagenet.unfinished"
    shutil.rmtree(tiny / "tiny_imagenet")

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("sfw_dist.data.writing.parts.finish_images", killed)
        with pytest.raises(RuntimeError, match="killed"):
            prepare("tiny_imagenet", tiny)
    if left == "half a line":
        journal = unfinished / "train_images.npy.journal"
        journal.write_bytes(journal.read_bytes()[:-7])
        decoded = []
        try_decode = decoding._try_decode
        monkeypatch.setattr(decoding, "_try_decode", lambda path, form: decoded.append(path) or try_decode(path, form))
    else:
        with (unfinished / "train_images.npy").open("ab") as file:
            file.write(b"of more images")
    assert read_manifest(prepare("tiny_imagenet", tiny)).content == expected
    assert left != "half a line" or 0 < len(decoded) < 12


def test_names_that_are_no_utf8_are_taken(tmp_path: Path) -> None:
    """Fails when one file out of an old archive ends prepare in a traceback."""
    for i, name in enumerate((b"train/a/caf\xe9.png", b"val/a/x.png")):
        path = tmp_path / "raw" / "imagefolder" / os.fsdecode(name)
        save_image(path, i, size=(8, 8))
    assert read_manifest(prepare("imagefolder", tmp_path)).counts == {"train": 1, "test": 1}
