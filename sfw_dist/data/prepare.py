"""Prepares a data set once, as memory-mappable ``.npy`` files, FFCV betons and a manifest; and verifies it later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sfw_dist.data.datasets.raw import ImageFiles, Images, RawArrays
from sfw_dist.data.datasets.registry import Dataset, find_dataset
from sfw_dist.data.decode import Decoded, decode
from sfw_dist.data.manifest import (
    MANIFEST,
    PARTS,
    FileRecord,
    Manifest,
    Part,
    beton_file,
    check_content,
    check_sizes,
    file_record,
    files_file,
    images_file,
    labels_file,
    prepared_side,
    read_manifest,
)
from sfw_dist.data.source import write_source
from sfw_dist.errors import UserError
from sfw_dist.files import REFUSED, file_lock, make_folder, remedy_of, replacing, write_json

BetonWriter = Callable[[BinaryIO, NDArray[np.uint8], NDArray[np.int64]], None]
"""Writes images and labels to a file in FFCV's format."""

CHUNKS = "chunks"
"""Folder of the images decoded so far; after an interruption the next call continues with it."""
MOST_NAMED = 10
"""Files that a message names; further ones are counted."""


def prepare(
    name: str, root: Path | str, *, size: int | None = None, skip_bad: bool = False, again: bool = False
) -> Path:
    """Make the folder ``root/name`` unless it exists.

    Any number of processes may call this at once: the first does the work, the others wait. The folder appears
    complete or not at all. A folder that was prepared without FFCV gets its betons once FFCV can be imported; one with
    missing or truncated files is made again. After an interruption, what was downloaded, unpacked and decoded is not
    done again.

    Args:
        name: of the data set.
        root: folder of all data sets.
        size: side of the images in pixels, for a data set that leaves it open.
        skip_bad: leave out image files that are missing or damaged, and list them in the manifest.
        again: replace a folder that is there, by images of the same size unless ``size`` tells another.

    Returns:
        The folder.

    Raises:
        UserError: unknown name, or the data cannot be read, downloaded or written.
    """
    dataset, root = find_dataset(name), Path(root)
    folder = root / name
    if size is None and dataset.any_size:
        size = prepared_side(folder)  # a damaged folder is made again with the size that it had
    if size is not None:
        dataset = dataset.resized(size)
    manifest = None if again else _intact_manifest(folder)
    if manifest and size is not None and manifest.image_shape != dataset.image_shape:
        raise UserError(
            f"{folder} holds images of {manifest.image_shape[1:]}, not of size {size}: "
            "choose another root, or replace it with --again"
        )
    if manifest and (manifest.has_betons or _beton_writer() is None):
        return folder
    try:
        make_folder(root)
        with file_lock(root / f".{name}.lock"):
            manifest = None if again else _intact_manifest(folder)  # whoever held the lock may have made the folder
            if manifest is None:
                _make_folder(folder, dataset, skip_bad)
            elif not manifest.has_betons:
                _add_betons(folder, manifest)
    except OSError as error:
        if error.errno in REFUSED and manifest:
            return folder  # all that is missing are betons, and others own the folder
        raise UserError(f"cannot prepare {folder} ({error}): {remedy_of(error, 'choose another root')}") from error
    return folder


def verify(name: str, root: Path | str) -> list[str]:
    """Hash every file of a prepared data set.

    Args:
        name: of the data set.
        root: folder of all data sets.

    Returns:
        One line for each problem.

    Raises:
        UserError: unknown name.
    """
    folder = Path(root) / find_dataset(name).name
    problems: list[str] = []
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    for file, record in manifest.files.items():
        try:
            check_content(folder / file, record)
        except UserError as error:
            problems.append(str(error))
    return problems


def _intact_manifest(folder: Path) -> Manifest | None:
    """The manifest, or ``None`` when a file has not its recorded size."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
    except UserError:
        return None
    return manifest


def _make_folder(folder: Path, dataset: Dataset, skip_bad: bool) -> None:
    if folder.exists() and not (folder / MANIFEST).exists():
        raw = folder.parent / "raw" / folder.name
        raise UserError(
            f"{folder} exists but is no prepared data set (it has no {MANIFEST}): move it to {raw} if it holds the raw "
            "files, else move it away"
        )
    unfinished, damaged = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "damaged"))
    try:
        _remove_but_chunks(unfinished)  # left by a process that was killed
        make_folder(unfinished)
        _fill_folder(unfinished, dataset, skip_bad)
        shutil.rmtree(unfinished / CHUNKS, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
        if folder.exists():
            os.replace(folder, damaged)
        os.replace(unfinished, folder)
    finally:
        _remove_but_chunks(unfinished)
        shutil.rmtree(damaged, ignore_errors=True)


def _remove_but_chunks(unfinished: Path) -> None:
    """Remove all but the decoded images, which a later call continues with."""
    if not (unfinished / CHUNKS).is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        return
    for path in unfinished.iterdir():
        if path.name != CHUNKS:
            path.unlink()


def _fill_folder(folder: Path, dataset: Dataset, skip_bad: bool) -> None:
    raw = dataset.read(folder.parent)
    classes = raw.classes or dataset.classes
    assert classes is not None
    _check_counts(dataset, raw, classes)
    parts: dict[Part, tuple[NDArray[np.uint8] | Decoded, NDArray[np.int64]]] = {
        "train": _decoded("train", raw.train_images, raw.train_labels, dataset, folder),
        "test": _decoded("test", raw.test_images, raw.test_labels, dataset, folder),
    }
    skipped = tuple(bad for images, _ in parts.values() if isinstance(images, Decoded) for bad in images.bad.values())
    if skipped and not skip_bad:
        raise UserError(_bad_files(skipped))
    files: dict[str, FileRecord] = {}
    for part, (images, labels) in parts.items():
        if len(labels) == 0:
            raise UserError(f"{dataset.name} has no usable image for {part}: get its raw files again")
        if isinstance(images, Decoded) and part == "train":
            _check_classes(labels, classes, skipped)
        assert labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < len(classes)
        files |= _write_part(folder, part, images, labels)
        if isinstance(images, Decoded):
            files |= _write_files(folder, part, images.good)
    files |= write_source(folder, raw)
    mean, std = channel_statistics(_mapped_images(folder, "train"))
    constant = tuple(
        f"channel {channel} is {255 * mean[channel]:.0f} in every training image: its standard deviation counts as 1"
        for channel in range(len(std))
        if std[channel] == 1  # values in [0, 1] deviate by at most 0.5
    )
    manifest = Manifest(
        name=dataset.name,
        source=dataset.source,
        classes=classes,
        image_shape=dataset.image_shape,
        counts={part: len(labels) for part, (_, labels) in parts.items()},
        mean=mean,
        std=std,
        files=files,
        skipped=skipped,
        left_out=raw.left_out,
        notes=(*raw.notes, *constant),
    )
    manifest.save(folder)
    _add_betons(folder, manifest)


def _check_counts(dataset: Dataset, raw: RawArrays, classes: tuple[str, ...]) -> None:
    found = {"train": len(raw.train_labels), "test": len(raw.test_labels), "classes": len(classes)}
    for what, wanted in dataset.counts.items():
        if found[what] != wanted:
            raise UserError(
                f"the raw files of {dataset.name} are not complete ({what}: {found[what]:,}, wanted {wanted:,}): "
                "delete its folder below raw to get them again"
            )


def _check_classes(labels: NDArray[np.int64], classes: tuple[str, ...], skipped: tuple[str, ...]) -> None:
    """Check that ``--skip-bad`` has left every class an image to train on."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(
            f"no training image of class {classes[empty[0]]!r} can be used ({named(skipped)}): replace one, or remove "
            "the class"
        )


def _decoded(
    part: Part, images: Images, labels: NDArray[np.int64], dataset: Dataset, folder: Path
) -> tuple[NDArray[np.uint8] | Decoded, NDArray[np.int64]]:
    """The images to write, and their labels, without those of bad files."""
    channels, height, width = dataset.image_shape
    if not isinstance(images, ImageFiles):
        assert images.dtype == np.uint8 and images.shape == (len(labels), height, width, channels)
        return images, labels
    assert channels == 3 and height == width
    decoded = decode(images, height, folder / CHUNKS / part, f"decoding {part}")
    return decoded, np.delete(labels, list(decoded.bad))


def _bad_files(bad: tuple[str, ...]) -> str:
    return f"{len(bad)} image file(s) cannot be used: {named(bad)}; replace them, or leave them out with --skip-bad"


def named(items: Sequence[str]) -> str:
    """The first items of a list, and how many more there are.

    Example:
        >>> named([str(i) for i in range(12)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return ", ".join(items[:MOST_NAMED]) + more


def _write_part(
    folder: Path, part: Part, images: NDArray[np.uint8] | Decoded, labels: NDArray[np.int64]
) -> dict[str, FileRecord]:
    with replacing(folder / images_file(part)) as file:
        if isinstance(images, Decoded):
            images.write(file)
        else:
            np.save(file, images)
    with replacing(folder / labels_file(part)) as file:
        np.save(file, labels)
    return {name: file_record(folder / name) for name in (images_file(part), labels_file(part))}


def _write_files(folder: Path, part: Part, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Write the list of a part's image files, relative to the data root."""
    name = files_file(part)
    write_json(folder / name, [str(path.relative_to(folder.parent)) for path in paths])
    return {name: file_record(folder / name)}


def _mapped_images(folder: Path, part: Part) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = np.load(folder / images_file(part), mmap_mode="r", allow_pickle=False)
    return images


def _add_betons(folder: Path, manifest: Manifest) -> None:
    """Write the betons from the arrays, if FFCV can be imported, and then the manifest that lists them."""
    write_beton = _beton_writer()
    if write_beton is None:
        return
    files = dict(manifest.files)
    for part in PARTS:
        images = _mapped_images(folder, part)
        labels = np.load(folder / labels_file(part), allow_pickle=False)
        with replacing(folder / beton_file(part)) as file:
            write_beton(file, images, labels)
        files[beton_file(part)] = file_record(folder / beton_file(part))
    replace(manifest, files=files).save(folder)


def _beton_writer() -> BetonWriter | None:
    """The writer of betons, or ``None`` where FFCV is not installed or does not load (a shared library is missing)."""
    try:
        from sfw_dist.data.loading.ffcv import write_beton
    except (ImportError, OSError):
        return None
    return write_beton


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel.

    Args:
        images: uint8 ``(n, height, width, channels)``.

    Returns:
        ``(mean, std)`` in units of [0, 1]; the deviation of a constant channel, by which images are divided, is 1.

    Example:
        >>> mean, std = channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        >>> mean, std
        ((0.5,), (0.5,))
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for chunk in np.array_split(images, -(-len(images) // 4096)):  # bincount widens its input to 8 bytes a value
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    frequencies = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = frequencies @ values
    # Of the deviations themselves: E[x²] − E[x]² of a constant channel rounds to something, which may be below zero.
    std = np.sqrt((frequencies * (values - mean[:, np.newaxis]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
