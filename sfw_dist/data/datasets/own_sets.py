"""Data sets of the user's own: a folder of images, a table of images, a function, or values in memory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sfw_dist.data.datasets.csv_set import Table, read_table
from sfw_dist.data.datasets.image_sets import image_files, read_class_folders
from sfw_dist.data.datasets.raw import Items, RawData, RawPart
from sfw_dist.data.datasets.registry import Dataset
from sfw_dist.data.decode import LABEL_KEYS
from sfw_dist.errors import UserError, import_path

TEST_NAMES = ("test", "validation", "valid", "val")
"""What a function may call the part to test on, the first that is there."""
_REMEDY = (
    "name a function without arguments that returns {'train': dataset, 'test': dataset}, as package.module:function"
)

_own_set = partial(Dataset, classes=None, image_shape=None, any_size=True)
"""Classes and format are what the raw data have."""


def folder_set(name: str, folder: Path, *, split_later: bool) -> Dataset:
    """A folder of classes, as :func:`~sfw_dist.data.datasets.image_sets.read_class_folders` reads it.

    Args:
        name: of the data set.
        folder: of the images.
        split_later: whether the test part is split off later.
    """
    folder = folder.absolute()

    def read(root: Path) -> RawData:
        return read_class_folders(folder, split_later=split_later)

    return _own_set(
        name=name,
        source=f"images in {folder}",
        read=read,
        list_files=lambda root: image_files(read(root)),
        arguments=(str(folder), "--name", name),
    )


def table_set(name: str, folder: Path, table: Table) -> Dataset:
    """A table of images, as :func:`~sfw_dist.data.datasets.csv_set.read_table` reads it.

    Args:
        name: of the data set.
        folder: of the images.
        table: which images, and their classes.
    """
    folder = folder.absolute()
    columns = ("--image-column", table.image_column, "--label-column", table.label_column)
    split = ("--split-column", table.split_column) if table.split_column else ()
    return _own_set(
        name=name,
        source=f"images in {folder}, listed in {table.path.absolute()}",
        read=lambda root: read_table(folder, table),
        arguments=(str(folder), "--name", name, "--csv", str(table.path.absolute()), *columns, *split),
    )


def function_set(name: str, path: str) -> Dataset:
    """What a function returns; see `read_values`.

    Args:
        name: of the data set.
        path: of the function, as ``package.module:function``.

    Raises:
        UserError: it cannot be imported.
    """
    function = import_path(path, "data set", _REMEDY)
    if not callable(function):
        raise UserError(f"data set {path} is no function: {_REMEDY}")
    file = getattr(sys.modules[path.partition(":")[0]], "__file__", None)

    def read(root: Path) -> RawData:
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise UserError(f"{path}: {error}: {_REMEDY}") from None
        values = function()
        if not isinstance(values, Mapping):
            raise UserError(f"{path} returned a {type(values).__name__}: {_REMEDY}")
        return read_values(path, values)._replace(files=(Path(file).absolute(),) if file else ())

    return _own_set(
        name=name,
        source=f"what {path} returned",
        read=read,
        arguments=(path, "--name", name),
    )


def values_set(name: str, parts: Mapping[str, Any]) -> Dataset:
    """Values in memory; see `read_values`."""
    return _own_set(
        name=name,
        source="written by sfw_dist.data.write",
        read=lambda root: read_values(name, parts),
        arguments=None,
    )


def read_values(described: str, parts: Mapping[str, Any]) -> RawData:
    """Both parts of a data set from Python values.

    Args:
        described: what messages call it.
        parts: ``train``, and one of ``test``, ``validation``, ``valid`` and ``val``, each a Dataset with a length
            whose items are ``(image, label)`` or dictionaries (as those of a ``DatasetDict`` of Hugging Face), or a
            pair ``(images, labels)``; and, if wanted, ``classes``, their names.

    Raises:
        UserError: a part is missing or no such value.
    """
    if "train" not in parts:
        raise UserError(f"{described} has {', '.join(map(str, parts)) or 'nothing'} and no 'train': {_REMEDY}")
    tests = [name for name in TEST_NAMES if parts.get(name) is not None]
    others = [str(name) for name in parts if name not in ("train", "classes", *tests[:1]) and parts[name] is not None]
    notes = []
    if tests and (others or tests[0] != "test"):
        notes = [f"the test part is {tests[0]!r}{'; left alone: ' if others else ''}{', '.join(others)}"]
    names = _names_of_classes(described, parts.get("classes"), parts["train"])
    test_names = None if parts.get("classes") is not None or not tests else _class_names(parts[tests[0]])
    differ = test_names is not None and names is not None and tuple(test_names) != names
    train = _part(described, "train", parts["train"], names if differ else None)
    test = _part(described, tests[0], parts[tests[0]], tuple(test_names or ()) if differ else None) if tests else None
    return RawData(train, test, names, notes=tuple(notes))


def _names_of_classes(described: str, given: Any, train: Any) -> tuple[str, ...] | None:
    names = _class_names(train) if given is None else given
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"classes of {described} are {names!r}: give a list of names, in the order of their numbers")
    return tuple(names)


def _part(described: str, name: str, value: Any, names: tuple[str, ...] | None) -> RawPart:
    if isinstance(value, Tensor | np.ndarray | str):
        raise UserError(f"{name} of {described} is a {type(value).__name__}: give the pair (images, labels)")
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor | np.ndarray | list) for v in value):
        images, labels = value
        if len(images) != len(labels):
            raise UserError(f"{name} of {described} has {len(images)} images and {len(labels)} labels: give as many")
        return RawPart(Items(_Pairs(images, labels), name, names), None)
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise UserError(
            f"{name} of {described} is a {type(value).__name__} without length or items: give a Dataset that has both, "
            "or the pair (images, labels)"
        )
    return RawPart(Items(value, name, names), None)


class _Pairs:
    """Images and labels as a Dataset."""

    def __init__(self, images: Any, labels: Any) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._images[index], self._labels[index]


def _class_names(dataset: Any) -> Sequence[str] | None:
    """The names that torchvision's and Hugging Face's data sets know, where the labels are their numbers."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return next((getattr(features[key], "names", None) for key in LABEL_KEYS if key in features), None)
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return names
    return None
