"""Writes the images of one part to a ``.npy``, chunk by chunk as they are read; an interruption loses one chunk."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sfw_dist.data.datasets.progress_bar import progress_bar
from sfw_dist.data.datasets.raw import ImageFiles, ImageFormat, Items
from sfw_dist.data.decode import Sample, read_chunks
from sfw_dist.data.sampler import Identities, identity

CHUNK_BYTES = 32 << 20
"""Images in a chunk; a few chunks are in memory at once."""
CHUNK_SAMPLES = 2048
"""Most samples in a chunk."""
JOURNAL = ".journal"
"""Ends the name of the list of chunks that are written. Where it is, the ``.npy`` beside it is unfinished."""


class Written(NamedTuple):
    """What became of the samples of one part."""

    good: list[int]
    """The samples that the file holds, in order."""
    bad: dict[int, str]
    """``name (reason)`` of each sample that cannot be used."""
    labels: list[Any]
    """Of the good items; empty for files, whose labels are known."""
    identities: Identities
    """Of the good samples: of a file's path, of an item's pixels."""


class _Record(NamedTuple):
    """A line of the journal: a chunk that is in the file."""

    start: int
    fingerprint: str
    """Of the files it was made from."""
    checksum: int
    """CRC-32 of its rows; those of bad samples are zeros."""
    reasons: list[str]
    """Of each sample, empty for a good one."""


def write_images(path: Path, images: ImageFiles | Items, form: ImageFormat, description: str) -> Written:
    """Write uint8 ``(good samples, height, width, channels)``.

    What an earlier call has written of image files is kept, unless it is damaged or one of the files has changed.
    Items are read from the beginning: nobody knows what they are made from.

    Args:
        path: of the ``.npy``.
        images: to read.
        form: of the images.
        description: of the progress bar.
    """
    files = images.paths if isinstance(images, ImageFiles) else None
    total = len(images.paths if isinstance(images, ImageFiles) else images.dataset)
    size = max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // _row_bytes(form)))
    chunks = [range(start, min(start + size, total)) for start in range(0, total, size)]
    journal = path.with_name(path.name + JOURNAL)
    if files is None:
        journal.unlink(missing_ok=True)
    prints = {chunk.start: _fingerprint(files[chunk.start : chunk.stop], form) if files else "" for chunk in chunks}
    done = _done(path, journal, prints, form)
    left = [chunk for chunk in chunks if chunk.start not in done]
    labels: list[Any] = []
    hashes: dict[int, int] = {}
    with (
        path.open("r+b" if done else "w+b") as file,
        journal.open("a") as lines,
        progress_bar(description, total, total - sum(map(len, left))) as advance,
    ):
        origin = _write_header(file, form, total)
        for chunk, samples in zip(left, read_chunks(images, form, left), strict=True):
            done[chunk.start] = record = _write_chunk(file, origin, chunk, samples, prints[chunk.start], form)
            file.flush()
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if files is None:
                for i, sample in zip(chunk, samples, strict=True):
                    if not isinstance(sample.pixels, str):
                        labels.append(sample.label)
                        hashes[i] = sample.identity
            advance(len(chunk))
    bad = {
        record.start + i: f"{_name(images, record.start + i)} ({reason})"
        for record in sorted(done.values())
        for i, reason in enumerate(record.reasons)
        if reason
    }
    good = [i for i in range(total) if i not in bad]
    if isinstance(images, ImageFiles):
        identities = path_identities(images)[good]
    else:
        identities = np.array([hashes[i] for i in good], np.uint64)
    return Written(good, bad, labels, identities)


def path_identities(images: ImageFiles) -> Identities:
    """What each image file is known by: its path from the folder of the raw data set."""
    paths = (path.relative_to(images.base) if path.is_relative_to(images.base) else path for path in images.paths)
    return np.array([identity(path.as_posix().encode()) for path in paths], np.uint64)


def finish_images(path: Path, form: ImageFormat, good: Sequence[int]) -> None:
    """Close the gaps that bad samples have left in a file of `write_images`, and forget what is needed to go on.

    Args:
        path: of the ``.npy``.
        form: of the images.
        good: the samples to keep, ascending.
    """
    rows = np.load(path, mmap_mode="r+", allow_pickle=False)
    if len(good) < len(rows):
        size = max(1, CHUNK_BYTES // _row_bytes(form))
        for start in range(0, len(good), size):  # no row moves back, so none is overwritten before it is read
            moved = good[start : start + size]
            rows[start : start + len(moved)] = rows[moved]
        rows.flush()
        with path.open("r+b") as file:
            file.truncate(_write_header(file, form, len(good)) + len(good) * _row_bytes(form))
    path.with_name(path.name + JOURNAL).unlink()


def _row_bytes(form: ImageFormat) -> int:
    return form.channels * form.height * form.width


def _write_header(file: BinaryIO, form: ImageFormat, samples: int) -> int:
    """Write the header of a ``.npy``, as long for any number of samples; its length."""
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (samples, form.height, form.width, form.channels)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _write_chunk(
    file: BinaryIO, origin: int, chunk: range, samples: Sequence[Sample], fingerprint: str, form: ImageFormat
) -> _Record:
    rows = np.zeros((len(chunk), form.height, form.width, form.channels), np.uint8)
    reasons = [sample.pixels if isinstance(sample.pixels, str) else "" for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        if not isinstance(sample.pixels, str):
            row[...] = sample.pixels
    file.seek(origin + chunk.start * _row_bytes(form))
    content = rows.tobytes()
    file.write(content)
    return _Record(chunk.start, fingerprint, zlib.crc32(content), reasons)


def _done(path: Path, journal: Path, prints: dict[int, str], form: ImageFormat) -> dict[int, _Record]:
    """The chunks that an earlier call has written, of the same files, and that are as they were written."""
    try:
        records = [_Record(*json.loads(line)) for line in journal.read_text().splitlines()]
        found: dict[int, _Record] = {}
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            origin = file.tell()
            for record in {record.start: record for record in records}.values():
                file.seek(origin + record.start * _row_bytes(form))
                rows = file.read(len(record.reasons) * _row_bytes(form))
                if prints.get(record.start) == record.fingerprint and zlib.crc32(rows) == record.checksum:
                    found[record.start] = record
        return found
    except (OSError, ValueError, TypeError):
        return {}


def _fingerprint(paths: Sequence[Path], form: ImageFormat) -> str:
    """A hash that changes when a file of the chunk is replaced, or another one is meant."""
    states = [(str(path), *_state(path)) for path in paths]
    return hashlib.sha256(repr((form, states)).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _name(images: ImageFiles | Items, index: int) -> str:
    return str(images.paths[index]) if isinstance(images, ImageFiles) else f"{images.description} sample {index}"
