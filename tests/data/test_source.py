"""Raw files that change after a data set was prepared from them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sfw_dist.data.__main__ import main
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from tests.support.raw_data import damage, images_of, save_image


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """An ``imagefolder`` of images of 8×8, prepared so: the folder of its training images."""
    folder = tmp_path / "raw" / "imagefolder"
    for i, place in enumerate(("train/a/x", "train/a/y", "train/b/x", "val/a/x")):
        save_image(folder / f"{place}.png", 10 * i, size=(8, 8))
    assert prepared(tmp_path, "--size", "8") == 0
    return folder / "train"


def prepared(root: Path, *options: str) -> int:
    return main(["prepare", "imagefolder", "--root", str(root), *options])


def test_changes_are_named_and_again_takes_them(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when prepare reports success and the images are still the old ones, or the remedy gives another size."""
    save_image(flowers / "b" / "new.png", 90, size=(8, 8))
    save_image(flowers / "a" / "x.png", 91, size=(8, 8))
    (flowers / "a" / "y.png").unlink()
    capsys.readouterr()
    assert prepared(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for change in ("a/x.png (changed)", "a/y.png (gone)", "b/new.png (new)"):
        assert f"{flowers}/{change}" in error
    assert error.endswith(f"run python -m sfw_dist.data prepare imagefolder --root {tmp_path} --size 8 --again\n")
    assert prepared(tmp_path, "--again") == 0 and prepared(tmp_path) == 0
    images = np.load(tmp_path / "imagefolder" / "train_images.npy")
    assert images.shape == (3, 8, 8, 3) and images[0].mean() > 90
    np.testing.assert_array_equal(np.load(tmp_path / "imagefolder" / "train_labels.npy"), [0, 1, 1])


def test_a_copy_is_no_change(flowers: Path, tmp_path: Path) -> None:
    """Fails when every job that copies raw and prepared files to a node's disk must prepare again."""
    for path in flowers.rglob("*.png"):
        os.utime(path, (0, 0))
    assert prepared(tmp_path) == 0
    shutil.rmtree(tmp_path / "raw")  # people delete what they no longer need
    assert prepared(tmp_path) == 0


def test_a_change_of_equal_length_is_noticed(flowers: Path, tmp_path: Path) -> None:
    """Fails when only lengths are compared."""
    path = flowers / "a" / "x.png"
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    os.utime(path, (0, 0))
    assert prepared(tmp_path) == 2


def test_a_repaired_file_is_noticed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a file that was skipped stays out after it was repaired, and prepare reports success."""
    damage(tiny)
    command = ["prepare", "tiny_imagenet", "--root", str(tiny)]
    assert main([*command, "--skip-bad"]) == 0 and main(command) == 0
    save_image(images_of(tiny) / "n02_2.JPEG", 99)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{images_of(tiny) / 'n02_2.JPEG'} (new)" in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("--skip-bad --again")
    assert main([*command, "--skip-bad", "--again"]) == 0
    assert read_manifest(tiny / "tiny_imagenet").counts == {"train": 10, "test": 5}


def test_folders_of_earlier_versions_are_left_in_peace(flowers: Path, tmp_path: Path) -> None:
    """Fails when a folder without a record of its source cannot be used any more."""
    path = tmp_path / "imagefolder" / "manifest.json"
    (path.parent / "source_files.json").unlink()
    text = path.read_text()
    start = text.index('    "source_files.json"')
    path.write_text(text[:start].rstrip().rstrip(",") + text[text.index("}", start) + 1 :])
    save_image(flowers / "b" / "new.png", 90, size=(8, 8))
    assert verify("imagefolder", tmp_path) == [] and prepared(tmp_path) == 0


@pytest.mark.parametrize("file", ["train_labels.npy", "train_images.npy", "manifest.json"])
def test_a_damaged_folder_keeps_its_size(flowers: Path, tmp_path: Path, file: str) -> None:
    """Fails when the remedy makes images of 64×64 out of those that were asked for."""
    path = tmp_path / "imagefolder" / file
    path.write_bytes(path.read_bytes()[:-9])
    (problem,) = verify("imagefolder", tmp_path)
    assert problem.endswith(f"prepare imagefolder --root {tmp_path} --size 8 --again")
    assert read_manifest(prepare("imagefolder", tmp_path)).image_shape == (3, 8, 8)
