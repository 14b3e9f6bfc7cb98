"""CIFAR's Python version, as torchvision leaves it: pickles, of which arrays and plain values alone are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfw_dist.data.datasets.download import Remote
from sfw_dist.data.datasets.raw import RawData, RawPart
from sfw_dist.errors import UserError

_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # whatever it is called in this version of numpy
_ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_REMEDY = "unpack its archive again, or delete its folder to fetch the binary version"


class PythonVersion(NamedTuple):
    """The files of a CIFAR data set in its Python version."""

    remote: Remote
    """Its archive."""
    top: str
    """The folder in the archive."""
    train: tuple[str, ...]
    test: str
    meta: str
    """The file of the class names."""
    labels: str
    """The key of the labels in the files of images."""
    names: str
    """The key of the class names in ``meta``."""


def read_python_version(folder: Path, version: PythonVersion) -> RawData:
    """Read the pickles in ``folder``.

    Raises:
        UserError: a file is missing or damaged, or its pickle holds anything but arrays and plain values.
    """
    names = _load(folder / version.meta, version.names)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{folder / version.meta} is damaged (no list of names): {_REMEDY}")
    parts = [
        [_read_images(folder / file, version.labels, len(names)) for file in files]
        for files in (version.train, (version.test,))
    ]
    train, test = (
        RawPart(np.concatenate([images for images, _ in part]), np.concatenate([labels for _, labels in part]))
        for part in parts
    )
    files = tuple(folder / file for file in (*version.train, version.test, version.meta))
    return RawData(train, test, tuple(names), files)


def _read_images(path: Path, key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    pixels, labels = _load(path, "data"), _load(path, key)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3 * 32 * 32,)):
        raise UserError(f"{path} is damaged (data is no array of images): {_REMEDY}")
    if not (isinstance(labels, list) and len(labels) == len(pixels) and set(labels) <= set(range(classes))):
        raise UserError(f"{path} is damaged ({key} are not {len(pixels)} labels below {classes}): {_REMEDY}")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Finds what arrays are made of and nothing else, so that no pickle can run code of its own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ARRAY_PARTS[module, name]


def _load(path: Path, key: str) -> object:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        return content[key]
    except Exception as error:  # an unpickler of damaged bytes may raise anything
        reason = "missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason or type(error).__name__}): {_REMEDY}") from None
