"""Prepares a data set once, as memory-mappable ``.npy`` files, FFCV betons and a manifest; and verifies it later."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from sfw_dist.data.datasets.csv_set import Table
from sfw_dist.data.datasets.own_sets import folder_set, function_set, table_set, values_set
from sfw_dist.data.datasets.raw import RawData, RawPart
from sfw_dist.data.datasets.registry import DATASETS, Dataset
from sfw_dist.data.manifest import (
    MANIFEST,
    Manifest,
    check_content,
    check_sizes,
    fitted_size,
    images_file,
    prepare_again,
    read_manifest,
    set_folder,
    size_text,
)
from sfw_dist.data.options import Options, check_options
from sfw_dist.data.source import source_changes, write_source
from sfw_dist.data.writing.image_writer import JOURNAL
from sfw_dist.data.writing.parts import (
    BetonWriter,
    channel_statistics,
    statistics_of_counts,
    write_betons,
    write_parts,
)
from sfw_dist.data.writing.stored_images import StoredImages
from sfw_dist.errors import UserError, named
from sfw_dist.files import REFUSED, file_lock, make_folder, remedy_of

_EXISTS = "choose another name, or replace it with again=True"


def prepare(
    source: str | Path,
    root: Path | str,
    *,
    name: str | None = None,
    table: Table | None = None,
    options: Options | None = None,
    again: bool = False,
    check_source: bool = False,
) -> Path:
    """Make the folder ``root/name`` unless it exists.

    Any number of processes may call this at once: the first does the work, the others wait. The folder appears
    complete or not at all. A folder that was prepared without FFCV gets its betons once FFCV can be imported; one with
    missing or truncated files is made again. After an interruption, what was downloaded, unpacked and decoded is not
    done again.

    Args:
        source: a known data set; a folder of images; or ``package.module:function``, see
            :func:`~sfw_dist.data.datasets.own_sets.read_values`.
        root: folder of all data sets.
        name: of the data set; by default that of the known set, of the folder, or of the function.
        table: the images in the folder, and their classes; ``None``: each class is a folder.
        options: how, as far as the source leaves it open.
        again: replace a folder that is there, by images of the same size unless ``options`` tell another.
        check_source: raise if the raw files have changed since the folder was made.

    Returns:
        The folder.

    Raises:
        UserError: unknown name, or the data cannot be read, downloaded or written.
    """
    options = options or Options()
    dataset = find_source(source, name, table, split_later=options.test_fraction > 0)
    return _prepare(dataset, Path(root), options, again=again, check_source=check_source)


def write(
    root: Path | str,
    name: str,
    train: Any,
    test: Any = None,
    *,
    classes: Sequence[str] | None = None,
    options: Options | None = None,
    again: bool = False,
) -> Path:
    """Write a data set from Python, as `prepare` does; then ``data.name`` of a run is its name.

    Args:
        root: folder of all data sets.
        name: of the data set.
        train: a Dataset with a length, whose items are ``(image, label)`` or dictionaries; or a pair
            ``(images, labels)``. An image is a Pillow image, an array ``(height, width[, channels])`` or a tensor
            ``([channels,] height, width)``, of 8 or 16 bits or of real numbers in [0, 1]. A label is an integer or a
            text.
        test: likewise; ``None``: ``options.test_fraction`` of the training samples.
        classes: their names; by default what the Dataset says, or the labels.
        options: size, channels and so on.
        again: replace a folder that is there.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, or a sample cannot be used.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> images, labels = np.zeros((8, 4, 4), np.uint8), ["cat", "dog"] * 4
        >>> root = tempfile.mkdtemp()
        >>> write(root, "pets", train=(images, labels), test=(images[:2], labels[:2])).name
        'pets'
    """
    folder = set_folder(root, name)
    if folder.exists() and not again:
        raise UserError(f"{folder} exists: {_EXISTS}")
    _check_own_name(name)
    parts = {"train": train, "test": test, "classes": classes}
    return _prepare(values_set(name, parts), Path(root), options or Options(), again=again)


def find_source(
    source: str | Path, name: str | None = None, table: Table | None = None, *, split_later: bool
) -> Dataset:
    """What a person calls a data set: a known one, a folder of images, or a function.

    Args:
        source: as in `prepare`; likewise ``name`` and ``table``.
        split_later: whether a test part is split off.

    Raises:
        UserError: there is none; the message lists what there is.
    """
    text = str(source)
    if text in DATASETS and table is None:
        if name not in (None, text):
            raise UserError(f"{text} is prepared by that name, got the name {name!r}: leave --name out")
        return DATASETS[text]
    folder = Path(source).expanduser()
    if folder.is_dir():
        name = name or folder.absolute().name
        _check_own_name(name)
        return table_set(name, folder, table) if table else folder_set(name, folder, split_later=split_later)
    if table is not None:
        raise UserError(f"{text} is no folder: write the folder that the images of {table.path} are in")
    if ":" in text:
        name = name or set_folder("", text).name
        _check_own_name(name)
        return function_set(name, text)
    known = ", ".join(sorted(DATASETS))
    raise UserError(f"unknown data set {text!r}: write one of {known}, a folder of images, or package.module:function")


def _check_own_name(name: str) -> None:
    if name in DATASETS:
        raise UserError(f"{name} is the name of a known data set: choose another one with --name")


def verify(name: str, root: Path | str) -> list[str]:
    """Hash every file of a prepared data set.

    Args:
        name: of the data set.
        root: folder of all data sets.

    Returns:
        One line for each problem.

    Raises:
        UserError: no such data set.
    """
    folder = set_folder(root, name)
    if not folder.exists() and name not in DATASETS:
        raise UserError(f"no data set {name!r} in {root}: prepare it first")
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


def _prepare(dataset: Dataset, root: Path, options: Options, *, again: bool, check_source: bool = False) -> Path:
    folder = set_folder(root, dataset.name)
    check_options(dataset, options, has_ffcv=_beton_writer() is not None)
    manifest = None if again else _intact_manifest(folder)
    if manifest:
        _check_same(folder, manifest, dataset, options)
        if check_source and (changes := source_changes(folder, dataset)):
            raise UserError(f"the raw files of {folder} have changed ({named(changes)}): {prepare_again(folder)}")
    elif options.size is None and dataset.any_size:
        options = replace(options, size=fitted_size(folder))  # a folder is made again with the size that it had
    if manifest and (manifest.has_betons or _beton_writer() is None):
        return folder
    try:
        make_folder(root)
        with file_lock(root / f".{dataset.name}.lock"):
            manifest = None if again else _intact_manifest(folder)  # whoever held the lock may have made the folder
            if manifest and dataset.arguments is None:
                raise UserError(f"{folder} was written by another process meanwhile: {_EXISTS}")
            if manifest:
                _check_same(folder, manifest, dataset, options)
            if manifest is None:
                _make_folder(folder, dataset, options)
            elif not manifest.has_betons:
                _add_betons(folder, manifest)
    except OSError as error:
        if error.errno in REFUSED and manifest:
            return folder  # all that is missing are betons, and others own the folder
        raise UserError(f"cannot prepare {folder} ({error}): {remedy_of(error, 'choose another root')}") from error
    return folder


def _check_same(folder: Path, manifest: Manifest, dataset: Dataset, options: Options) -> None:
    """Raise :class:`UserError` if the folder was made from something else, or with other options than are given."""
    remedy = "choose another --name or --root, or replace it with --again"
    base = dataset.made_from
    before = manifest.arguments or ((manifest.name,) if manifest.name in DATASETS else ())
    if before[: len(base)] != base:
        made_from = shlex.join(before) or "values of Python"
        raise UserError(f"{folder} was prepared from {made_from}, not from {shlex.join(base)}: {remedy}")
    if options.size is not None and manifest.image_shape[1:] != options.size:
        held, wanted = size_text(manifest.image_shape[1:]), size_text(options.size)
        raise UserError(f"{folder} holds images of size {held}, not of size {wanted}: {remedy}")
    stored = dict(zip(before[len(base) :: 2], before[len(base) + 1 :: 2], strict=True))
    for option, value in options.arguments().items():
        if option != "--size" and stored.get(option) != value:
            was = f"{option} {stored[option]}" if option in stored else f"no {option}"
            raise UserError(f"{folder} was prepared with {was}, not with {option} {value}: {remedy}")


def _intact_manifest(folder: Path) -> Manifest | None:
    """The manifest, or ``None`` when a file has not its recorded size."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
    except UserError:
        return None
    return manifest


def _make_folder(folder: Path, dataset: Dataset, options: Options) -> None:
    if folder.exists() and not (folder / MANIFEST).exists():
        raw = folder.parent / "raw" / folder.name
        name = "choose another --name, or move it away" if dataset.arguments != () else "else move it away"
        raise UserError(
            f"{folder} exists but is no prepared data set (it has no {MANIFEST}): move it to {raw} if it holds the raw "
            f"files, {name}"
        )
    unfinished, damaged = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "damaged"))
    try:
        _keep_decoded(unfinished)  # left by a process that was killed
        make_folder(unfinished)
        _fill_folder(unfinished, dataset, options)
        shutil.rmtree(damaged, ignore_errors=True)
        if folder.exists():
            os.replace(folder, damaged)
        os.replace(unfinished, folder)
    finally:
        _keep_decoded(unfinished)
        shutil.rmtree(damaged, ignore_errors=True)


def _keep_decoded(unfinished: Path) -> None:
    """Remove all but images that a later call continues with."""
    journals = {path.name for path in unfinished.glob(f"*{JOURNAL}")} if unfinished.is_dir() else set()
    if not journals:
        shutil.rmtree(unfinished, ignore_errors=True)
        return
    for path in unfinished.iterdir():
        if not {path.name, path.name + JOURNAL} & journals:
            path.unlink()


def _fill_folder(folder: Path, dataset: Dataset, options: Options) -> None:
    raw = dataset.read(folder.parent)
    _check_counts(dataset, raw)
    parts = write_parts(folder, dataset, raw, options, betons=_beton_writer() is not None)
    if parts.values is None:
        mean, std = channel_statistics(StoredImages(folder / images_file("train")))
    else:
        mean, std = statistics_of_counts(parts.values)
    constant = [
        f"channel {channel} is {255 * mean[channel]:.0f} in every training image: its standard deviation counts as 1"
        for channel in range(len(std))
        if std[channel] == 1  # values in [0, 1] deviate by at most 0.5
    ]
    for option, values in (("--mean", options.mean), ("--std", options.std)):
        if values is not None and len(values) != len(mean):
            raise UserError(f"{option} has {len(values)} numbers, the images have {len(mean)} channels: give one each")
    manifest = Manifest(
        name=dataset.name,
        source=dataset.source,
        classes=parts.classes,
        image_shape=parts.form.shape,
        counts={part: len(labels) for part, labels in parts.labels.items()},
        mean=options.mean or mean,
        std=options.std or std,
        files=parts.files | write_source(folder, raw),
        skipped=parts.skipped,
        left_out=raw.left_out,
        notes=(*parts.notes, *constant),
        arguments=dataset.made_from and (*dataset.made_from, *chain.from_iterable(options.arguments().items())),
        form={"fit": parts.form.fit, "to_grey": parts.form.to_grey},
        store=options.store,
    )
    manifest.save(folder)
    if not manifest.has_betons:
        _add_betons(folder, manifest)


def _check_counts(dataset: Dataset, raw: RawData) -> None:
    classes = raw.classes or dataset.classes
    found = {"train": _length(raw.train), "test": _length(raw.test), "classes": len(classes or ())}
    for what, wanted in dataset.counts.items():
        if found[what] != wanted:
            raise UserError(
                f"the raw files of {dataset.name} are not complete ({what}: {found[what]:,}, wanted {wanted:,}): "
                "delete its folder below raw to get them again"
            )


def _length(part: RawPart | None) -> int:
    return 0 if part is None or part.labels is None else len(part.labels)


def _add_betons(folder: Path, manifest: Manifest) -> None:
    """Write the betons, if FFCV can be imported, and then the manifest that lists them."""
    write_beton = _beton_writer()
    if write_beton is not None:
        replace(manifest, files=manifest.files | write_betons(folder, write_beton)).save(folder)


def _beton_writer() -> BetonWriter | None:
    """The writer of betons, or ``None`` where FFCV is not installed or does not load (a shared library is missing)."""
    try:
        from sfw_dist.data.loading.ffcv import write_beton
    except (ImportError, OSError):
        return None
    return write_beton
