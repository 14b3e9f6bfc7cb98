"""Writes the images of one part to a file, chunk by chunk as they are read; an interruption loses one chunk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from sfw_dist.data.datasets.progress_bar import progress_bar
from sfw_dist.data.datasets.raw import ImageFiles, ImageFormat, Items
from sfw_dist.data.decode import Sample, read_chunks
from sfw_dist.data.sampler import Identities, Ids, identity
from sfw_dist.data.writing.jpeg_store import JpegStore

CHUNK_BYTES = 32 << 20
"""Images in a chunk; a few chunks are in memory at once."""
CHUNK_SAMPLES = 2048
"""Most samples in a chunk."""
JOURNAL = ".journal"
"""Ends the name of the list of chunks that are written. Where it is, the file beside it is unfinished."""


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
    jpegs: JpegStore | None
    """What a file of JPEGs holds, of all samples."""


class _Record(NamedTuple):
    """A line of the journal: a chunk that is in the file."""

    start: int
    fingerprint: str
    """Of the files it was made from."""
    stored: Any
    """What the store wants to know of it later."""
    reasons: list[str]
    """Of each sample, empty for a good one."""


class _Store(Protocol):
    """How the samples lie in the file."""

    in_order: bool
    """Whether a chunk lies behind those before it, so that nothing is known of it when one of them is damaged."""
    chunk_samples: int

    def resume(self, file: BinaryIO, chunk: range, stored: Any) -> bool:
        """Whether a chunk that an earlier call has written is as it was."""

    def begin(self, file: BinaryIO) -> None:
        """Write what stands before the chunks."""

    def write(self, file: BinaryIO, chunk: range, samples: Sequence[Sample]) -> Any:
        """Write a chunk; returns what `resume` wants to know, as JSON has it."""


def write_images(path: Path, images: ImageFiles | Items, form: ImageFormat, description: str) -> Written:
    """Write pixels, uint8 ``(samples, height, width, channels)``; or JPEGs, where the format says so.

    What an earlier call has written of image files is kept, unless it is damaged or one of the files has changed.
    Items are read from the beginning: nobody knows what they are made from.

    Args:
        path: of the file, ``.npy`` or a beton; `finish_images` or `finish_jpegs` completes it.
        images: to read.
        form: of the images.
        description: of the progress bar.
    """
    files = images.paths if isinstance(images, ImageFiles) else None
    total = len(images.paths if isinstance(images, ImageFiles) else images.dataset)
    jpegs = JpegStore(form, total) if form.jpeg_quality else None
    store: _Store = jpegs or _PixelStore(form, total)
    size = max(1, min(CHUNK_SAMPLES, store.chunk_samples))
    chunks = [range(start, min(start + size, total)) for start in range(0, total, size)]
    journal = path.with_name(path.name + JOURNAL)
    if files is None:
        journal.unlink(missing_ok=True)
    # Where chunks lie one behind the other depends on how many samples there are.
    layout = (form, total if store.in_order else None)
    prints = {chunk: _fingerprint(files[chunk.start : chunk.stop], layout) if files else "" for chunk in chunks}
    done = _done(path, journal, prints, store)
    left = [chunk for chunk in chunks if chunk.start not in done]
    labels: list[Any] = []
    hashes: dict[int, int] = {}
    with (
        path.open("r+b" if done else "w+b") as file,
        journal.open("a") as lines,
        progress_bar(description, total, total - sum(map(len, left))) as advance,
    ):
        store.begin(file)
        for chunk, samples in zip(left, read_chunks(images, form, left), strict=True):
            reasons = [sample.pixels if isinstance(sample.pixels, str) else "" for sample in samples]
            record = _Record(chunk.start, prints[chunk], store.write(file, chunk, samples), reasons)
            done[chunk.start] = record
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
    return Written(good, bad, labels, identities, jpegs)


def path_identities(images: ImageFiles) -> Identities:
    """What each image file is known by: its path from the folder of the raw data set."""
    paths = (path.relative_to(images.base) if path.is_relative_to(images.base) else path for path in images.paths)
    return np.array([identity(os.fsencode(path.as_posix())) for path in paths], np.uint64)


def finish_images(path: Path, form: ImageFormat, good: Sequence[int]) -> None:
    """Close the gaps that bad samples have left in a file of pixels, and forget what is needed to go on.

    Args:
        path: of the ``.npy``.
        form: of the images.
        good: the samples to keep, ascending.
    """
    if len(good) < len(np.load(path, mmap_mode="r", allow_pickle=False)):
        size = max(1, CHUNK_BYTES // _row_bytes(form))
        for start in range(0, len(good), size):  # no row moves back, so none is overwritten before it is read
            moved = good[start : start + size]
            rows = np.load(path, mmap_mode="r+", allow_pickle=False)  # anew, or all pages would stay in memory
            rows[start : start + len(moved)] = rows[moved]
            rows.flush()
            del rows
        with path.open("r+b") as file:
            header = _header(form, len(good))
            file.write(header)
            file.truncate(len(header) + len(good) * _row_bytes(form))
    path.with_name(path.name + JOURNAL).unlink()


def finish_jpegs(path: Path, table: Path, written: Written, labels: Ids) -> None:
    """Write the tables of a file of JPEGs, and forget what is needed to go on.

    Args:
        path: of the beton.
        table: file of the table of :data:`~sfw_dist.data.loading.jpeg.JPEG_ROW`.
        written: what `write_images` returned.
        labels: of the good samples.
    """
    assert written.jpegs is not None
    written.jpegs.finish(path, table, written.good, labels)
    path.with_name(path.name + JOURNAL).unlink()


def _row_bytes(form: ImageFormat) -> int:
    return form.channels * form.height * form.width


def _header(form: ImageFormat, samples: int) -> bytes:
    """The header of a ``.npy``, as long for any number of samples."""
    file = io.BytesIO()
    shape = (samples, form.height, form.width, form.channels)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


class _PixelStore:
    """A ``.npy`` of pixels. Where a sample is bad they are zeros."""

    in_order = False

    def __init__(self, form: ImageFormat, total: int) -> None:
        self._form, self._total, self._header = form, total, _header(form, total)
        self.chunk_samples = CHUNK_BYTES // _row_bytes(form)

    def resume(self, file: BinaryIO, chunk: range, stored: Any) -> bool:
        file.seek(self._place(chunk))
        return zlib.crc32(file.read(len(chunk) * _row_bytes(self._form))) == stored

    def begin(self, file: BinaryIO) -> None:
        file.truncate(len(self._header) + self._total * _row_bytes(self._form))  # an earlier call may have had more
        file.seek(0)
        file.write(self._header)

    def write(self, file: BinaryIO, chunk: range, samples: Sequence[Sample]) -> int:
        rows = np.zeros((len(chunk), self._form.height, self._form.width, self._form.channels), np.uint8)
        for row, sample in zip(rows, samples, strict=True):
            if not isinstance(sample.pixels, str):
                row[...] = sample.pixels
        file.seek(self._place(chunk))
        file.write(rows.data)
        return zlib.crc32(rows.data)

    def _place(self, chunk: range) -> int:
        return len(self._header) + chunk.start * _row_bytes(self._form)


def _done(path: Path, journal: Path, prints: dict[range, str], store: _Store) -> dict[int, _Record]:
    """The chunks that an earlier call has written, of the same files, and that are as they were written."""
    found: dict[int, _Record] = {}
    try:
        records = {record.start: record for line in journal.read_bytes().splitlines() if (record := _read_record(line))}
        with path.open("rb") as file:
            for chunk, fingerprint in prints.items():
                record = records.get(chunk.start)
                same = record is not None and (record.fingerprint, len(record.reasons)) == (fingerprint, len(chunk))
                if record is not None and same and store.resume(file, chunk, record.stored):
                    found[chunk.start] = record
                elif store.in_order:
                    break
    except (OSError, ValueError, TypeError):
        return {}
    return found


def _read_record(line: bytes) -> _Record | None:
    """``None`` for half a line, which a full disk or a kill has left."""
    try:
        return _Record(*json.loads(line))
    except (ValueError, TypeError):
        return None


def _fingerprint(paths: Sequence[Path], layout: object) -> str:
    """A hash that changes when a file of the chunk is replaced, or another one is meant."""
    states = [(str(path), *_state(path)) for path in paths]
    return hashlib.sha256(repr((layout, states)).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name with a NUL
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _name(images: ImageFiles | Items, index: int) -> str:
    return str(images.paths[index]) if isinstance(images, ImageFiles) else f"{images.description} sample {index}"
