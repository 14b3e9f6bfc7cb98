"""Preparing data sets: the prepared folder, interruptions, and its verification."""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import sfw_dist.data.prepare as preparing
from sfw_dist.data.datasets.raw import RawData
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from sfw_dist.data.writing.parts import channel_statistics
from sfw_dist.errors import UserError
from tests.support.downloads import forbidden, one_line
from tests.support.raw_data import (
    flip_middle_byte,
    register,
    tiny_arrays,
    visible,
)


def test_prepared_folder_holds_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays differ from the source, cannot be memory-mapped, or the manifest misstates them."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    raw, manifest = tiny_arrays(tmp_path), read_manifest(folder)
    assert folder == tmp_path / "tiny"
    for part, images, labels in (
        ("train", raw.train.images, raw.train.labels),
        ("test", raw.test.images, raw.test.labels),
    ):
        np.testing.assert_array_equal(np.load(folder / f"{part}_images.npy", mmap_mode="r"), images)
        np.testing.assert_array_equal(np.load(folder / f"{part}_labels.npy", mmap_mode="r"), labels)
        assert manifest.counts[part] == len(labels)
    assert manifest.classes == ("even", "odd") and manifest.image_shape == (3, 4, 5)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_channel_statistics_are_per_channel_in_unit_range() -> None:
    """Statistics over all channels, in 0..255, or of the last chunk only: the network sees shifted inputs."""
    images = np.random.default_rng(0).integers(0, 256, (5000, 2, 3, 3), dtype=np.uint8)
    images[..., 1] //= 4
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("level", [0, 7, 77, 201, 255])
def test_a_constant_channel_has_the_deviation_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """Fails when a constant channel becomes NaN, or is blown up by the rounding error of its variance."""

    def read(root: Path) -> RawData:
        raw = tiny_arrays(root)
        for images in (raw.train.images, raw.test.images):
            images[..., 1] = level
        return raw

    register(monkeypatch, read)
    manifest = read_manifest(prepare("tiny", tmp_path))
    assert manifest.std[1] == 1 and manifest.mean[1] == level / 255
    assert manifest.std[0] < 0.5 and manifest.std[2] < 0.5
    (note,) = manifest.notes
    assert note.startswith(f"channel 1 is {level} in every training image")
    for text in (f'"std": [0.3, {value}, 0.3]' for value in ("NaN", "0.0", "1.4e-08")):
        path = tmp_path / "tiny" / "manifest.json"
        path.write_text(re.sub(r'"std": \[[^]]*\]', text, path.read_text()))
        assert read_manifest(path.parent).std == (0.3, 1.0, 0.3), "as earlier versions wrote it"


def test_a_prepared_data_set_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of every run converts the data set again."""
    register(monkeypatch)
    prepare("tiny", tmp_path)
    register(monkeypatch, read=forbidden)
    prepare("tiny", tmp_path)


def test_processes_at_once_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start together write into each other's files."""
    reads, start = [], threading.Barrier(4)

    def slow_read(root: Path) -> RawData:
        reads.append(root)
        time.sleep(0.2)  # time for the others to interfere, if there were no lock
        return tiny_arrays(root)

    def rank() -> None:
        start.wait()
        prepare("tiny", tmp_path)

    register(monkeypatch, slow_read)
    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and verify("tiny", tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RuntimeError("crash")])
def test_interrupted_prepare_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    """Ctrl-C in the middle leaves a folder that later runs take for complete."""

    def interrupt(*args: object) -> NoReturn:
        raise interruption

    register(monkeypatch)
    monkeypatch.setattr(preparing, "channel_statistics", interrupt)  # after the arrays have been written
    with pytest.raises(type(interruption)):
        prepare("tiny", tmp_path)
    assert visible(tmp_path) == []


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's own writer waits for ever when its worker cannot write."""

    def full(*args: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    register(monkeypatch)
    monkeypatch.setattr(preparing, "_beton_writer", lambda: full)
    with pytest.raises(UserError, match="No space left") as error:
        prepare("tiny", tmp_path)
    one_line(error)
    assert visible(tmp_path) == []


def test_leftovers_of_a_killed_process_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a SIGKILL in the middle no later prepare succeeds, or it keeps half-written files."""
    register(monkeypatch)
    unfinished = tmp_path / ".tiny.unfinished"
    unfinished.mkdir()
    (unfinished / "stray.npy").write_bytes(b"half")
    prepare("tiny", tmp_path)
    assert visible(tmp_path) == ["tiny"] and not (tmp_path / "tiny" / "stray.npy").exists()


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "manifest.json"])
def test_a_truncated_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The remedy that the errors give, to prepare again, does nothing."""
    register(monkeypatch)
    path = prepare("tiny", tmp_path) / file
    path.write_bytes(path.read_bytes()[:-9])
    prepare("tiny", tmp_path)
    assert verify("tiny", tmp_path) == [] and visible(tmp_path) == ["tiny"]


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own data/tiny is deleted."""
    register(monkeypatch)
    own = tmp_path / "tiny" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("years of work")
    with pytest.raises(UserError, match="move it away"):
        prepare("tiny", tmp_path)
    assert own.read_text() == "years of work"


@pytest.mark.parametrize("damage", [flip_middle_byte, Path.unlink, lambda path: path.write_bytes(b"short")])
def test_verify_names_the_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    """One flipped bit on the disk goes unnoticed, or the wrong file is blamed."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    assert verify("tiny", tmp_path) == []
    damage(folder / "test_images.npy")
    (problem,) = verify("tiny", tmp_path)
    assert "test_images.npy" in problem and f"prepare tiny --root {tmp_path} --again" in problem and "\n" not in problem


def test_verify_reports_every_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of several problems is reported."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    files = list(read_manifest(folder).files)
    for file in files:
        flip_middle_byte(folder / file)
    assert len(verify("tiny", tmp_path)) == len(files)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str) -> None:
    """A KeyError from within, instead of the file's name and the remedy."""
    register(monkeypatch)
    path = prepare("tiny", tmp_path) / "manifest.json"
    path.write_text(manifest)
    (problem,) = verify("tiny", tmp_path)
    assert "manifest.json is damaged" in problem and "\n" not in problem


def test_a_prepared_folder_of_others_is_used_without_betons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a data set on a read-only disk is refused because FFCV's files could not be added."""
    monkeypatch.setattr(preparing, "_beton_writer", lambda: None)
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)

    def read_only(path: Path) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(preparing, "_beton_writer", lambda: forbidden)
    monkeypatch.setattr(preparing, "file_lock", read_only)
    assert prepare("tiny", tmp_path) == folder
    with pytest.raises(UserError, match=r"Read-only file system\): give yourself the right to it, or choose another"):
        prepare("tiny", tmp_path, again=True)
