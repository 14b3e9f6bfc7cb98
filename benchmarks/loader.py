"""Feeding images: every backend against torchvision's ImageFolder and DataLoader, interleaved in one run.

    python -m benchmarks.loader
    python -m benchmarks.loader --images 20000 --rounds 9 --out results/loader.json

The images are made up, 64×64 JPEGs of about 2 KB, in a temporary folder. Every round reads one epoch (the fast
backends: several) with random crop and flip. First batches are those of the second new process to use the backend.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import MEAN, STD, image_folder_loader, make_images
from sfw_dist.config import DataConfig
from sfw_dist.data.loading import Loader, Normalize, open_loader
from sfw_dist.files import write_json

BASELINE = "ImageFolder, DataLoader, 2 workers, fp32"
LEAST_SECONDS = 1.0
FIRST_BATCH = """
import sys, time
began = time.perf_counter()
from sfw_dist.config import DataConfig
from sfw_dist.data.loading import open_loader
imported = time.perf_counter()
name, root, size, backend = sys.argv[1:]
config = DataConfig(name, root, backend, batch_size=int(size), crop_padding=4, flip=True, validation_fraction=0)
next(iter(open_loader(config, "train", seed=0)))
print(imported - began, time.perf_counter() - imported)
"""


def epoch(loader: Loader, number: int, normalize: Normalize | None) -> int:
    loader.set_epoch(number)
    count = 0
    for images, labels in loader:
        if normalize:
            normalize(images)
        count += len(labels)
    return count


def plain_epoch(loader: Iterable[Any]) -> int:
    return sum(len(labels) for _, labels in loader)


def images_per_second(run: Callable[[], int]) -> float:
    """Whole epochs until a second is over."""
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < LEAST_SECONDS or not count:
        count += run()
    return count / seconds


def contenders(config: Callable[[str], DataConfig], raw: Path, side: int, batch: int) -> dict[str, Callable[[], int]]:
    baseline = image_folder_loader(raw / "train", side, batch)
    runs: dict[str, Callable[[], int]] = {BASELINE: lambda: plain_epoch(baseline)}
    normalize = Normalize(MEAN, STD)
    for backend in ("ffcv", "ram", "folder"):
        loader = open_loader(config(backend), "train", seed=0)
        numbers = iter(range(10**9))
        runs[f"{backend}, uint8"] = lambda loader=loader, n=numbers: epoch(loader, next(n), None)  # type: ignore[misc]
        if backend in ("ffcv", "ram"):
            runs[f"{backend}, normalised fp32"] = lambda loader=loader, n=numbers: epoch(loader, next(n), normalize)  # type: ignore[misc]
    return runs


def first_batch(config: DataConfig) -> dict[str, float]:
    """Seconds of the imports, and from opening the loader to its first batch, in a new process."""
    command = [sys.executable, "-c", FIRST_BATCH, config.name, config.root, str(config.batch_size), config.backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imports, first = map(float, done.stdout.split())
    return {"imports": imports, "first batch": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="training images (default: 10000)")
    parser.add_argument("--side", type=int, default=64, help="their side in pixels (default: 64)")
    parser.add_argument("--batch", type=int, default=256, help="batch size (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        raw = make_images(root, options.images, options.side)

        shared = DataConfig(
            "imagefolder", folder, batch_size=options.batch, crop_padding=4, flip=True, validation_fraction=0
        )

        def config(backend: str) -> DataConfig:
            return replace(shared, backend=backend)  # type: ignore[arg-type]

        runs = contenders(config, raw, options.side, options.batch)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(options.rounds + 1):
            for name, run in runs.items():
                rate = images_per_second(run)
                if round_:  # the first round warms up
                    rates[name].append(rate)
        firsts = {}
        for backend in ("ffcv", "ram"):
            first_batch(config(backend))
            firsts[backend] = first_batch(config(backend))

    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, rates[BASELINE], strict=True))
        for name, values in rates.items()
    }
    cores = len(os.sched_getaffinity(0))
    print(f"{options.images:,} images of {options.side}×{options.side}, batch {options.batch}, {cores} cores, "
          f"torch {torch.__version__}, n = {options.rounds}")  # fmt: skip
    print(f"{'loader':42} {'images/s':>10} {'min':>10} {'max':>10} {'ratio':>7}")
    for name, values in rates.items():
        print(f"{name:42} {medians[name]:10,.0f} {min(values):10,.0f} {max(values):10,.0f} {ratios[name]:7.1f}")
    for backend, seconds in firsts.items():
        print(f"{backend}: first batch {seconds['first batch']:.2f} s after imports of {seconds['imports']:.2f} s")
    if options.out:
        write_json(
            options.out,
            {
                "images": options.images,
                "side": options.side,
                "batch": options.batch,
                "cores": cores,
                "machine": platform.machine(),
                "torch": torch.__version__,
                "images_per_second": rates,
                "median_images_per_second": medians,
                "median_ratio": ratios,
                "seconds_to_first_batch": firsts,
            },
        )


if __name__ == "__main__":
    main()
