"""Writes JPEGs one behind the other, into a file that becomes a beton."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.jpeg import Jpeg
from sfw_dist.data.loading.jpeg import JPEG_ROW
from sfw_dist.data.pixels import covering_bytes
from sfw_dist.data.sampler import Ids
from sfw_dist.files import replacing

if TYPE_CHECKING:
    from sfw_dist.data.decode import Sample

CHUNK_BYTES = 32 << 20
"""Pixels in a chunk, about; their JPEGs are smaller."""


class JpegStore:
    """The JPEGs of one part, of which 20 bytes a sample are in memory (see :mod:`sfw_dist.data.writing.image_writer`).

    Args:
        form: of the images.
        total: number of samples.
    """

    in_order = True

    def __init__(self, form: ImageFormat, total: int) -> None:
        from sfw_dist.data.loading.ffcv import jpeg_pages

        self._form = form
        self.chunk_samples = CHUNK_BYTES // covering_bytes(form.shape)
        self._end, self._page_bytes = jpeg_pages(total, form.shape)
        self.table = np.zeros(total, JPEG_ROW)
        """A row for each sample; zeros for a bad one."""
        self.values = np.zeros((form.channels, 256), np.int64)
        """How often each value occurs in the middle of the images."""

    def resume(self, file: BinaryIO, chunk: range, stored: Any) -> bool:
        rows = np.frombuffer(base64.b64decode(stored["rows"]), JPEG_ROW)
        if len(rows) != len(chunk):
            return False
        for row in rows:
            file.seek(int(row["address"]))
            if zlib.crc32(file.read(int(row["bytes"]))) != row["crc"]:
                return False
        self._take(chunk, rows, np.array(stored["values"], np.int64))
        return True

    def begin(self, file: BinaryIO) -> None:
        """Forget what an earlier call has written behind the chunks that are kept; `finish` writes the tables."""
        file.truncate(self._end)

    def write(self, file: BinaryIO, chunk: range, samples: Sequence[Sample]) -> Any:
        rows, values, end = np.zeros(len(chunk), JPEG_ROW), np.zeros_like(self.values), self._end
        for i, sample in enumerate(samples):
            if isinstance(sample.pixels, Jpeg):
                content, height, width, counts = sample.pixels
                assert len(content) <= self._page_bytes
                if end % self._page_bytes + len(content) > self._page_bytes:
                    end = -(-end // self._page_bytes) * self._page_bytes
                file.seek(end)
                file.write(content)
                rows[i] = end, len(content), zlib.crc32(content), height, width
                values += counts
                end += len(content)
        self._take(chunk, rows, values)
        return {"rows": base64.b64encode(rows.tobytes()).decode(), "values": values.tolist()}

    def _take(self, chunk: range, rows: NDArray[Any], values: NDArray[np.int64]) -> None:
        self.table[chunk.start : chunk.stop] = rows
        self.values += values
        self._end = max(self._end, int((rows["address"] + rows["bytes"]).max()))

    def finish(self, beton: Path, table_file: Path, good: Sequence[int], labels: Ids) -> None:
        """Write the tables: the beton's own, and ours.

        Args:
            beton: that was written.
            table_file: for the table of :data:`~sfw_dist.data.loading.jpeg.JPEG_ROW`.
            good: the samples to keep, ascending.
            labels: of the good ones.
        """
        from sfw_dist.data.loading.ffcv import write_jpeg_tables

        table = self.table[good]
        with beton.open("r+b") as file:
            write_jpeg_tables(file, table, labels, self._form.shape)
            file.flush()
            os.fsync(file.fileno())
        with replacing(table_file) as file:
            np.save(file, table)
