"""The ffcv backends: betons (FFCV's files) of pixels or of JPEGs, read by compiled functions of our own.

The only module that imports FFCV. Of FFCV we use the file format, the reader of its tables, the compiler and the
decoder of JPEGs. Not its loader, which holds 500 bytes for every sample in every process. Nor its threads, buffers and
augmentations: its thread never ends when the pipeline raises or the consumer stops, its buffers are overwritten by
later batches, and its augmentations cannot be seeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.loading.augment_numba import transform_sample
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.loading.jpeg import JpegFile
from sfw_dist.data.manifest import prepare_again
from sfw_dist.data.pixels import largest_jpeg
from sfw_dist.data.sampler import Ids
from sfw_dist.errors import UserError, needs_extra

if TYPE_CHECKING:
    from sfw_dist.data.writing.stored_images import StoredImages

BLOCK = 1 << 16
"""Samples whose rows of the tables are in memory at once."""


@contextmanager
def _kept_thread_counts() -> Iterator[None]:
    """Restore the thread counts of torch and numba, which FFCV sets to 1 at its import."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


with _kept_thread_counts(), needs_extra("FFCV (data.backend ffcv, or --store jpeg)", "ffcv"):
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode
    from ffcv.pipeline.compiler import Compiler
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
    from ffcv.writer import MIN_PAGE_SIZE


class FFCVBackend:
    """Reads batches from a beton of pixels (see :class:`sfw_dist.data.loading.backend.Backend`).

    Args:
        path: of the beton.
        labels: that the beton must hold, ``(n,)``.
        image_shape: ``(channels, height, width)``.

    Raises:
        UserError: the file does not describe exactly such samples.
    """

    threaded = True

    def __init__(self, path: Path, labels: Ids, image_shape: tuple[int, int, int]) -> None:
        self._addresses = _checked(path, _PixelLayout(labels, image_shape)).metadata["f0"]
        self._file = np.memmap(path, np.uint8, "r")
        self._labels = labels
        channels, height, width = image_shape
        self._sample_shape = (height, width, channels)

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        out = torch.empty(len(ids), *self._sample_shape, dtype=torch.uint8)
        _read_and_transform(self._file, self._addresses[ids].astype(np.int64), params, out.numpy())
        return out.permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        del self._addresses, self._file


class FFCVJpegBackend:
    """Reads batches from a beton of JPEGs (see :class:`sfw_dist.data.loading.backend.Backend`).

    Args:
        jpegs: the part's file.
        labels: that the beton must hold, ``(n,)``.
        image_shape: ``(channels, height, width)`` of the batches.

    Raises:
        UserError: the file does not describe exactly such samples.
    """

    threaded = True

    def __init__(self, jpegs: JpegFile, labels: Ids, image_shape: tuple[int, int, int]) -> None:
        _checked(jpegs.path, _JpegLayout(labels, jpegs.table, image_shape))
        self._jpegs, self._labels = jpegs, labels
        channels, height, width = image_shape
        self._sample_shape = (height, width, channels)

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        self._jpegs.check(ids)  # of damaged bytes the decoder makes an image of some kind, and says nothing
        out = torch.empty(len(ids), *self._sample_shape, dtype=torch.uint8)
        rows = self._jpegs.table[ids]
        columns = np.column_stack([rows[name] for name in ("address", "bytes", "height", "width")]).astype(np.int64)
        _decode_and_transform(self._jpegs.file, columns, params, out.numpy())
        return out.permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        del self._jpegs


@Compiler.compile
def _read_and_transform(
    file: NDArray[np.uint8], addresses: Ids, params: SampleParams, out: NDArray[np.uint8]
) -> None:  # in one pass: two would copy every image twice
    shape = out.shape[1:]
    size = shape[0] * shape[1] * shape[2]
    for i in range(len(addresses)):
        stored = file[addresses[i] : addresses[i] + size].reshape(shape)
        transform_sample(stored, params[i], out[i])


_imdecode = Compiler.compile(imdecode)


@Compiler.compile
def _decode_and_transform(
    file: NDArray[np.uint8], columns: NDArray[np.int64], params: SampleParams, out: NDArray[np.uint8]
) -> None:
    middle = np.empty(out.shape[1:], np.uint8)
    for i in range(len(columns)):
        address, size, height, width = columns[i]
        image = np.empty((height, width, 3), np.uint8)
        content = file[address : address + size]
        if _imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
            raise ValueError("FFCV cannot decode the JPEG")
        transform_sample(image, params[i, 0], middle)
        transform_sample(middle, params[i, 1], out[i])


def decode_jpeg(content: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Decode a JPEG as the backend does.

    Args:
        content: of the file.
        height: of the image; likewise ``width``.

    Returns:
        ``(height, width, 3)``; ``None`` if the decoder has anything to complain of.
    """
    image = np.empty((height, width, 3), np.uint8)
    source = np.frombuffer(content, np.uint8)
    failed = imdecode(source, image, height, width, height, width, 0, 0, 1, 1, False, False)
    return None if failed else image


def write_beton(file: BinaryIO, images: NDArray[np.uint8] | StoredImages, labels: Ids) -> None:
    """Write a beton with the fields ``image``, of pixels, and ``label``.

    Byte for byte what FFCV's ``DatasetWriter(num_workers=1)`` writes, which uses processes that it does not watch:
    when one of them fails, on a full disk say, it waits for ever.

    Args:
        file: open for writing bytes, empty.
        images: ``(n, H, W, C)``.
        labels: ``(n,)``.
    """
    _, height, width, channels = images.shape
    layout = _PixelLayout(labels, (channels, height, width))
    file.seek(layout.first_page)
    for start in range(0, len(images), layout.samples_per_page):
        page = images[start : start + layout.samples_per_page].tobytes()
        file.write(page + bytes(layout.page_bytes - len(page)))
    layout.write_tables(file)


def jpeg_pages(samples: int, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Where the JPEGs of a beton may lie: from the first number on, none across a multiple of the second."""
    layout = _JpegLayout(np.zeros(samples, np.int64), None, image_shape)
    return layout.first_page, layout.page_bytes


def write_jpeg_tables(file: BinaryIO, table: NDArray[Any], labels: Ids, image_shape: tuple[int, int, int]) -> None:
    """Make a file that holds JPEGs a beton with the fields ``image`` and ``label``.

    Args:
        file: open for writing bytes; its JPEGs lie as `jpeg_pages` says, for as many samples or more.
        table: of them, see :data:`~sfw_dist.data.loading.jpeg.JPEG_ROW`.
        labels: ``(n,)``.
        image_shape: ``(channels, height, width)`` of the batches.
    """
    _JpegLayout(labels, table, image_shape).write_tables(file)


class _Layout(ABC):
    """A beton: header, descriptors of the fields, a row for each sample; pages of samples; where each sample lies."""

    def __init__(self, image: Any, labels: Ids, page_bytes: int) -> None:
        self.labels, self.page_bytes = labels, page_bytes
        fields = {"image": image, "label": IntField()}
        type_ids = {field_type: type_id for type_id, field_type in TYPE_ID_HANDLER.items()}
        self._descriptors = np.zeros(len(fields), FieldDescType)
        for descriptor, (name, field) in zip(self._descriptors, fields.items(), strict=True):
            descriptor["type_id"] = type_ids[type(field)]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            descriptor["arguments"][:] = field.to_binary()[0]
        self._row_type = get_metadata_type(list(fields.values()))
        before_rows = HeaderType.itemsize + self._descriptors.nbytes
        self.first_page = _whole_pages(before_rows + len(labels) * self._row_type.itemsize, page_bytes)

    @abstractmethod
    def table_start(self) -> int:
        """Where the allocation table begins."""

    @abstractmethod
    def images(self, block: slice) -> NDArray[Any]:
        """What the rows of these samples hold of their images."""

    @abstractmethod
    def places(self, block: slice) -> tuple[Ids, Ids]:
        """Addresses and sizes of these samples."""

    @property
    def blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, len(self.labels), BLOCK)]

    @property
    def head(self) -> bytes:
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, 2, self.page_bytes
        header["num_samples"], header["alloc_table_ptr"] = len(self.labels), self.table_start()
        return header.tobytes() + self._descriptors.tobytes()

    def rows(self, block: slice) -> NDArray[Any]:
        rows = np.zeros(len(self.labels[block]), self._row_type)
        rows["f0"], rows["f1"] = self.images(block), self.labels[block]
        return rows

    def table(self, block: slice) -> NDArray[Any]:
        table = np.zeros(len(self.labels[block]), ALLOC_TABLE_TYPE)
        table["sample_id"] = np.arange(block.start, block.start + len(table))
        table["ptr"], table["size"] = self.places(block)
        return table

    def write_tables(self, file: BinaryIO) -> None:
        file.seek(0)
        file.write(self.head)
        for block in self.blocks:
            file.write(self.rows(block).tobytes())
        file.seek(self.table_start())
        for block in self.blocks:
            file.write(self.table(block).tobytes())
        file.truncate()


class _PixelLayout(_Layout):
    """Images of one size, as pixels."""

    def __init__(self, labels: Ids, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        self._sample_bytes = height * width * channels
        page_bytes = _page_bytes(self._sample_bytes)
        self.samples_per_page = page_bytes // self._sample_bytes
        super().__init__(NDArrayField(np.dtype("uint8"), (height, width, channels)), labels, page_bytes)

    def table_start(self) -> int:
        return self.first_page + -(-len(self.labels) // self.samples_per_page) * self.page_bytes

    def images(self, block: slice) -> NDArray[Any]:
        return self.places(block)[0]

    def places(self, block: slice) -> tuple[Ids, Ids]:
        numbers = np.arange(block.start, block.start + len(self.labels[block]))
        page, slot = np.divmod(numbers, self.samples_per_page)
        addresses = self.first_page + page * self.page_bytes + slot * self._sample_bytes
        return addresses, np.full(len(numbers), self._sample_bytes)


class _JpegLayout(_Layout):
    """JPEGs that lie where a table says."""

    def __init__(self, labels: Ids, table: NDArray[Any] | None, image_shape: tuple[int, int, int]) -> None:
        self._jpegs = table
        super().__init__(RGBImageField(), labels, _page_bytes(largest_jpeg(image_shape)))

    @property
    def _table(self) -> NDArray[Any]:
        assert self._jpegs is not None
        return self._jpegs

    def table_start(self) -> int:
        last = self._table[-1]
        return _whole_pages(int(last["address"]) + int(last["bytes"]), self.page_bytes)

    def images(self, block: slice) -> NDArray[Any]:
        jpegs = self._table[block]
        images = np.zeros(len(jpegs), RGBImageField().metadata_type)
        images["mode"], images["data_ptr"] = IMAGE_MODES["jpg"], jpegs["address"]
        images["height"], images["width"] = jpegs["height"], jpegs["width"]
        return images

    def places(self, block: slice) -> tuple[Ids, Ids]:
        return self._table["address"][block], self._table["bytes"][block]


def _page_bytes(sample_bytes: int) -> int:
    """A power of two that holds a sample."""
    return int(max(MIN_PAGE_SIZE, 1 << (sample_bytes - 1).bit_length()))


def _whole_pages(size: int, page_bytes: int) -> int:
    return -(-size // page_bytes) * page_bytes


class _MappedReader(Reader):
    """FFCV's reader, with tables that stay in the file: FFCV copies them into every process."""

    def read_metadata(self) -> None:
        start = HeaderType.itemsize + self.field_descriptors.nbytes
        self.metadata = self._mapped(self.metadata_type, start)

    def read_allocation_table(self) -> None:
        self.alloc_table = self._mapped(ALLOC_TABLE_TYPE, int(self.header["alloc_table_ptr"]))

    def _mapped(self, row_type: np.dtype[Any], start: int) -> NDArray[Any]:
        return np.memmap(self.file_name, row_type, "r", start, (int(self.num_samples),))


def _checked(path: Path, layout: _Layout) -> _MappedReader:
    """Open a beton; raise :class:`UserError` unless its tables are as in ``layout``: a wrong address is a crash."""
    head, table_bytes = layout.head, ALLOC_TABLE_TYPE.itemsize * len(layout.labels)
    with path.open("rb") as file:
        intact = file.read(len(head)) == head and path.stat().st_size == layout.table_start() + table_bytes
    if intact:
        reader = _MappedReader(str(path))
        if all(
            np.array_equal(reader.metadata[block], layout.rows(block))
            and np.array_equal(reader.alloc_table[block], layout.table(block))
            for block in layout.blocks
        ):
            return reader
    raise UserError(f"{path} is damaged (header or tables): {prepare_again(path.parent)}")
