"""Made-up images for the benchmarks: JPEG files as large as Tiny-ImageNet's, and torchvision's way to read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare

MEAN, STD = (0.48, 0.45, 0.40), (0.28, 0.27, 0.28)


def make_images(root: Path, train: int, side: int, classes: int = 10) -> Path:
    """``train`` images and a tenth as many for validation below ``root/raw/imagefolder``, and prepared; the raw folder.

    Blocks of colour with some noise, at a quality that makes them about 2 KB at 64×64, as in Tiny-ImageNet.
    """
    raw = root / "raw" / "imagefolder"
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", max(train // 10, classes))):
        for number in range(count):
            folder = raw / part / f"class{number % classes:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
            noise = draw.integers(-12, 13, (side, side, 3))
            pixels = np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:06d}.JPEG", quality=70)
    prepare("imagefolder", root, options=Options(size=(side, side)))
    return raw


def image_folder_loader(folder: Path, side: int, batch_size: int, workers: int = 2) -> DataLoader[object]:
    """Crop, flip, to float32 and normalise, as in torchvision's reference scripts."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(side, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        ImageFolder(str(folder), transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
