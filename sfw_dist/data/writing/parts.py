"""Writes the files of both parts of a data set that is being prepared, from its raw data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.datasets.raw import ImageFiles, ImageFormat, Items, RawData, RawPart
from sfw_dist.data.datasets.registry import Dataset
from sfw_dist.data.decode import file_format, read_chunks, read_item
from sfw_dist.data.jpeg import QUALITY
from sfw_dist.data.labels import number_labels
from sfw_dist.data.manifest import (
    PARTS,
    FileRecord,
    Part,
    beton_file,
    file_record,
    files_file,
    ids_file,
    images_file,
    jpegs_file,
    labels_file,
    size_text,
)
from sfw_dist.data.options import Options
from sfw_dist.data.sampler import Ids, split_validation
from sfw_dist.data.writing.disk_cost import tell_disk_cost
from sfw_dist.data.writing.image_writer import (
    CHUNK_BYTES,
    CHUNK_SAMPLES,
    JOURNAL,
    Written,
    finish_images,
    finish_jpegs,
    path_identities,
    write_images,
)
from sfw_dist.data.writing.stored_images import StoredImages
from sfw_dist.errors import UserError, named
from sfw_dist.files import replacing, write_json

BetonWriter = Callable[[BinaryIO, StoredImages, Ids], None]
"""Writes images and labels to a file in FFCV's format."""
_TEST_SEED = 1
"""Of the choice of test samples; a run's validation samples are chosen by the run's seed."""


class Parts(NamedTuple):
    """What was written."""

    labels: dict[Part, Ids]
    classes: tuple[str, ...]
    form: ImageFormat
    files: dict[str, FileRecord]
    skipped: tuple[str, ...]
    """``name (reason)`` of each sample that was left out."""
    notes: tuple[str, ...]
    values: NDArray[np.int64] | None
    """How often each value occurs in the channels of the training images, where they are JPEGs."""


def write_parts(folder: Path, dataset: Dataset, raw: RawData, options: Options, *, betons: bool) -> Parts:
    """Write images, labels, identities and lists of files of both parts.

    Args:
        folder: to write to.
        dataset: whose raw data it is.
        raw: what its reader returned.
        options: how.
        betons: whether betons are going to be written from the pixels.

    Raises:
        UserError: they do not fit on the disk; a sample cannot be used, unless ``options.skip_bad``; or a part or a
            class has none.
    """
    form = _format(dataset, raw, options)
    raw = _with_test_part(dataset.name, raw, form, options.test_fraction)
    assert raw.test is not None
    parts: dict[Part, RawPart] = {"train": raw.train, "test": raw.test}
    to_read = {part: data.images for part, data in parts.items() if isinstance(data.images, ImageFiles | Items)}
    if form.jpeg_quality and len(to_read) < len(parts):
        raise UserError(f"{dataset.name} does not come as image files, --store jpeg is refused: leave it out")
    file_of, other = (beton_file, images_file) if form.jpeg_quality else (images_file, beton_file)
    for name in map(other, PARTS):  # left by a call with the other store, which was interrupted
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}{JOURNAL}").unlink(missing_ok=True)
    tell_disk_cost(dataset.name, folder, list(to_read.values()), form, betons=betons)
    written = {
        part: write_images(folder / file_of(part), images, form, f"reading {part}") for part, images in to_read.items()
    }
    skipped = tuple(bad for found in written.values() for bad in found.bad.values())
    if skipped and not options.skip_bad:
        raise UserError(_bad_samples(skipped, form, scalable=dataset.any_size and not form.fit))
    labels = {part: _good_labels(raw_part, written.get(part)) for part, raw_part in parts.items()}
    for part in PARTS:
        if len(labels[part]) == 0:
            raise UserError(f"{dataset.name} has no usable image for {part}: get its raw files again")
    numbered = number_labels(labels["train"], labels["test"], raw.classes or dataset.classes)
    if skipped:
        _check_classes(numbered.train, numbered.classes, skipped)
    files: dict[str, FileRecord] = {}
    for part, raw_part in parts.items():
        files |= _write_part(folder, part, raw_part.images, numbered._asdict()[part], form, written.get(part))
    found_labels: dict[Part, Ids] = {"train": numbered.train, "test": numbered.test}
    jpegs = written["train"].jpegs if "train" in written else None
    notes = (*raw.notes, *numbered.notes)
    return Parts(found_labels, numbered.classes, form, files, skipped, notes, jpegs.values if jpegs else None)


def _format(dataset: Dataset, raw: RawData, options: Options) -> ImageFormat:
    """The format of all images: the data set's, with the size and channels of the options, or the first image's."""
    own = dataset.image_shape
    if own is None:
        found = _first_format(raw.train.images)
        own = found.shape
    channels, height, width = own
    if options.channels is not None:
        channels = options.channels
    if options.size is not None:
        height, width = options.size
    fit = options.size is not None or (dataset.any_size and dataset.image_shape is not None)
    if options.store == "jpeg":
        return ImageFormat(3, height, width, fit, jpeg_quality=options.jpeg_quality or QUALITY)
    return ImageFormat(channels, height, width, fit, to_grey=options.channels == 1)


def _first_format(images: NDArray[np.uint8] | ImageFiles | Items) -> ImageFormat:
    if isinstance(images, ImageFiles):
        found = next((form for path in images.paths if (form := file_format(path)) is not None), None)
        return found or ImageFormat(3, 64, 64)  # every file will be named as bad
    assert isinstance(images, Items)
    if len(images.dataset) == 0:
        raise UserError(f"{images.description} has no samples: give some")
    first, again = read_item(images, 0, None), read_item(images, 0, None)
    if isinstance(first.pixels, str):
        raise UserError(f"{images.description} sample 0 cannot be used ({first.pixels}): mend the data set")
    assert isinstance(first.pixels, np.ndarray)
    if not isinstance(again.pixels, np.ndarray) or not np.array_equal(first.pixels, again.pixels):
        raise UserError(
            f"{images.description} sample 0 is another image each time it is read: leave random transforms out, "
            "training augments images itself"
        )
    height, width, channels = first.pixels.shape
    return ImageFormat(channels, height, width)


def _with_test_part(name: str, raw: RawData, form: ImageFormat, fraction: float) -> RawData:
    """The same with a test part, split off from the training part by what the samples are, not where they stand."""
    if raw.test is not None:
        if fraction:
            raise UserError(f"{name} has a test part already: leave --test-fraction out")
        return raw
    if not fraction:
        raise UserError(f"{name} has no test part: give one, or split some off with --test-fraction 0.2")
    images, labels = raw.train
    assert isinstance(images, ImageFiles | Items)
    if isinstance(images, ImageFiles):
        assert labels is not None
        numbers, identities = np.asarray(labels), path_identities(images)
    else:
        numbers, identities = _scan(images, form)
    train, test = split_validation(numbers, fraction, _TEST_SEED, identities)
    if len(test) == 0:
        raise UserError(f"{name} has one image of each class, none can be split off: give a test part")
    note = f"the test part is {len(test)} of {len(numbers)} images, by --test-fraction {fraction:g}"
    return raw._replace(
        train=_subset(raw.train, train, "train"), test=_subset(raw.train, test, "test"), notes=(*raw.notes, note)
    )


def _scan(items: Items, form: ImageFormat) -> tuple[Ids, NDArray[np.uint64]]:
    """Numbers of the classes, and identities, of items; what cannot be read is found when it is written."""
    total = len(items.dataset)
    chunks = [range(start, min(start + CHUNK_SAMPLES, total)) for start in range(0, total, CHUNK_SAMPLES)]
    form = form._replace(jpeg_quality=0)
    labels, identities = [], []
    for samples in read_chunks(items, form, chunks):
        labels += [str(sample.label) for sample in samples]
        identities += [sample.identity for sample in samples]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64), np.array(identities, np.uint64)


def _subset(part: RawPart, ids: Ids, name: str) -> RawPart:
    images, labels = part
    if isinstance(images, Items):
        chosen: Any = torch.utils.data.Subset(images.dataset, ids.tolist())  # type: ignore[arg-type]
        return RawPart(images._replace(dataset=chosen, description=name), None)
    assert isinstance(images, ImageFiles) and labels is not None
    paths = tuple(images.paths[i] for i in ids)
    return RawPart(images._replace(paths=paths), np.asarray(labels)[ids])


def _good_labels(part: RawPart, written: Written | None) -> list[Any]:
    if part.labels is None:
        assert written is not None
        return written.labels
    labels = np.asarray(part.labels)
    good: list[Any] = (labels if written is None else labels[written.good]).tolist()
    return good


def _bad_samples(bad: Sequence[str], form: ImageFormat, *, scalable: bool) -> str:
    scalable = scalable and any("pixels, wanted" in reason for reason in bad)
    scaled = (
        f", bring all to one size with --size N (of {size_text((form.height, form.width))}, say)" if scalable else ""
    )
    remedy = f"replace them{scaled}, or leave them out with --skip-bad"
    return f"{len(bad)} image(s) cannot be used: {named(bad)}; {remedy}"


def _check_classes(labels: Ids, classes: tuple[str, ...], skipped: Sequence[str]) -> None:
    """Check that ``--skip-bad`` has left every class an image to train on."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(
            f"no training image of class {classes[empty[0]]!r} can be used ({named(skipped)}): replace one, or remove "
            "the class"
        )


def _write_part(
    folder: Path,
    part: Part,
    images: NDArray[np.uint8] | ImageFiles | Items,
    labels: Ids,
    form: ImageFormat,
    written: Written | None,
) -> dict[str, FileRecord]:
    names = [labels_file(part), *([beton_file(part), jpegs_file(part)] if form.jpeg_quality else [images_file(part)])]
    if isinstance(images, np.ndarray):
        channels, height, width = form.shape
        assert images.dtype == np.uint8 and images.shape == (len(labels), height, width, channels)
        with replacing(folder / images_file(part)) as file:
            np.save(file, images)
    else:
        assert written is not None
        if form.jpeg_quality:
            finish_jpegs(folder / beton_file(part), folder / jpegs_file(part), written, labels)
        else:
            finish_images(folder / images_file(part), form, written.good)
        if part == "train":
            names.append(ids_file(part))
            with replacing(folder / ids_file(part)) as file:
                np.save(file, written.identities)
        if isinstance(images, ImageFiles):
            names.append(files_file(part))
            write_json(folder / files_file(part), [_place(images.paths[i], folder.parent) for i in written.good])
    with replacing(folder / labels_file(part)) as file:
        np.save(file, labels)
    return {name: file_record(folder / name) for name in names}


def _place(path: Path, root: Path) -> str:
    """An image file as a path from the data root; of one that lies elsewhere the whole path."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())


def write_betons(folder: Path, write_beton: BetonWriter) -> dict[str, FileRecord]:
    """Write the samples of both parts in FFCV's format too, from the arrays."""
    for part in PARTS:
        labels = np.load(folder / labels_file(part), allow_pickle=False)
        with replacing(folder / beton_file(part)) as file:
            write_beton(file, StoredImages(folder / images_file(part)), labels)
    return {beton_file(part): file_record(folder / beton_file(part)) for part in PARTS}


def channel_statistics(images: NDArray[np.uint8] | StoredImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
    rows = max(1, CHUNK_BYTES // images[:1].size)  # bincount widens its input to 8 bytes a value
    for start in range(0, len(images), rows):
        some = images[start : start + rows]
        for channel in range(channels):
            counts[channel] += np.bincount(some[..., channel].ravel(), minlength=256)
    return statistics_of_counts(counts)


def statistics_of_counts(counts: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same, from how often each value occurs in each channel, ``(channels, 256)``."""
    # Integers of Python, which are exact: the same numbers on every machine, and no deviation of a constant channel.
    total = int(counts[0].sum())
    sums = [sum(value * int(count) for value, count in enumerate(channel)) for channel in counts]
    squares = [sum(value**2 * int(count) for value, count in enumerate(channel)) for channel in counts]
    mean = tuple(first / (255 * total) for first in sums)
    variances = (total * second - first**2 for first, second in zip(sums, squares, strict=True))
    return mean, tuple(math.sqrt(variance) / (255 * total) if variance else 1.0 for variance in variances)
