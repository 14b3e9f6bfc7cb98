"""Feeding large images: random boxes of 224×224 from JPEGs, against torchvision and FFCV's own loader.

    python -m benchmarks.loader_jpeg
    python -m benchmarks.loader_jpeg --images 2000 --rounds 9 --out results/loader_jpeg.json

The images are made up, 500×375 JPEGs of about 50 KB as in ImageNet, in a temporary folder. torchvision reads them as
they are; the others read what `prepare --size 224 --store jpeg` has made of them. Each round is one epoch of each
loader, in turn, with random boxes and flips, to uint8; every loader has as many workers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from sfw_dist.config import DataConfig
from sfw_dist.data.loading import open_loader
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare
from sfw_dist.files import write_json

SIDE, LEAST = 224, 0.25


def make(root: Path, images: int) -> Path:
    """Images in two classes, and a few to test on; their folder, prepared as ``flowers``."""
    draw = np.random.default_rng(0)
    for part, count in (("train", images), ("val", 2)):
        for number in range(count):
            folder = root / "photos" / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((500, 375))
            noise = draw.integers(-12, 13, (375, 500, 3))
            pixels = np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=85)
    prepare(root / "photos", root, name="flowers", options=Options(size=(SIDE, SIDE), store="jpeg"))
    return root / "photos"


def plain_epoch(loader: Iterable[Any]) -> int:
    return sum(len(labels) for _, labels in loader)


def _read(path: str) -> torch.Tensor:
    return decode_jpeg(read_file(path), ImageReadMode.RGB)


def torchvision_loader(folder: Path, batch: int, workers: int) -> Iterable[Any]:
    """Decoding to tensors and transforms v2."""
    change = v2.Compose([v2.RandomResizedCrop(SIDE, (LEAST, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    return DataLoader(
        ImageFolder(str(folder), change, loader=_read),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )


def ffcv_loader(beton: Path, batch: int, workers: int) -> Iterable[Any]:
    """FFCV's own loader, decoder and flip."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    image = [RandomResizedCropRGBImageDecoder((SIDE, SIDE), (LEAST, 1.0)), RandomHorizontalFlip(), ToTensor()]
    loader: Iterable[Any] = Loader(
        str(beton), batch, workers, os_cache=True, order=OrderOption.RANDOM, pipelines={"image": image}
    )
    return loader


def contenders(root: Path, batch: int, workers: int) -> dict[str, Callable[[], int]]:
    loaders: dict[str, Iterable[Any]] = {
        "torchvision v2, DataLoader": torchvision_loader(root / "photos" / "train", batch, workers),
        "FFCV's own loader": ffcv_loader(root / "flowers" / "train.beton", batch, workers),
    }
    config = DataConfig("flowers", str(root), batch_size=batch, validation_fraction=0, workers=workers)
    config = replace(config, random_resized_crop=LEAST, flip=True)
    loaders["ours, ffcv"] = open_loader(replace(config, backend="ffcv"), "train", seed=0)
    loaders["ours, ram"] = open_loader(replace(config, backend="ram"), "train", seed=0)
    return {name: partial(plain_epoch, loader) for name, loader in loaders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="training images (default: 1024)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.images)
        runs = contenders(Path(folder), options.batch, workers)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(options.rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                rate = run() / (time.perf_counter() - began)
                if round_:  # the first round warms up
                    rates[name].append(rate)
    print(f"{options.images:,} images, batch {options.batch}, {workers} workers, n = {options.rounds}")
    print(f"{'loader':28} {'images/s':>10} {'min':>10} {'max':>10}")
    for name, values in rates.items():
        print(f"{name:28} {statistics.median(values):10,.0f} {min(values):10,.0f} {max(values):10,.0f}")
    if options.out:
        write_json(options.out, {"images": options.images, "batch": options.batch, "images_per_second": rates})


if __name__ == "__main__":
    main()
