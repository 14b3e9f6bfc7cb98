"""Readers of the data sets that are folders of image files. They list the files, which are decoded later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfw_dist.data.datasets.array_sets import Reader, raw_folder, unpacked
from sfw_dist.data.datasets.download import Remote
from sfw_dist.data.datasets.image_listing import Listing, list_classes
from sfw_dist.data.datasets.raw import ImageFiles, RawArrays
from sfw_dist.errors import UserError

_Samples = list[tuple[Path, str]]
"""``(file, class)``"""


def tiny_imagenet_reader(name: str, remote: Remote, top: str) -> Reader:
    """Make a reader of Tiny-ImageNet's layout. Its validation images are the test part: its test images have no labels.

    ``wnids.txt`` names the classes, which are sorted; ``train/WNID/WNID_boxes.txt`` and ``val/val_annotations.txt``
    list the files, so that a missing one is known by name.

    Args:
        name: of the data set.
        remote: its archive.
        top: the folder in the archive.
    """

    def read(root: Path) -> RawArrays:
        folder = unpacked(remote, raw_folder(root, name), top)
        classes = tuple(sorted(line[0] for line in _table(folder / "wnids.txt")))
        train = [
            (folder / "train" / wnid / "images" / line[0], wnid)
            for wnid in classes
            for line in _table(folder / "train" / wnid / f"{wnid}_boxes.txt")
        ]
        annotations = folder / "val" / "val_annotations.txt"
        lines = list(_table(annotations))
        strange = next((line for line in lines if len(line) < 2 or line[1] not in classes), None)
        if strange:
            raise UserError(f"{annotations} is damaged (no class of wnids.txt in {strange}): {_again(annotations)}")
        return _listed(train, [(folder / "val" / "images" / line[0], line[1]) for line in lines], classes, fit=False)

    return read


def read_imagefolder(root: Path) -> RawArrays:
    """List ``root/raw/imagefolder/PART/CLASS/…``.

    The parts are ``train`` and ``test`` (else ``val``); the classes are the folders of ``train``, sorted. What counts
    as an image is said by :func:`~sfw_dist.data.datasets.image_listing.list_classes`.

    Args:
        root: folder of all data sets.
    """
    folder = raw_folder(root, "imagefolder")
    test_folder = folder / ("test" if (folder / "test").is_dir() else "val")
    train, test = (_class_folders(part) for part in (folder / "train", test_folder))
    classes = tuple(sorted({label for _, label in train.samples}))
    unknown = sorted({label for _, label in test.samples} - set(classes))
    if unknown:
        raise UserError(f"{test_folder} has the class {unknown[0]!r}, which {folder / 'train'} has not: remove it")
    listed = _listed(train.samples, test.samples, classes, fit=True)
    return listed._replace(left_out=(*train.left_out, *test.left_out))


def _class_folders(part: Path) -> Listing:
    if not part.is_dir():
        raise UserError(f"{part} is not there: put images into {part.parent}/train/CLASS and {part.parent}/val/CLASS")
    listing = list_classes(part)
    if not listing.samples:
        raise UserError(f"{part} holds no folders of images: put them into {part}/CLASS")
    return listing


def _listed(train: _Samples, test: _Samples, classes: tuple[str, ...], fit: bool) -> RawArrays:
    number = {label: i for i, label in enumerate(classes)}

    def part(samples: _Samples) -> tuple[ImageFiles, np.ndarray]:
        labels = np.array([number[label] for _, label in samples], np.int64)
        return ImageFiles(tuple(file for file, _ in samples), fit), labels

    return RawArrays(*part(train), *part(test), classes)


def _table(path: Path) -> Iterator[list[str]]:
    """The fields, separated by tabs or spaces, of every line that is not blank."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{path} cannot be read ({reason}): {_again(path)}") from None
    return (line.split() for line in lines if line.strip())


def _again(path: Path) -> str:
    return f"unpack {path.name} again, or delete the data set's folder below raw to have it unpacked"
