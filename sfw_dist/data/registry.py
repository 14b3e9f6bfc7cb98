"""The data sets: what each one is, and where its raw arrays come from.

To add one, write a function from the root folder to :class:`RawArrays` and an entry in :data:`DATASETS`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfw_dist.data.idx import read_idx
from sfw_dist.data.order import split_validation
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder, replacing


class RawArrays(NamedTuple):
    """Images uint8 ``(n, height, width, channels)``, labels int64 ``(n,)``."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A data set that :func:`sfw_dist.data.prepare.prepare` can make."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    source: str
    """Where it comes from, for people."""
    read: Callable[[Path], RawArrays]
    """From the root folder to the raw arrays; raises :class:`UserError` when they cannot be had."""
    embedded: bool = False
    """Whether it comes with a dependency of ours, so that it can be prepared at any time, anywhere."""


def find_dataset(name: str) -> Dataset:
    """The data set called ``name``; raises :class:`UserError` with the known names when there is none."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: write one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def read_digits(root: Path) -> RawArrays:
    """The 1,797 digits within scikit-learn, 0..16 stretched to 0..240; a fixed stratified split, 75 % for training."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"data set 'digits' comes with scikit-learn ({error}): pip install scikit-learn") from None
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int64)
    train, test = split_validation(labels, fraction=0.25, seed=0)
    return RawArrays(images[train], labels[train], images[test], labels[test])


FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SHA256 = {  # of the uncompressed content, which every archive of it shares
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_LARGEST = 16 + 60_000 * 28 * 28
"""Bytes of the largest uncompressed file."""


def read_fashion_mnist(root: Path) -> RawArrays:
    """The IDX files in ``root/raw/fashion_mnist``, else of Debian's package, else downloaded into the former."""
    return RawArrays(*_read_fashion_mnist_split("train", root), *_read_fashion_mnist_split("t10k", root))


def _read_fashion_mnist_split(split: str, root: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_path = _locate_fashion_mnist(f"{split}-images-idx3-ubyte", root)
    labels_path = _locate_fashion_mnist(f"{split}-labels-idx1-ubyte", root)
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{images_path} holds images of {images.shape[1:]}, wanted (28, 28): replace it")
    if len(images) != len(labels):
        raise UserError(f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels: replace both")
    if labels.max(initial=0) > 9:
        raise UserError(f"{labels_path} holds the label {labels.max()}, wanted 0 to 9: replace it")
    return images[..., np.newaxis], labels.astype(np.int64)


def _locate_fashion_mnist(stem: str, root: Path) -> Path:
    own = root / "raw" / "fashion_mnist"
    candidates = (folder / f"{stem}{suffix}" for folder in (own, FASHION_MNIST_DEBIAN) for suffix in (".gz", ""))
    found = next((path for path in candidates if path.exists()), None)
    return found or _download_fashion_mnist(stem, own)


def _download_fashion_mnist(stem: str, folder: Path) -> Path:
    """Fetch one file; nothing is kept unless its content has the known checksum."""
    url, wanted = f"{FASHION_MNIST_URL}{stem}.gz", FASHION_MNIST_SHA256[stem]
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            archive = response.read(FASHION_MNIST_LARGEST)
        content = gzip.GzipFile(fileobj=io.BytesIO(archive)).read(FASHION_MNIST_LARGEST)
        found = hashlib.sha256(content).hexdigest()
        if found != wanted:
            raise ValueError(f"its content has sha256 {found}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"cannot download {url} ({error}; wanted content with sha256 {wanted}): "
            f"apt-get install dataset-fashion-mnist, or put {stem}.gz into {folder}"
        ) from None
    make_folder(folder)
    target = folder / f"{stem}.gz"
    with replacing(target) as file:
        file.write(archive)
    return target


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="digits",
            classes=tuple("0123456789"),
            image_shape=(1, 8, 8),
            source="scikit-learn's load_digits: 1,797 handwritten digits (UCI Optical Recognition, test part)",
            read=read_digits,
            embedded=True,
        ),
        Dataset(
            name="fashion_mnist",
            classes=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            image_shape=(1, 28, 28),
            source="Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), https://github.com/zalandoresearch/fashion-mnist",
            read=read_fashion_mnist,
        ),
    )
}
