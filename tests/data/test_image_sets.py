"""Readers of the data sets that are folders of image files."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfw_dist.data.prepare as preparing
from sfw_dist.config import load_config
from sfw_dist.data.datasets.download import Remote
from sfw_dist.data.datasets.registry import TINY_IMAGENET
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare, verify
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.support.downloads import error_of
from tests.support.raw_data import damage, save_image
from tests.support.training import ONE_PROCESS


def test_tiny_imagenet_is_prepared(tiny: Path) -> None:
    """Classes follow wnids.txt unsorted, annotations are ignored, or a grayscale image is refused."""
    folder = prepare("tiny_imagenet", tiny)
    manifest = read_manifest(folder)
    assert manifest.classes == ("n01", "n02", "n03") and manifest.image_shape == (3, 64, 64)
    assert manifest.counts == {"train": 12, "test": 6} and manifest.skipped == ()
    images, labels = np.load(folder / "train_images.npy"), np.load(folder / "train_labels.npy")
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))
    level = images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level, [60 * i + 10 * j + 4 for i in range(3) for j in range(4)], atol=1)
    assert (images[3] == images[3, :, :, :1]).all()
    np.testing.assert_array_equal(np.load(folder / "test_labels.npy"), [2, 2, 1, 1, 0, 0])
    test_level = np.load(folder / "test_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(test_level, [225, 224, 215, 214, 205, 204], atol=1)
    assert verify("tiny_imagenet", tiny) == []
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    listed = json.loads((folder / "test_files.json").read_text())
    assert listed[0] == "raw/tiny_imagenet/tiny-imagenet-200/val/images/val_5.JPEG" and len(listed) == 6


def test_tiny_imagenet_goes_from_its_folder_to_a_pruned_network(tiny: Path) -> None:
    """A part of the way from image files to a pruning curve does not fit the next."""
    damage(tiny)
    prepare("tiny_imagenet", tiny, options=Options(skip_bad=True))
    base = load_config(Path(__file__).parents[2] / "configs" / "tiny_imagenet" / "sfw.yaml")
    config = replace(
        base,
        runs_dir=str(tiny / "runs"),
        data=replace(base.data, root=str(tiny), batch_size=4, eval_batch_size=2, validation_fraction=0.0),
        model=replace(base.model, width=0.0625),
        train=replace(base.train, epochs=1),
    )
    runs = {}
    for backend in ("ram", "folder"):
        of_backend = replace(config, name=backend, data=replace(config.data, backend=backend))
        runs[backend] = RunFolder(of_backend.run_dir)
        assert train(of_backend, ONE_PROCESS) == 0
        results = sweep_run(runs[backend], ONE_PROCESS, sparsities=[0.0, 0.9])
        assert [result["samples"] for result in results] == [5, 5]
    assert runs["ram"].weights.read_bytes() == runs["folder"].weights.read_bytes()


def test_tiny_imagenet_comes_out_of_its_archive(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive that a user put there is not taken; without it, the error does not tell what is wanted where."""
    raw = tiny / "raw" / "tiny_imagenet"
    tree = raw / "tiny-imagenet-200"
    with zipfile.ZipFile(raw / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted(tree.rglob("*")):
            archive.write(path, path.relative_to(raw))
    preparing.shutil.rmtree(tree)
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert "tiny-imagenet-200.zip is damaged" in message and TINY_IMAGENET.checksum in message

    checksum = f"md5:{hashlib.md5((raw / 'tiny-imagenet-200.zip').read_bytes()).hexdigest()}"
    with monkeypatch.context() as known:
        known.setattr(
            "sfw_dist.data.datasets.image_sets.unpacked",
            lambda remote, parent, top: _unpacked(remote, parent, checksum),
        )
        assert read_manifest(prepare("tiny_imagenet", tiny)).counts == {"train": 12, "test": 6}


def _unpacked(remote: Remote, parent: Path, checksum: str) -> Path:
    from sfw_dist.data.datasets.array_sets import unpacked

    return unpacked(replace(remote, checksum=checksum), parent, "tiny-imagenet-200")


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt", "train/n02/n02_boxes.txt"])
def test_a_list_that_is_missing_or_strange_is_named(tiny: Path, file: str) -> None:
    """A KeyError or FileNotFoundError from within; or a class without images."""
    path = tiny / "raw" / "tiny_imagenet" / "tiny-imagenet-200" / file
    whole = path.read_text()
    path.write_text("strange\n")
    error_of(lambda: prepare("tiny_imagenet", tiny))
    path.write_text(whole + whole.splitlines()[0])
    assert f"{path} is damaged ({whole.split()[0]} is in 2 lines)" in error_of(lambda: prepare("tiny_imagenet", tiny))
    path.unlink()
    assert f"{path} cannot be read (missing)" in error_of(lambda: prepare("tiny_imagenet", tiny))


def test_imagefolder_is_scaled_and_cropped(tmp_path: Path) -> None:
    """The image is squeezed, or cropped at a corner, or the size is not what the manifest tells."""
    folder = tmp_path / "raw" / "imagefolder"
    save_image(folder / "train" / "b" / "deep" / "x.png", 50, size=(40, 20))
    save_image(folder / "train" / "a" / "y.jpg", 100)
    save_image(folder / "val" / "b" / "z.png", 7, size=(16, 16))
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200  # what the centre crop keeps
    Image.fromarray(wide).save(folder / "train" / "b" / "w.png")
    prepared = prepare("imagefolder", tmp_path, options=Options(size=(16, 16)))
    manifest = read_manifest(prepared)
    assert manifest.image_shape == (3, 16, 16) and manifest.classes == ("a", "b")
    np.testing.assert_array_equal(np.load(prepared / "train_labels.npy"), [0, 1, 1])
    images = np.load(prepared / "train_images.npy")
    assert images.shape == (3, 16, 16, 3) and images[2, :, 2:-2].min() == 200
    np.testing.assert_array_equal(
        np.load(prepared / "test_images.npy")[0], np.asarray(Image.open(folder / "val/b/z.png"))
    )
    larger = Options(size=(32, 32))
    assert "choose another --name or --root" in error_of(lambda: prepare("imagefolder", tmp_path, options=larger))
    prepare("imagefolder", tmp_path)


def test_imagefolder_mistakes_are_told(tmp_path: Path) -> None:
    """An empty class or a class of the test part alone is trained on."""
    folder = tmp_path / "raw" / "imagefolder"
    assert "train" in error_of(lambda: prepare("imagefolder", tmp_path))
    save_image(folder / "train" / "a" / "x.png", 1)
    assert "val" in error_of(lambda: prepare("imagefolder", tmp_path))
    save_image(folder / "val" / "b" / "x.png", 1)
    assert "'b'" in error_of(lambda: prepare("imagefolder", tmp_path))
    (folder / "train" / "b").mkdir()
    assert "holds no images" in error_of(lambda: prepare("imagefolder", tmp_path))


@pytest.mark.parametrize(
    ("folders", "taken", "left_alone"),
    [
        (["val/a", "val/b"], "val", ""),
        (["valid/a", "valid/b"], "valid", ""),
        (["validation/a", "validation/b"], "validation", ""),
        (["test/a", "test/b", "val/a", "val/b"], "test", "val (not needed)"),
        (["test", "val/a", "val/b"], "val", "test (holds no folders of classes)"),
        (["test/unknown", "val/a", "val/b"], "val", "test (has the class 'unknown', which {train} has not)"),
    ],
)
def test_the_test_part_is_the_first_with_labels(
    tmp_path: Path, folders: list[str], taken: str, left_alone: str
) -> None:
    """Fails when an unlabelled test/ stops the command, valid/ is unknown, or test/ wins over val/ without a word."""
    folder = tmp_path / "raw" / "imagefolder"
    for i, place in enumerate(["train/a", "train/b", *folders]):
        save_image(folder / place / "x.png", i)
    manifest = read_manifest(prepare("imagefolder", tmp_path))
    listed = json.loads((tmp_path / "imagefolder" / "test_files.json").read_text())
    assert listed == [f"raw/imagefolder/{taken}/{label}/x.png" for label in "ab"]
    expected = f"the test part is {folder / taken}; left alone: {folder}/{left_alone.format(train=folder / 'train')}"
    assert manifest.notes == ((expected,) if left_alone else ())


def test_a_class_without_test_images_is_told(tmp_path: Path) -> None:
    """Fails when nobody learns that the accuracy is that of fewer classes."""
    folder = tmp_path / "raw" / "imagefolder"
    for place in ("train/a", "train/b", "val/a"):
        save_image(folder / place / "x.png", 1)
    manifest = read_manifest(prepare("imagefolder", tmp_path))
    assert manifest.notes == (f"{folder}/val has no image of 1 class(es), the first is 'b'",)


def test_skip_bad_leaves_every_class_an_image(tmp_path: Path) -> None:
    """Fails when a class that has lost all of its training images is still one of the network's outputs."""
    folder = tmp_path / "raw" / "imagefolder"
    for place in ("train/a", "train/b", "val/a"):
        save_image(folder / place / "x.png", 1)
    (folder / "train/b/x.png").write_bytes(b"no image")
    message = error_of(lambda: prepare("imagefolder", tmp_path, options=Options(skip_bad=True)))
    assert "no training image of class 'b' can be used" in message and "train/b/x.png (not an image)" in message
