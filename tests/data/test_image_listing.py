"""Which files of a folder are images, and that nothing is left out without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

import sfw_dist.data.datasets.image_listing as listing
from sfw_dist.data.__main__ import main
from sfw_dist.data.datasets.image_listing import list_classes
from sfw_dist.data.manifest import read_manifest
from tests.support.downloads import error_of
from tests.support.raw_data import save_image


def folders(root: Path) -> Path:
    """Two parts with one class of one image each, below ``root/raw/imagefolder``."""
    folder = root / "raw" / "imagefolder"
    for part in ("train", "val"):
        save_image(folder / part / "a" / "x.png", 1)
    return folder


def test_images_are_those_of_torchvision(tmp_path: Path) -> None:
    """Fails when a file counts here that torchvision's ImageFolder leaves out, or the other way round."""
    a, elsewhere = tmp_path / "part" / "a", tmp_path / "elsewhere"
    for path in (a / "x.png", a / "deep" / "y.JPG", elsewhere / "z.tiff", elsewhere / "more" / "w.webp"):
        save_image(path, 1)
    (a / "linked").symlink_to(elsewhere)
    (a / "v.jpeg").symlink_to(a / "x.png")
    (tmp_path / "part" / "b").symlink_to(elsewhere)
    (a / "readme.txt").write_text("text")
    assert list_classes(tmp_path / "part").left_out == [f"{a}/readme.txt (not named as an image)"]
    theirs = ImageFolder(str(tmp_path / "part"))
    ours = list_classes(tmp_path / "part").samples
    assert sorted((str(path), label) for path, label in ours) == sorted(
        (path, theirs.classes[number]) for path, number in theirs.samples
    )
    assert len(ours) == 7


def test_what_is_left_out_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a notebook's checkpoints are trained on, or a file is left out and nobody learns of it."""
    folder = folders(tmp_path)
    train = folder / "train"
    save_image(train / "a" / ".ipynb_checkpoints" / "x-checkpoint.png", 2)
    save_image(train / "a" / "deep" / ".hidden" / "x.png", 2)
    save_image(train / ".ipynb_checkpoints" / "x.png", 2)
    save_image(train / "lonely.png", 2)
    for name in ("Thumbs.db", ".DS_Store"):
        (train / "a" / name).write_bytes(b"")
    os.mkfifo(train / "a" / "pipe.png")
    assert main(["prepare", "imagefolder", "--root", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "imagefolder")
    assert manifest.counts == {"train": 1, "test": 1} and ", 7 left out" in output
    reasons = {line.partition(" (")[0].removeprefix(f"{train}/"): line for line in manifest.left_out}
    assert set(reasons) == {
        *(".ipynb_checkpoints", "lonely.png", "a/.DS_Store", "a/.ipynb_checkpoints", "a/Thumbs.db"),
        *("a/deep/.hidden", "a/pipe.png"),
    }
    assert "(hidden, 1 file(s))" in reasons["a/.ipynb_checkpoints"] and "(not a file)" in reasons["a/pipe.png"]
    assert all(line in output for line in manifest.left_out)


def test_a_link_to_nowhere_is_a_missing_image(tmp_path: Path) -> None:
    """Fails when images vanish because the disk that they are on is not mounted."""
    train = folders(tmp_path) / "train"
    (train / "a" / "y.png").symlink_to(tmp_path / "unmounted" / "y.png")
    command = ["prepare", "imagefolder", "--root", str(tmp_path)]
    assert main(command) == 2
    assert main([*command, "--skip-bad"]) == 0
    assert read_manifest(tmp_path / "imagefolder").skipped == (f"{train}/a/y.png (missing)",)


@pytest.mark.parametrize("place", ["b", "a/more"])
def test_a_folder_that_is_a_link_to_nowhere_is_refused(tmp_path: Path, place: str) -> None:
    """Fails when a class, or a part of one, vanishes with the disk that it is on."""
    train = folders(tmp_path) / "train"
    (train / place).symlink_to(tmp_path / "unmounted")
    assert f"{train / place} is a link to {tmp_path}/unmounted" in error_of(lambda: list_classes(train))


def test_a_folder_linked_into_itself_is_refused(tmp_path: Path) -> None:
    """Fails when a link to a folder above is followed for ever, or a folder that two links share counts as one."""
    train = folders(tmp_path) / "train"
    save_image(tmp_path / "shared" / "s.png", 1)
    for name in ("one", "two"):
        (train / "a" / name).symlink_to(tmp_path / "shared")
    assert len(list_classes(train).samples) == 3
    (train / "a" / "loop").symlink_to(train)
    assert "a/loop is a link to a folder that it is in" in error_of(lambda: list_classes(train))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the images in a folder of somebody else vanish. (The permission would not stop root.)"""
    train = folders(tmp_path) / "train"
    save_image(train / "a" / "theirs" / "y.png", 1)
    scandir = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "theirs":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    message = error_of(lambda: list_classes(train))
    assert f"{train}/a/theirs cannot be read (Permission denied)" in message


def test_a_class_of_other_files_is_refused(tmp_path: Path) -> None:
    """Fails when the error does not tell that there are files, only not images by their names."""
    train = folders(tmp_path) / "train"
    (train / "a" / "x.png").rename(train / "a" / "x")
    assert "holds no images; left out:" in error_of(lambda: list_classes(train))
