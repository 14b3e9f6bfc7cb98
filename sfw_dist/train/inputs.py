"""A run's input: checks of everything that may be wrong with it, its loaders, and how a batch is prepared."""

from __future__ import annotations

import torch
from torch import Tensor

from sfw_dist.config import Config, DataConfig
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.loading import Loader, MixUpCutMix, Normalize, Split, dataset_info, open_loader, rank_sampler
from sfw_dist.data.prepare import prepare
from sfw_dist.data.record import DataRecord
from sfw_dist.distributed.world import World
from sfw_dist.train.init_stage import check_half_batches
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.strategies import check_world


def check_input(config: Config, rank: int, world_size: int, *, resume: bool) -> RunFolder:
    """Check the run's folder, the data, and the number of ranks; writes nothing to the run's folder.

    Args:
        config: the run.
        rank: the rank whose part of the data is checked.
        world_size: number of ranks.
        resume: whether an existing run may be resumed.

    Returns:
        The run's folder, which may not exist yet.

    Raises:
        UserError: the first thing that is wrong.
    """
    run = RunFolder(config.run_dir)
    run.check_free_for(config, resume)
    _prepare_if_possible(config.data)
    run.check_data(dataset_info(config.data).record)
    for split in splits(config):
        rank_sampler(config.data, split, seed=config.seed, rank=rank, world_size=world_size)
    check_world(config, world_size)
    check_half_batches(config, world_size)
    return run


def _prepare_if_possible(data: DataConfig) -> None:
    """Prepare what needs neither downloads nor options: what a dependency contains, and what a function makes."""
    if ":" in data.name:
        prepare(data.name, data.root, check_source=True)
    elif data.name in DATASETS and DATASETS[data.name].embedded:
        prepare(data.name, data.root)


def splits(config: Config) -> list[Split]:
    """Return the names of the splits that the run has."""
    return ["train", "test", "validation"] if config.data.validation_fraction > 0 else ["train", "test"]


def open_loaders(config: Config, world: World) -> dict[Split, Loader]:
    """Open this rank's loader of each split."""
    return {
        split: open_loader(
            config.data, split, seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
        )
        for split in splits(config)
    }


class BatchPreparation:
    """From a loader's uint8 images and labels to what the network and its loss take, on this rank's device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._device = device
        self._info = dataset_info(config.data)
        self._normalize = Normalize(self._info.mean, self._info.std).to(device)
        self._mix = MixUpCutMix(
            self.classes,
            mixup=config.data.mixup,
            cutmix=config.data.cutmix,
            label_smoothing=config.data.label_smoothing,
            seed=config.seed,
        )

    @property
    def data(self) -> DataRecord:
        """What the run remembers of its data."""
        return self._info.record

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self._info.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        return self._info.image_shape

    def training(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Normalize and mix a training batch.

        Args:
            images: uint8 ``(batch, channels, height, width)``.
            labels: int64 ``(batch,)``.
            number: of the batch, from 0, which decides how its images are mixed.

        Returns:
            Float images, and labels: as given, or class probabilities ``(batch, classes)`` where images are mixed or
            labels smoothed.
        """
        images, labels = images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        return self._mix(self._normalize(images), labels, number)

    def evaluation(self, images: Tensor) -> Tensor:
        """Normalize uint8 images that are on the device."""
        normalized: Tensor = self._normalize(images)
        return normalized
