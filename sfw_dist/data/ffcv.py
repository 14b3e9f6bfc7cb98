"""The FFCV backend: a compiled pipeline in its own thread reads raw images ahead of the training step.

The only module that imports FFCV. FFCV's decoder copies bytes and no more; order, shares and augmentation are ours.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Full
from typing import BinaryIO, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.manifest import prepare_again
from sfw_dist.data.order import Ids
from sfw_dist.errors import UserError


@contextmanager
def _kept_thread_counts() -> Iterator[None]:
    """FFCV sets the thread counts of torch and numba when it is imported (to 1), and again with every loader."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


with _kept_thread_counts():
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader.epoch_iterator import EpochIterator
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
    """Batches from the beton at ``path``, read by FFCV (see :class:`sfw_dist.data.loader.Backend`).

    ``labels`` are those the beton must hold. Raises :class:`UserError` when the file does not describe exactly such
    samples: FFCV would crash on a wrong address, or hang.
    """

    def __init__(
        self, path: Path, labels: Ids, image_shape: tuple[int, int, int], *, batch_size: int, workers: int
    ) -> None:
        _check_beton(path, labels, image_shape)
        with _kept_thread_counts():
            self._loader = FFCVLoader(
                str(path),
                batch_size=batch_size,
                num_workers=_worker_threads(workers),
                os_cache=True,
                drop_last=False,
                seed=0,  # unused, but FFCV would draw one from numpy's global generator
                pipelines={"image": [NDArrayDecoder()], "label": [IntDecoder()]},
            )
        self._epochs: set[_Epoch] = set()

    def batches(self, ids: Ids) -> Generator[tuple[Tensor, Tensor], None, None]:
        epoch = _Epoch(self._loader, ids)
        self._epochs.add(epoch)
        try:
            for images, labels in epoch:  # (B, H, W, C) and (B, 1), views of buffers that FFCV will reuse
                yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2), torch.from_numpy(labels.flatten())
        finally:
            self._epochs.discard(epoch)
            epoch.stop()

    def close(self) -> None:
        while self._epochs:
            self._epochs.pop().stop()


class _Epoch(EpochIterator):
    """FFCV's prefetching thread over given sample ids, made to end.

    FFCV's own ``run`` leaves the consumer waiting for ever when the pipeline raises, waits for ever itself when the
    consumer leaves while its queue is full, and changes torch's thread count.
    """

    def run(self) -> None:
        slots = self.loader.batches_ahead + 2
        try:
            for number, ids in enumerate(self.iter_ixes):
                if not self._put(self.run_pipeline(number, ids, number % slots, None)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        """Hand ``item`` to the consumer; False when it has left."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.05)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        if self.terminate_event.is_set():
            raise RuntimeError("the loader was closed while its epoch was being read")
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        self.close()
        self.join()


def _worker_threads(requested: int) -> int:
    """``requested``, or for 0 this rank's share of the cores; FFCV fails on more than numba found available."""
    available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    share = available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(requested or max(share, 1), available)


def write_beton(file: BinaryIO, images: NDArray[np.uint8], labels: Ids) -> None:
    """Write images ``(n, H, W, C)`` and labels ``(n,)`` as a beton with the fields ``image`` and ``label``.

    Byte for byte what ``DatasetWriter(num_workers=1)`` writes. That one works through processes that it does not
    watch: when one of them fails, on a full disk say, it waits for ever.
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
    """A beton is its head, zeros up to ``first_page``, pages of ``page_bytes``, and the allocation table."""

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
