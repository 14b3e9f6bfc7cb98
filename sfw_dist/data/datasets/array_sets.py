"""Readers of the data sets that are published as a few binary files.

A reader takes the root folder and returns raw arrays. It takes the files in ``root/raw/NAME``, packed or unpacked, or
where other programs leave them, and downloads those that are missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfw_dist.data.datasets.cifar_python import PythonVersion, read_python_version
from sfw_dist.data.datasets.download import Remote, fetch, matches
from sfw_dist.data.datasets.idx import read_idx
from sfw_dist.data.datasets.raw import RawData, RawPart
from sfw_dist.data.datasets.unpack import unpack
from sfw_dist.data.sampler import split_validation
from sfw_dist.errors import UserError, needs_extra
from sfw_dist.files import make_folder

Reader = Callable[[Path], RawData]


def raw_folder(root: Path, name: str) -> Path:
    """Where the files of a data set are looked for and downloaded to."""
    return root / "raw" / name


def unpacked(remote: Remote, parent: Path, top: str) -> Path:
    """Unpack an archive unless its folder exists; download it unless it exists.

    Both are looked for in the two folders above ``parent`` too, the data root being the upper one.

    Args:
        remote: the archive.
        parent: folder of the archive, and of what it holds.
        top: the one folder that the archive holds.

    Returns:
        The folder of that name; the inner one if it holds one of its own name, as some programs unpack.
    """
    folder = find_unpacked(remote, parent, top)
    if folder is None:
        folder = parent / top
        unpack(fetch(remote, parent), folder)
    return folder / top if (folder / top).is_dir() else folder


def find_unpacked(remote: Remote, parent: Path, top: str) -> Path | None:
    """The same where the folder or its archive exists; else ``None``."""
    places = _places(parent)
    folder = next((place / top for place in places if (place / top).is_dir()), None)
    if folder is None:
        place = next((place for place in places if (place / remote.name).is_file()), None)
        if place is None:
            return None
        folder = parent / top
        make_folder(parent)
        unpack(fetch(remote, place), folder)
    return folder


def _places(own: Path) -> tuple[Path, ...]:
    """Where raw files are looked for: ``root/raw/NAME``, ``root/raw``, ``root``, where torchvision puts them."""
    return own, own.parent, own.parent.parent


def _fetched(remote: Remote, own: Path) -> Path:
    """Download a file to ``own`` unless it is in one of its places."""
    return fetch(remote, next((place for place in _places(own) if (place / remote.name).is_file()), own))


def read_digits(root: Path) -> RawData:
    """Read scikit-learn's 1,797 digits, 0..16 scaled to 0..240; a fixed stratified split, 75 % for training."""
    with needs_extra("data set 'digits'", "train"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int64)
    train, test = split_validation(labels, fraction=0.25, seed=0)
    return RawData(RawPart(images[train], labels[train]), RawPart(images[test], labels[test]))


# --- MNIST and Fashion-MNIST ------------------------------------------------------------------------------------------


def mnist_reader(
    name: str,
    url: str,
    checksums: Mapping[str, str],
    elsewhere: Path | None = None,
    alternative: str = "",
    torchvision: str = "MNIST",
) -> Reader:
    """Make a reader of four IDX files, gzipped or plain, with MNIST's file names, or those of its copy at Kaggle.

    Args:
        name: of the data set.
        url: of the folder from which ``<key>.gz`` is downloaded, unless the file exists.
        checksums: of the files, by key.
        elsewhere: a folder in which the files are looked for too.
        alternative: another way to get them, for the error message.
        torchvision: the name of its class for the data set, and of the folder in which it leaves the files.
    """

    def locate(stem: str, root: Path) -> Path:
        own = raw_folder(root, name)
        folders = [own, own / "raw", *(place / torchvision / "raw" for place in _places(own))]
        if elsewhere is not None:
            folders.append(elsewhere)
        kaggle = stem.replace("-idx", ".idx")
        names = (f"{stem}.gz", stem, f"{kaggle}.gz", kaggle, f"{stem}/{stem}")
        found = next((path for folder in folders for file in names if (path := folder / file).is_file()), None)
        if found is None:
            return fetch(Remote(f"{url}{stem}.gz", checksums[stem], alternative), own)
        if not matches(found, checksums[stem]):
            remedy = "replace it, or delete it to fetch the published one"
            raise UserError(f"{found} is damaged or not of {name} (wanted {checksums[stem]}): {remedy}")
        return found

    def read_part(split: str, root: Path) -> tuple[RawPart, list[Path]]:
        images_path, labels_path = (
            locate(f"{split}-images-idx3-ubyte", root),
            locate(f"{split}-labels-idx1-ubyte", root),
        )
        images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
        if images.shape[1:] != (28, 28):
            raise UserError(f"{images_path} holds images of {images.shape[1:]}, wanted (28, 28): replace it")
        if len(images) != len(labels):
            raise UserError(
                f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels: replace both"
            )
        _check_labels(labels, 10, labels_path)
        return RawPart(images[..., np.newaxis], labels.astype(np.int64)), [images_path, labels_path]

    def read(root: Path) -> RawData:
        train, train_files = read_part("train", root)
        test, test_files = read_part("t10k", root)
        return RawData(train, test, files=(*train_files, *test_files))

    return read


def _check_labels(labels: NDArray[Any], classes: int, path: Path) -> None:
    if labels.max(initial=0) >= classes:
        raise UserError(f"{path} holds the label {labels.max()}, wanted 0 to {classes - 1}: replace it")


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def cifar_reader(
    name: str,
    remote: Remote,
    top: str,
    train: Sequence[str],
    test: str,
    classes_file: str,
    label_bytes: int,
    python: PythonVersion | None = None,
) -> Reader:
    """Make a reader of the binary version, or of the Python version where only that exists.

    A record holds ``label_bytes``, the last of which is the label, and 3 × 32 × 32 pixels, channels first.

    Args:
        name: of the data set.
        remote: its archive.
        top: the folder in the archive.
        train: the files of training records.
        test: the file of test records.
        classes_file: the file of class names.
        label_bytes: bytes before the pixels of a record.
        python: the files of the Python version.
    """

    def read(root: Path) -> RawData:
        own = raw_folder(root, name)
        if python is not None and find_unpacked(remote, own, top) is None:
            folder = find_unpacked(python.remote, own, python.top)
            if folder is not None:
                return read_python_version(folder, python)
        folder = unpacked(remote, own, top)
        classes = tuple((_read(folder / classes_file)).decode().split())
        parts = [_read_records([folder / file for file in files], label_bytes) for files in (train, [test])]
        for files, (_, labels) in zip((train[-1], test), parts, strict=True):
            _check_labels(labels, len(classes), folder / files)
        files_read = tuple(folder / file for file in (*train, test, classes_file))
        return RawData(RawPart(*parts[0]), RawPart(*parts[1]), classes, files_read)

    return read


def _read_records(paths: Sequence[Path], label_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    size = label_bytes + 3 * 32 * 32
    records = []
    for path in paths:
        content = _read(path)
        if not content or len(content) % size:
            raise UserError(f"{path} has {len(content)} bytes, no multiple of {size}: delete its folder to reload it")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, size))
    joined = np.concatenate(records)
    images = joined[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), joined[:, label_bytes - 1].astype(np.int64)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): delete its folder to get it again") from None


# --- SVHN -------------------------------------------------------------------------------------------------------------


def svhn_reader(name: str, train: Remote, test: Remote) -> Reader:
    """Make a reader of cropped digits in MATLAB files: ``X`` ``(32, 32, 3, n)``, and ``y`` ``(n, 1)``; 10 is zero."""

    def read(root: Path) -> RawData:
        paths = [_fetched(remote, raw_folder(root, name)) for remote in (train, test)]
        return RawData(_read_svhn_part(paths[0]), _read_svhn_part(paths[1]), files=tuple(paths))

    return read


def _read_svhn_part(path: Path) -> RawPart:
    with needs_extra("data set 'svhn'", "train"):
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
        images, labels = content["X"], content["y"].ravel().astype(np.int64)
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
            raise ValueError(f"X is {images.dtype} {images.shape}, y has {len(labels)} labels")
        if labels.min(initial=1) < 1 or labels.max(initial=1) > 10:
            raise ValueError("labels are not 1 to 10")
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, zlib.error, MatReadError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to fetch it again") from None
    return RawPart(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10)
