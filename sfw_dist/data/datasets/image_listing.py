"""Lists the image files of a folder of classes, and names everything in it that is left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from sfw_dist.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jfif", ".jp2")
)
"""The names that torchvision's ImageFolder takes for images, and four more formats that Pillow decodes."""


class Listing(NamedTuple):
    """What a folder of classes holds."""

    samples: list[tuple[Path, str]]
    """``(file, class)``, sorted. A link to nowhere counts as an image that is missing."""
    left_out: list[str]
    """``path (reason)`` of each file that is no sample; a hidden folder stands for the files in it."""


class Images(NamedTuple):
    """What the folder of one class holds."""

    images: list[Path]
    left_out: list[str]


def list_classes(part: Path) -> Listing:
    """List ``part/CLASS/…`` by the rules of torchvision's ImageFolder, but without hidden files and folders.

    Each folder, or link to one, is a class. Its images are the files at any depth whose names end as images do; links
    to folders are followed.

    Args:
        part: the folder of classes.

    Raises:
        UserError: a class has no images; or a folder cannot be read, is a link to nowhere or contains itself.
    """
    samples: list[tuple[Path, str]] = []
    left_out: list[str] = []
    for entry in _entries(part):
        path = Path(entry.path)
        if entry.name.startswith("."):
            left_out.append(_hidden(path))
        elif not _is_folder(path):
            left_out.append(f"{path} (in no folder of a class)")
        else:
            files, others = list_images(path, (os.path.realpath(part),))
            if not files:
                others_told = f"; left out: {others[0]}" if others else ""
                raise UserError(
                    f"{path} holds no images{others_told}: remove it, or put the images of class {path.name!r} into it"
                )
            samples += [(file, path.name) for file in sorted(files)]
            left_out += others
    return Listing(samples, left_out)


def list_images(folder: Path, above: tuple[str, ...] = ()) -> Images:
    """List the images of one class.

    Args:
        folder: to list.
        above: the real paths of the folders that it is in, which no link may lead to.

    Raises:
        UserError: a folder cannot be read, is a link to nowhere or contains itself.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that it is in: remove it")
    images: list[Path] = []
    left_out: list[str] = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.name.startswith("."):
            left_out.append(_hidden(path))
        elif _is_folder(path):
            below, others = list_images(path, (*above, real))
            images += below
            left_out += others
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            left_out.append(f"{path} (not named as an image)")
        elif path.exists() and not path.is_file():
            left_out.append(f"{path} (not a file)")
        else:
            images.append(path)
    return Images(images, left_out)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder, or a link to one; a link to nowhere that no image has the name of may have been one.

    Raises:
        UserError: such a link.
    """
    if path.is_symlink() and not path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend the link or remove it")
    return path.is_dir()


def _hidden(path: Path) -> str:
    files = sum(len(names) for _, _, names in os.walk(path)) if path.is_dir() else 1
    return f"{path} (hidden{f', {files} file(s)' if path.is_dir() else ''})"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give yourself the right, or remove it") from None
