"""Raw files as other programs leave them: they are taken, or the error says what to move where."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sfw_dist.data.datasets.array_sets import cifar_reader, svhn_reader
from sfw_dist.data.datasets.cifar_python import PythonVersion
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare
from tests.support.downloads import error_of, forbidden, remote_of
from tests.support.raw_data import images_of, save_image

TOP = "cifar-10-batches-py"


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did: the published files are of it."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = _save_string


def pickled(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def cifar_files() -> dict[str, bytes]:
    """Two training files of 3 images, one test file of 2."""
    rng = np.random.default_rng(0)
    files = {"batches.meta": pickled({"label_names": ["cat", "dog"], "num_vis": 3072})}
    for name, n in (("data_batch_1", 3), ("data_batch_2", 3), ("test_batch", 2)):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        files[name] = pickled({"data": pixels, "labels": [i % 2 for i in range(n)], "batch_label": name})
    return files


def cifar(root: Path, archive: bytes) -> Any:
    version = PythonVersion(
        remote_of(archive, "c.tar.gz"),
        TOP,
        ("data_batch_1", "data_batch_2"),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    )
    read = cifar_reader("cifar10", remote_of(b"", "b.tar.gz"), "bin", ["a"], "t", "names", 1, version)
    return read(root)


@pytest.mark.parametrize("place", ["raw/cifar10", "raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_from_its_python_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, packed: bool
) -> None:
    """Fails when what torchvision has downloaded is downloaded once more, or its channels are mixed up."""
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in cifar_files().items():
            info = tarfile.TarInfo(f"{TOP}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if not packed:
                (folder / TOP).mkdir(exist_ok=True)
                (folder / TOP / name).write_bytes(content)
    if packed:
        (folder / "c.tar.gz").write_bytes(archive.getvalue())
    raw = cifar(tmp_path, archive.getvalue())
    assert raw.classes == ("cat", "dog") and raw.train.labels.tolist() == [0, 1, 0, 0, 1, 0]
    assert raw.train.images.shape == (6, 32, 32, 3) and raw.test.images.shape == (2, 32, 32, 3)
    first = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    assert raw.train.images[1, 3, 7, 2] == first[1, 2 * 1024 + 3 * 32 + 7]


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("data_batch_2", pickle.dumps({"data": _Attack(), "labels": []}), "it asks for posix.mkdir"),
        ("test_batch", pickled({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}), "labels below 2"),
        ("test_batch", pickled({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}), "no array of images"),
        ("batches.meta", pickled({"label_names": 3}), "no list of names"),
        ("batches.meta", b"\x80\x02garbage", "is damaged"),
        ("data_batch_1", b"", "is damaged"),
        ("data_batch_1", None, "missing"),
    ],
)
def test_a_strange_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes | None, told: str
) -> None:
    """Fails when reading a data set runs the code that somebody put into its pickle, or ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "raw" / "cifar10" / TOP
    folder.mkdir(parents=True)
    for name, whole in cifar_files().items():
        (folder / name).write_bytes(whole)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    message = error_of(lambda: cifar(tmp_path, b""))
    assert str(folder / file) in message and told in message
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("layout", ["torchvision", "torchvision plain", "beside", "raw", "kaggle", "kaggle folders"])
def test_mnist_files_of_other_programs_are_taken(fashion_root: Path, layout: str) -> None:
    """Fails when the files lie there under other names and are downloaded once more (here: an error)."""
    own = fashion_root / "raw" / "fashion_mnist"
    expected = DATASETS["fashion_mnist"].read(fashion_root)
    folders = {"torchvision": "FashionMNIST/raw", "torchvision plain": "FashionMNIST/raw", "raw": "raw"}
    for path in list(own.iterdir()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        stem = path.name.removesuffix(".gz")
        path.unlink()
        target = {
            "torchvision": fashion_root / "FashionMNIST" / "raw" / f"{stem}.gz",
            "torchvision plain": fashion_root / "raw" / "FashionMNIST" / "raw" / stem,
            "beside": own / "FashionMNIST" / "raw" / stem,
            "raw": own / folders["raw"] / stem,
            "kaggle": own / stem.replace("-idx", ".idx"),
            "kaggle folders": own / stem / stem,
        }[layout]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(content) if target.suffix == ".gz" else content)
    raw = DATASETS["fashion_mnist"].read(fashion_root)
    np.testing.assert_array_equal(raw.train.images, expected.train.images)
    np.testing.assert_array_equal(raw.test.labels, expected.test.labels)


def test_svhn_is_found_where_torchvision_puts_it(tmp_path: Path) -> None:
    """Fails when files in the data root are downloaded once more."""
    from scipy.io import savemat

    images = np.zeros((32, 32, 3, 10), np.uint8)
    savemat(tmp_path / "m.mat", {"X": images, "y": np.arange(1, 11, dtype=np.uint8)[:, np.newaxis]})
    remote = remote_of((tmp_path / "m.mat").read_bytes(), "m.mat")
    assert len(svhn_reader("svhn", remote, remote)(tmp_path).train.labels) == 10


@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("keep_list", [True, False])
def test_sorted_validation_images_are_found(tiny: Path, inner: str, keep_list: bool) -> None:
    """Fails when Tiny-ImageNet as scripts for ImageFolder leave it is refused, or images get others' labels."""
    expected = read_manifest(prepare("tiny_imagenet", tiny)).counts
    images, labels = (np.load(tiny / "tiny_imagenet" / f"test_{what}.npy") for what in ("images", "labels"))
    val = images_of(tiny).parents[2] / "val"
    annotations = val / "val_annotations.txt"
    for line in annotations.read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (val / wnid / inner).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / inner / name)
    if not keep_list:
        annotations.unlink()
        (val / "images").rmdir()
    assert read_manifest(prepare("tiny_imagenet", tiny, again=True)).counts == expected
    again, labels_again = (np.load(tiny / "tiny_imagenet" / f"test_{what}.npy") for what in ("images", "labels"))
    order = np.argsort(images.mean(axis=(1, 2, 3)))
    order_again = np.argsort(again.mean(axis=(1, 2, 3)))
    np.testing.assert_array_equal(again[order_again], images[order])
    np.testing.assert_array_equal(labels_again[order_again], labels[order])


@pytest.mark.parametrize("place", ["raw/tiny_imagenet/tiny-imagenet-200", "raw", "."])
def test_tiny_imagenet_is_found_nested_or_above(tiny: Path, place: str) -> None:
    """Fails when a folder that was unpacked into a folder of its own name, or into the root, is downloaded again."""
    folder = tiny / "raw" / "tiny_imagenet" / "tiny-imagenet-200"
    folder.rename(tiny / "moved")
    target = tiny / place / "tiny-imagenet-200"
    target.parent.mkdir(parents=True, exist_ok=True)
    (tiny / "moved").rename(target)
    assert read_manifest(prepare("tiny_imagenet", tiny)).counts == {"train": 12, "test": 6}


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("imagefolder", "move it to {root}/raw/imagefolder if it holds the raw files"),
        ("raw", "move train and the folder of test images from {root}/raw to {root}/raw/imagefolder"),
        (".", "move train and the folder of test images from {root} to {root}/raw/imagefolder"),
        ("raw/imagefolder/flowers", "move what is in {root}/raw/imagefolder/flowers to {root}/raw/imagefolder"),
    ],
)
def test_images_in_another_place_are_told_where_to_go(tmp_path: Path, place: str, told: str) -> None:
    """Fails when the images are there, one folder beside, and the error does not see them."""
    for part in ("train", "val"):
        save_image(tmp_path / place / part / "a" / "x.png", 1)
    assert told.format(root=tmp_path) in error_of(lambda: prepare("imagefolder", tmp_path))


def test_another_name_of_the_training_folder_is_told(tmp_path: Path) -> None:
    """Fails when Train/ is there and the error asks for train/ only."""
    folder = tmp_path / "raw" / "imagefolder"
    for part in ("Training", "val"):
        save_image(folder / part / "a" / "x.png", 1)
    assert f"rename {folder}/Training to {folder}/train" in error_of(lambda: prepare("imagefolder", tmp_path))
    shutil.move(folder / "Training", folder / "pictures")
    assert "if pictures, val are classes" in error_of(lambda: prepare("imagefolder", tmp_path))
