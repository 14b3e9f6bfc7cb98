"""Memory that the loader of one rank takes for its tables: a set of a million tiny images.

    python -m benchmarks.loader_memory
    python -m benchmarks.loader_memory --images 200000 --out results/loader_memory.json

Every figure is of a new process, from before the loader is opened to after its first batch: what the process has itself
(RssAnon), as each rank does. Pages of the set's files (RssFile) are shared by the ranks of a machine.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfw_dist.data.loading.augment import Augmentation
from sfw_dist.data.loading.ffcv import (
    FFCVBackend,
    FFCVJpegBackend,
    write_beton,
    write_jpeg_tables,
)
from sfw_dist.data.loading.jpeg import JPEG_ROW, JpegFile, jpeg_params
from sfw_dist.files import write_json

SIDE = 8
SHAPE = (3, SIDE, SIDE)
READERS = ("FFCV's own loader, pixels", "ffcv, pixels", "ffcv, JPEGs")


def megabytes() -> float:
    """Memory that this process has itself."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


def make(folder: Path, images: int) -> None:
    """The same black image again and again, as pixels and as JPEGs."""
    labels = np.arange(images) % 10
    with (folder / "pixels.beton").open("wb") as file:
        write_beton(file, np.zeros((images, SIDE, SIDE, 3), np.uint8), labels)
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(content, "JPEG")
    table = np.zeros(images, JPEG_ROW)
    start = 1 << 27
    table["address"] = start + len(content.getvalue()) * np.arange(images)
    table["bytes"], table["crc"] = len(content.getvalue()), zlib.crc32(content.getvalue())
    table["height"] = table["width"] = SIDE
    with (folder / "jpegs.beton").open("wb") as file:
        file.seek(start)
        for _ in range(images // 1000):
            file.write(content.getvalue() * 1000)
        write_jpeg_tables(file, table, labels, SHAPE)
    np.save(folder / "jpegs.npy", table)
    np.save(folder / "labels.npy", labels)


def measure(reader: str, folder: Path) -> tuple[float, float]:
    """Megabytes and seconds to open a reader and read a batch."""
    labels, ids = np.load(folder / "labels.npy"), np.arange(256)
    params = Augmentation().sample_params(ids, (SIDE, SIDE), seed=0, epoch=0)
    before, began = megabytes(), time.perf_counter()
    match reader:
        case "ffcv, pixels":
            kept: Any = FFCVBackend(folder / "pixels.beton", labels, SHAPE)
            kept.fetch(ids, params)
        case "ffcv, JPEGs":
            table = np.load(folder / "jpegs.npy", mmap_mode="c")
            kept = FFCVJpegBackend(JpegFile(folder / "jpegs.beton", table), labels, SHAPE)
            kept.fetch(ids, jpeg_params(Augmentation(), table, ids, (SIDE, SIDE), seed=0, epoch=0))
        case _:
            from ffcv.loader import Loader

            kept = Loader(str(folder / "pixels.beton"), 256, 1, os_cache=True, drop_last=False)
            next(iter(kept))
    return megabytes() - before, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="samples (default: 1000000)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(*measure(options.measure[0], Path(options.measure[1])), flush=True)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.images)
        print(f"{options.images:,} images    {'MB':>8} {'s':>6}")
        for reader in READERS:
            command = [sys.executable, "-m", "benchmarks.loader_memory", "--measure", reader, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            megabytes_, seconds = map(float, done.stdout.split())
            figures[reader] = {"megabytes": megabytes_, "seconds": seconds}
            print(f"{reader:26} {megabytes_:8.0f} {seconds:6.1f}")
    if options.out:
        write_json(options.out, {"images": options.images, "figures": figures})


if __name__ == "__main__":
    main()
