"""The ffcv backend: betons (FFCV's files) of raw images, read by FFCV's compiled reader with one operation of our own.

The only module that imports FFCV. FFCV's loader compiles the pipeline: read a sample's bytes from the beton and
transform them (crop, flip, cutout) in the same pass. We run that pipeline in our own threads and into our own memory:
FFCV's thread never ends when the pipeline raises or the consumer stops, its buffers are overwritten by later batches,
and its augmentations cannot be seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.loading.augment_numba import transform_sample
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.manifest import prepare_again
from sfw_dist.data.sampler import Ids
from sfw_dist.errors import UserError, needs_extra


@contextmanager
def _kept_thread_counts() -> Iterator[None]:
    """Restore the thread counts of torch and numba, which FFCV sets to 1 at its import and with every loader."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


with _kept_thread_counts(), needs_extra("data.backend ffcv", "ffcv"):
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.loader import Loader as FFCVLoader
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
    """Reads batches from a beton by FFCV (see :class:`sfw_dist.data.loading.backend.Backend`).

    Args:
        path: of the beton.
        labels: that the beton must hold, ``(n,)``.
        image_shape: ``(channels, height, width)``.

    Raises:
        UserError: the file does not describe exactly such samples. FFCV would crash on a wrong address, or hang.
    """

    threaded = True

    def __init__(self, path: Path, labels: Ids, image_shape: tuple[int, int, int]) -> None:
        _check_beton(path, labels, image_shape)
        self._labels = labels
        channels, height, width = image_shape
        self._sample_shape = (height, width, channels)
        with _kept_thread_counts():
            loader = FFCVLoader(
                str(path),
                batch_size=1,
                num_workers=1,
                os_cache=True,
                drop_last=False,
                seed=0,  # unused, but FFCV would draw one from numpy's global generator
                pipelines={"image": [_ReadAndTransform()], "label": None},
            )
        ((self._pipeline, _),), _ = loader.code
        (node,) = loader.graph.allocate_memory(1, 1)["operation"]
        self._destination = f"memory_{node}"
        context = loader.memory_manager.schedule_epoch([])
        context.__enter__()  # maps the file; nothing unmaps it
        self._source = {
            "metadata": loader.reader.metadata,
            "storage_state": context.state,
            f"shared_memory_{node}": None,
        }

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        out = torch.empty(len(ids), *self._sample_shape, dtype=torch.uint8)
        samples = np.column_stack([ids, params])  # (B, 1 + 8)
        self._pipeline(batch_indices=samples, **{self._destination: out.numpy()}, **self._source)
        return out.permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        del self._pipeline, self._source


class _ReadAndTransform(NDArrayDecoder):
    """FFCV's decoder for arrays, extended by the transform: as a second operation it would copy every image twice.

    What FFCV passes through as the samples' indices are rows of ``(id, parameters)`` here.
    """

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read
        height, width, channels = self.field.shape

        def read_and_transform(samples: Any, out: Any, addresses: Any, storage_state: Any) -> Any:
            for i in range(len(samples)):
                stored = read(addresses[samples[i, 0]], storage_state)
                transform_sample(stored.reshape((height, width, channels)), samples[i, 1:], out[i])
            return out

        return read_and_transform


def write_beton(file: BinaryIO, images: NDArray[np.uint8], labels: Ids) -> None:
    """Write a beton with the fields ``image`` and ``label``.

    Byte for byte what FFCV's ``DatasetWriter(num_workers=1)`` writes, which uses processes that it does not watch:
    when one of them fails, on a full disk say, it waits for ever.

    Args:
        file: open for writing bytes, empty.
        images: ``(n, H, W, C)``.
        labels: ``(n,)``.
    """
    _, height, width, channels = images.shape
    layout = _beton_layout(labels, (channels, height, width))
    file.write(layout.head)
    file.write(bytes(layout.first_page - len(layout.head)))
    for start in range(0, len(images), layout.samples_per_page):
        page = images[start : start + layout.samples_per_page].tobytes()
        file.write(page + bytes(layout.page_bytes - len(page)))
    file.write(layout.table)


class _BetonLayout(NamedTuple):
    """The parts of a beton: head, zeros up to ``first_page``, pages of ``page_bytes``, and the allocation table."""

    head: bytes
    """Header, field descriptors, and a row (address of the image, label) for each sample."""
    first_page: int
    page_bytes: int
    samples_per_page: int
    table_start: int
    table: bytes


def _beton_layout(labels: Ids, image_shape: tuple[int, int, int]) -> _BetonLayout:
    channels, height, width = image_shape
    fields = {"image": NDArrayField(np.dtype("uint8"), (height, width, channels)), "label": IntField()}
    type_ids = {field_type: type_id for type_id, field_type in TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(fields), FieldDescType)
    for descriptor, (name, field) in zip(descriptors, fields.items(), strict=True):
        descriptor["type_id"] = type_ids[type(field)]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"][:] = field.to_binary()[0]

    sample_bytes = height * width * channels
    page_bytes = max(MIN_PAGE_SIZE, 1 << (sample_bytes - 1).bit_length())  # a power of two that holds a sample
    samples_per_page = page_bytes // sample_bytes
    rows = np.zeros(len(labels), get_metadata_type(list(fields.values())))
    head_bytes = HeaderType.itemsize + descriptors.nbytes + rows.nbytes
    first_page = -(-head_bytes // page_bytes) * page_bytes
    table_start = first_page + -(-len(labels) // samples_per_page) * page_bytes

    page, slot = np.divmod(np.arange(len(labels)), samples_per_page)
    rows["f0"] = first_page + page * page_bytes + slot * sample_bytes
    rows["f1"] = labels
    table = np.zeros(len(labels), ALLOC_TABLE_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(len(labels)), rows["f0"], sample_bytes
    header = np.zeros(1, HeaderType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page_bytes
    header["num_samples"], header["alloc_table_ptr"] = len(labels), table_start

    head = header.tobytes() + descriptors.tobytes() + rows.tobytes()
    return _BetonLayout(head, first_page, page_bytes, samples_per_page, table_start, table.tobytes())


def _check_beton(path: Path, labels: Ids, image_shape: tuple[int, int, int]) -> None:
    layout = _beton_layout(labels, image_shape)
    with path.open("rb") as file:
        head = file.read(len(layout.head))
        file.seek(layout.table_start)
        table = file.read()
    if (head, table) != (layout.head, layout.table):
        raise UserError(f"{path} is damaged (header or tables): {prepare_again(path.parent)}")
