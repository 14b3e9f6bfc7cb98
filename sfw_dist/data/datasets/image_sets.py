"""Readers of the data sets that are folders of image files. They list the files, which are decoded later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sfw_dist.data.datasets.array_sets import Reader, raw_folder, unpacked
from sfw_dist.data.datasets.download import Remote
from sfw_dist.data.datasets.image_listing import Listing, list_classes, list_images
from sfw_dist.data.datasets.raw import ImageFiles, RawData, RawPart
from sfw_dist.errors import UserError, named

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Where the test part of an ``imagefolder`` is looked for."""
Samples = list[tuple[Path, str]]
"""``(file, class)``"""


def tiny_imagenet_reader(name: str, remote: Remote, top: str) -> Reader:
    """Make a reader of Tiny-ImageNet's layout. Its validation images are the test part: its test images have no labels.

    ``wnids.txt`` names the classes, which are sorted; ``train/WNID/WNID_boxes.txt`` and ``val/val_annotations.txt``
    list the files, so that a missing one is known by name. Validation images that a script has sorted into folders,
    ``val/WNID`` or ``val/WNID/images``, are found there; then their list may be missing.

    Args:
        name: of the data set.
        remote: its archive.
        top: the folder in the archive.
    """

    def read(root: Path) -> RawData:
        folder = unpacked(remote, raw_folder(root, name), top)
        classes = tuple(sorted(line[0] for line in _table(folder / "wnids.txt")))
        boxes = {wnid: folder / "train" / wnid / f"{wnid}_boxes.txt" for wnid in classes}
        train = [
            (folder / "train" / wnid / "images" / line[0], wnid)
            for wnid, listed in boxes.items()
            for line in _table(listed)
        ]
        annotations = folder / "val" / "val_annotations.txt"
        sorted_folders = [wnid for wnid in classes if (folder / "val" / wnid).is_dir()]
        if sorted_folders and not annotations.exists():
            test = [
                (file, wnid) for wnid in sorted_folders for file in sorted(list_images(folder / "val" / wnid).images)
            ]
        else:
            test = _annotated(annotations, classes, bool(sorted_folders))
        lists = (folder / "wnids.txt", *boxes.values(), *filter(Path.exists, [annotations]))
        return listed(folder, train, test, classes)._replace(files=lists)

    return read


def _annotated(annotations: Path, classes: tuple[str, ...], is_sorted: bool) -> Samples:
    """The validation images that a list names.

    Args:
        annotations: the list.
        classes: that it may name.
        is_sorted: whether a script has moved images into the folders of their classes.

    Raises:
        UserError: the list is damaged.
    """
    lines, val = _table(annotations), annotations.parent
    strange = next((line for line in lines if len(line) < 2 or line[1] not in classes), None)
    if strange:
        raise UserError(f"{annotations} is damaged (no class of wnids.txt in {strange}): {_again(annotations)}")
    samples: Samples = []
    for name, wnid, *_ in lines:
        path = val / "images" / name
        if is_sorted:
            moved = (path, val / wnid / "images" / name, val / wnid / name)
            path = next((place for place in moved if place.exists()), path)
        samples.append((path, wnid))
    return samples


def read_imagefolder(root: Path) -> RawData:
    """List ``root/raw/imagefolder`` as `read_class_folders` does.

    Args:
        root: folder of all data sets.
    """
    return read_class_folders(raw_folder(root, "imagefolder"))


def read_class_folders(folder: Path, *, split_later: bool = False) -> RawData:
    """List ``folder/PART/CLASS/…``.

    The parts are ``train`` and the first of ``test``, ``val``, ``valid`` and ``validation`` whose folders are classes
    of ``train``; the classes are the folders of ``train``, sorted. What counts as an image is said by
    :func:`~sfw_dist.data.datasets.image_listing.list_classes`.

    Args:
        folder: of the images.
        split_later: whether the test part is split off later. Then ``train``, or ``folder/CLASS/…`` where there is no
            ``train``, holds all images.
    """
    if split_later:
        taken = train_folder(folder)
        train, test, notes = _class_folders(taken), None, []
        others = [name for name in TEST_FOLDERS if taken != folder and (folder / name).is_dir()]
        if others:
            raise UserError(f"{folder / others[0]} has images to test on: leave --test-fraction out, or move it away")
    else:
        train = _class_folders(folder / "train")
        test_folder, note = _test_folder(folder, _classes(train))
        test = _class_folders(test_folder)
        notes = [note] if note else []
        without = sorted(set(_classes(train)) - {label for _, label in test.samples})
        if without:
            notes.append(f"{test_folder} has no image of {len(without)} class(es), the first is {without[0]!r}")
    left_out = (*train.left_out, *(test.left_out if test else ()))
    raw = listed(folder, train.samples, test.samples if test else None, _classes(train))
    return raw._replace(left_out=left_out, notes=tuple(notes))


def train_folder(folder: Path) -> Path:
    """Where the classes are in a folder without a test part: ``folder/train`` if there is one, or the folder itself."""
    return folder / "train" if (folder / "train").is_dir() else folder


def image_files(raw: RawData) -> list[Path]:
    """The image files of all parts."""
    return [path for part in raw.parts if isinstance(part.images, ImageFiles) for path in part.images.paths]


def _classes(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted({label for _, label in listing.samples}))


def _test_folder(folder: Path, classes: tuple[str, ...]) -> tuple[Path, str]:
    """The folder of the test part, and a note on those that are left alone.

    Raises:
        UserError: there is none, or each has a class that ``train`` has not, or no classes.
    """
    there = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
    problems = {path: _problem(path, classes) for path in there}
    taken = next((path for path in there if not problems[path]), None)
    if taken is None:
        if there:
            raise UserError(f"{there[0]} {problems[there[0]]}: put the images of each class into {there[0]}/CLASS")
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise UserError(
            f"{folder} holds {names} and no images to test on: put them into {folder}/val/CLASS, or split some "
            "off with --test-fraction 0.2"
        )
    others = [f"{path} ({problems[path] or 'not needed'})" for path in there if path != taken]
    return taken, f"the test part is {taken}; left alone: {', '.join(others)}" if others else ""


def _problem(part: Path, classes: tuple[str, ...]) -> str:
    """Why a folder is no test part, or an empty text."""
    folders = sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [name for name in folders if name not in classes]
    if unknown:
        return f"has the class {unknown[0]!r}, which {part.parent / 'train'} has not"
    return "" if folders else "holds no folders of classes"


def _class_folders(part: Path) -> Listing:
    if not part.is_dir():
        raise UserError(f"{part} is not there: {_where_images_are(part)}")
    listing = list_classes(part)
    if not listing.samples:
        raise UserError(f"{part} holds no folders of images: put them into {part}/CLASS")
    return listing


def _where_images_are(part: Path) -> str:
    """What to move where, or what to put there, when a part of an ``imagefolder`` is not there."""
    folder = part.parent
    raw, root = folder.parent, folder.parent.parent
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for path in inside:
        if path.name.lower().startswith(part.name):
            return f"rename {path} to {part}"
        if (path / part.name).is_dir():
            return f"move what is in {path} to {folder}"
    for place in (root / folder.name, raw, root):
        if (place / part.name).is_dir():
            return f"move {part.name} and the folder of test images from {place} to {folder}"
    if inside:
        return (
            f"if {named([path.name for path in inside])} are classes, split a test part off with --test-fraction 0.2; "
            f"else put images into {folder}/train/CLASS and {folder}/val/CLASS"
        )
    return f"put images into {folder}/train/CLASS and {folder}/val/CLASS"


def listed(base: Path, train: Samples, test: Samples | None, classes: tuple[str, ...]) -> RawData:
    """The raw data of listed image files.

    Args:
        base: the folder of the raw data.
        train: ``(file, class)`` of each sample; likewise ``test``.
        test: ``None`` if nobody has decided yet what to test on.
        classes: in the order of their numbers.
    """
    number = {label: i for i, label in enumerate(classes)}

    def part(samples: Samples) -> RawPart:
        labels = np.array([number[label] for _, label in samples], np.int64)
        return RawPart(ImageFiles(tuple(file for file, _ in samples), base), labels)

    return RawData(part(train), None if test is None else part(test), classes)


def _table(path: Path) -> list[list[str]]:
    """The fields, separated by tabs or spaces, of every line that is not blank.

    Raises:
        UserError: the file cannot be read, or two lines have the same first field.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{path} cannot be read ({reason}): {_again(path)}") from None
    table = [line.split() for line in lines if line.strip()]
    names = Counter(line[0] for line in table)
    repeated = next((name for name, times in names.items() if times > 1), None)
    if repeated:
        raise UserError(f"{path} is damaged ({repeated} is in {names[repeated]} lines): {_again(path)}")
    return table


def _again(path: Path) -> str:
    return f"unpack {path.name} again, or delete the data set's folder below raw to have it unpacked"
