"""Data sets that the tests of data share."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sfw_dist.config import DataConfig
from sfw_dist.data.datasets import registry
from sfw_dist.data.datasets.array_sets import mnist_reader
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.prepare import prepare
from sfw_dist.data.writing import image_writer
from tests.support.downloads import forbidden
from tests.support.jpeg_sets import OPTIONS, save_photos
from tests.support.raw_data import WNIDS, idx_bytes, save_image


@pytest.fixture
def config(digits: Path) -> DataConfig:
    """1,346 training samples, of them 136 for validation: 1,210, or 12 batches of 100; 451 test samples."""
    return DataConfig(root=str(digits), backend="ram", batch_size=100, crop_padding=2, flip=True)


@pytest.fixture
def damaged_root(digits: Path, tmp_path: Path) -> Path:
    """A copy of the prepared digits, to damage."""
    shutil.copytree(digits / "digits", tmp_path / "digits")
    return tmp_path


@pytest.fixture
def fashion_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Fashion-MNIST in the layout of the real one, training files gzipped, test files plain."""
    read = mnist_reader(
        "fashion_mnist",
        registry.FASHION_MNIST_URL,
        registry.FASHION_MNIST_CHECKSUMS,
        alternative="apt-get install x",
        torchvision="FashionMNIST",
    )
    counts = {"train": 30, "test": 10}
    monkeypatch.setitem(DATASETS, "fashion_mnist", replace(DATASETS["fashion_mnist"], read=read, counts=counts))
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    folder = tmp_path / "raw" / "fashion_mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28))),
            ("labels-idx1", np.arange(n) % 10),
        ):
            content, path = idx_bytes(array), folder / f"{split}-{kind}-ubyte"
            checksum = f"content-sha256:{hashlib.sha256(content).hexdigest()}"
            monkeypatch.setitem(registry.FASHION_MNIST_CHECKSUMS, path.name, checksum)
            if split == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny-ImageNet's layout with 3 classes of 4 training and 2 validation images, some of them grayscale."""
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    monkeypatch.setattr(image_writer, "CHUNK_SAMPLES", 5)
    counts = {"train": 12, "test": 6, "classes": 3}
    monkeypatch.setitem(DATASETS, "tiny_imagenet", replace(DATASETS["tiny_imagenet"], counts=counts))
    folder = tmp_path / "raw" / "tiny_imagenet" / "tiny-imagenet-200"
    annotations = []
    for i, wnid in enumerate(sorted(WNIDS)):
        names = [f"{wnid}_{j}.JPEG" for j in range(4)]
        for j, name in enumerate(names):
            save_image(folder / "train" / wnid / "images" / name, 60 * i + 10 * j, "L" if j == 3 else "RGB")
        boxes = "".join(f"{name}\t0\t0\t63\t63\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
        for j in range(2):
            save_image(folder / "val" / "images" / f"val_{2 * i + j}.JPEG", 200 + 10 * i + j, "L" if j else "RGB")
            annotations.append(f"val_{2 * i + j}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    return tmp_path


@pytest.fixture(scope="session")
def jpeg_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of photographs."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    save_photos(folder)
    return folder


@pytest.fixture(scope="session")
def jpeg_root(jpeg_photos: Path) -> Path:
    """The root of the set that is prepared from them, ``flowers``."""
    prepare(jpeg_photos, jpeg_photos.parent, name="flowers", options=OPTIONS)
    return jpeg_photos.parent
