"""Loaders for a GPU: the same bits, where copies need not wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfw_dist.config import DataConfig
from sfw_dist.data.loading import MixUpCutMix, Normalize, open_loader

GPU = torch.device("cuda", 0)


@pytest.fixture
def config(digits: Path) -> DataConfig:
    return DataConfig(root=str(digits), backend="ram", batch_size=100, crop_padding=2, flip=True, cutout=3)


@pytest.mark.parametrize("augmentation", [{}, {"crop_padding": 0, "random_resized_crop": 0.3}])
def test_the_resident_set_yields_the_bits_of_the_cpu(config: DataConfig, augmentation: dict[str, float]) -> None:
    """A run depends on where its data lies."""
    config = replace(config, **augmentation)  # type: ignore[arg-type]
    on_cpu = list(open_loader(config, "train", seed=1))
    on_gpu = list(open_loader(replace(config, backend="gpu"), "train", seed=1, device=GPU))
    for (images, labels), (theirs, their_labels) in zip(on_cpu, on_gpu, strict=True):
        assert theirs.device == GPU and torch.equal(images, theirs.cpu()) and torch.equal(labels, their_labels.cpu())
        assert theirs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["ffcv", "ram"])
def test_batches_for_a_gpu_are_pinned(config: DataConfig, backend: str) -> None:
    """Copies make the host wait, or the memory is overwritten while it is copied."""
    loader = open_loader(replace(config, backend=backend), "train", seed=1, device=GPU)  # type: ignore[arg-type]
    copies = []
    for images, labels in loader:
        assert images.is_pinned() and labels.is_pinned() and images.is_contiguous(memory_format=torch.channels_last)
        copies.append((images.to(GPU, non_blocking=True), labels.to(GPU, non_blocking=True)))
        del images, labels
    expected = list(open_loader(config, "train", seed=1))
    assert all(
        torch.equal(a.cpu(), b)
        for copy, batch in zip(copies, expected, strict=True)
        for a, b in zip(copy, batch, strict=True)
    )


def test_normalising_and_mixing_on_the_gpu(config: DataConfig) -> None:
    """Buffers or random parameters on another device than the batch."""
    images, labels = next(iter(open_loader(config, "train", seed=1)))
    normalize = Normalize((0.3,), (0.2,))
    mix = MixUpCutMix(10, mixup=0.3, cutmix=1.0, label_smoothing=0.1, seed=0)
    here = mix(normalize(images), labels, 3)
    there = mix(normalize.to(GPU)(images.to(GPU)), labels.to(GPU), 3)
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs.cpu())
