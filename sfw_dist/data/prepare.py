"""Prepare a data set once: raw arrays → memory-mappable ``.npy``, FFCV betons and a manifest; and verify it later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sfw_dist.data.manifest import (
    MANIFEST,
    PARTS,
    FileRecord,
    Manifest,
    beton_file,
    check_content,
    check_sizes,
    file_record,
    images_file,
    labels_file,
    read_manifest,
)
from sfw_dist.data.registry import Dataset, find_dataset
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder, replacing

BetonWriter = Callable[[BinaryIO, NDArray[np.uint8], NDArray[np.int64]], None]
"""Writes images and labels into a file in FFCV's format."""


def prepare(name: str, root: Path | str) -> Path:
    """Make ``root/name`` unless it is there, and return it.

    Any number of processes may call this at once: the first does the work, the others wait. The folder appears
    complete or not at all. One that was prepared without FFCV gets its betons once FFCV can be imported; one with
    missing or truncated files is made anew. Raises :class:`UserError`: unknown name, or the data cannot be got or
    written.
    """
    dataset, root = find_dataset(name), Path(root)
    folder = root / name
    manifest = _intact_manifest(folder)
    if manifest and (manifest.has_betons or _beton_writer() is None):
        return folder
    try:
        make_folder(root)
        with FileLock(root / f".{name}.lock"):
            manifest = _intact_manifest(folder)  # again: whoever held the lock may have made the folder
            if manifest is None:
                _make_folder(folder, dataset)
            elif not manifest.has_betons:
                _add_betons(folder, manifest)
    except OSError as error:
        raise UserError(f"cannot prepare {folder} ({error}): free some space or choose another root") from error
    return folder


def verify(name: str, root: Path | str) -> list[str]:
    """Hash every file of ``root/name`` and return one line a problem; raises :class:`UserError` for an unknown name."""
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
    """The manifest of a folder whose files have their recorded sizes, else ``None``."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
    except UserError:
        return None
    return manifest


def _make_folder(folder: Path, dataset: Dataset) -> None:
    if folder.exists() and not (folder / MANIFEST).exists():
        raise UserError(f"{folder} exists but is no prepared data set (it has no {MANIFEST}): move it away")
    unfinished, damaged = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "damaged"))
    _remove(unfinished, damaged)  # left by a process that was killed
    try:
        make_folder(unfinished)
        _fill_folder(unfinished, dataset)
        if folder.exists():
            os.replace(folder, damaged)
        os.replace(unfinished, folder)
    finally:
        _remove(unfinished, damaged)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _fill_folder(folder: Path, dataset: Dataset) -> None:
    raw = dataset.read(folder.parent)
    arrays = {"train": (raw.train_images, raw.train_labels), "test": (raw.test_images, raw.test_labels)}
    channels, height, width = dataset.image_shape
    files: dict[str, FileRecord] = {}
    for part in PARTS:
        images, labels = arrays[part]
        assert images.dtype == np.uint8 and images.shape == (len(labels), height, width, channels)
        assert labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < len(dataset.classes)
        for name, array in ((images_file(part), images), (labels_file(part), labels)):
            with replacing(folder / name) as file:
                np.save(file, array)
            files[name] = file_record(folder / name)
    mean, std = channel_statistics(raw.train_images)
    manifest = Manifest(
        name=dataset.name,
        source=dataset.source,
        classes=dataset.classes,
        image_shape=dataset.image_shape,
        counts={part: len(arrays[part][1]) for part in PARTS},
        mean=mean,
        std=std,
        files=files,
    )
    manifest.save(folder)
    _add_betons(folder, manifest)


def _add_betons(folder: Path, manifest: Manifest) -> None:
    """Write the betons from the arrays, if FFCV can be imported, and last the manifest that knows them."""
    write_beton = _beton_writer()
    if write_beton is None:
        return
    files = dict(manifest.files)
    for part in PARTS:
        images = np.load(folder / images_file(part), mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / labels_file(part), allow_pickle=False)
        with replacing(folder / beton_file(part)) as file:
            write_beton(file, images, labels)
        files[beton_file(part)] = file_record(folder / beton_file(part))
    replace(manifest, files=files).save(folder)


def _beton_writer() -> BetonWriter | None:
    """FFCV's file format, or ``None`` where FFCV is not installed or does not load (a shared library is missing)."""
    try:
        from sfw_dist.data.ffcv import write_beton
    except (ImportError, OSError):
        return None
    return write_beton


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``(mean, std)`` per channel of uint8 ``(n, height, width, channels)`` in units of [0, 1]."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for chunk in np.array_split(images, -(-len(images) // 4096)):  # bincount widens its input to 8 bytes a value
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    frequencies = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = frequencies @ values
    variance = frequencies @ values**2 - mean**2
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())
