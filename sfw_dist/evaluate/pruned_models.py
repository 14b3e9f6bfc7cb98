"""The pruned networks of a finished run: masks, BatchNorm statistics and measurements for any sparsity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfw_dist.config import Config, load_config
from sfw_dist.data.loading import Loader, Normalize, Split, dataset_info, open_loader
from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.pruning import Pruner, Pruning, PruningOptions, count_flops, dead_layers, kept_flops, layer_table
from sfw_dist.pruning.measuring.batches import Batch
from sfw_dist.pruning.measuring.one_pass import measure_prunings
from sfw_dist.pruning.measuring.overwriting import overwriting
from sfw_dist.pruning.measuring.progress import reported
from sfw_dist.pruning.recalibration import AS_TRAINED, Statistics, batch_norms, recalibrated_statistics
from sfw_dist.train.metrics import Metrics, Tally
from sfw_dist.train.run_folder import RunFolder, write_tensors
from sfw_dist.train.strategies import autocast


class PrunedModels:
    """The network of a finished run on this rank and its data, to be pruned and measured; close it at the end.

    Args:
        run: with ``model.safetensors``.
        world: the ranks that share the work.
        options: how to prune; ``None`` takes the run's configuration (``prune:``).
        data_root: where the data set lies now, if elsewhere than in training.

    Attributes:
        config: of the run.
        options: how it is pruned.
        model: the network; a method that changes it restores it to the bit.
        norms: how many BatchNorm layers it has.
        batches: over how many batches their statistics are measured; 0: they stay as trained.

    Raises:
        UserError: no such run, not yet trained, another model's weights, or a data set that is not there.
    """

    def __init__(
        self, run: RunFolder, world: World, options: PruningOptions | None = None, *, data_root: str | None = None
    ) -> None:
        config = load_config(run.config)
        if data_root is not None:
            config = replace(config, data=replace(config.data, root=data_root))
        self.config, self.options = config, config.prune if options is None else options
        self._world = world
        self._loaders: dict[str, Loader] = {}
        info = dataset_info(config.data)
        run.check_data(info.record)
        self._data = info.record
        self._image_shape = info.image_shape
        self.model = _trained_model(run, config, len(info.classes), info.image_shape[0]).to(world.device).eval()
        self._normalize = Normalize(info.mean, info.std).to(world.device)
        self._flops: dict[str, int] | None = None
        self._pruner: Pruner | None = None
        self.norms = len(batch_norms(self.model))
        self.batches = 0
        if self.norms and self.options.recalibrate:
            self.batches = min(self.options.recalibrate, len(self._training_loader()))

    def close(self) -> None:
        """Release the data."""
        for loader in self._loaders.values():
            loader.close()

    def at(self, sparsity: float) -> Pruning:
        """What is left of the network at this sparsity."""
        if self._pruner is None:
            self._pruner = Pruner(self.model, self.options)  # once: it serves every sparsity
        return self._pruner.at(sparsity)

    def recalibrated(self, prunings: Sequence[Pruning]) -> list[Statistics]:
        """BatchNorm's statistics for the network after each pruning, in one pass; collective.

        As trained when there are no ``batches``.
        """
        if not self.batches:
            return [AS_TRAINED for _ in prunings]
        with autocast(self.config, self._world.device):
            return recalibrated_statistics(
                self.model, prunings, self._training_batches(), self._world.ranks, same_batches=True
            )

    def measure(
        self, split: Split, prunings: Sequence[Pruning], statistics: Sequence[Sequence[Statistics]]
    ) -> list[list[Metrics]]:
        """Measure each pruned network with each of its BatchNorm statistics, in one pass over the split; collective.

        Args:
            split: of the data set.
            prunings: what is left of the network, for each sparsity.
            statistics: for each of ``prunings``, the statistics to measure it with.

        Returns:
            Metrics for each of ``prunings`` and each of its statistics.
        """
        device = self._world.device
        tallies = [[Tally(device) for _ in variants] for variants in statistics]
        with autocast(self.config, device):
            measure_prunings(
                self.model, prunings, statistics, self._labelled_batches(split), tallies, self._world.ranks, device
            )
        return [[tally.total(self._world) for tally in sums] for sums in tallies]

    def describe(self, sparsity: float, pruning: Pruning) -> dict[str, Any]:
        """What a result file says of a pruned network, apart from its accuracy."""
        if self._flops is None:
            self._flops = count_flops(self.model, torch.zeros(1, *self._image_shape, device=self._world.device))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        removed = pruning.total - pruning.kept
        return {
            "sparsity": sparsity,
            **self.options.record(),
            "achieved_sparsity_all": removed / total,
            "achieved_sparsity_prunable": pruning.sparsity,
            "flops_dense": sum(self._flops.values()),
            "flops": kept_flops(self._flops, pruning),
            "parameters_total": total,
            "parameters_kept": total - removed,
            "layers": layer_table(self.model, pruning),
            "dead_layers": dead_layers(pruning),
            "bn_layers": self.norms,
            "bn_recalibrated": self.batches > 0,
            "recalibration_batches": self.batches,
            "recalibration_batch_size": self._recalibration_batch_size if self.batches else 0,
            "seed": self.config.seed,
        }

    def export(self, pruning: Pruning, statistics: Statistics, path: Path) -> None:
        """Write the pruned network's parameters and buffers by name, with these statistics: what was measured."""
        with overwriting(self.model, [pruning], statistics) as tensors:  # so that each name of a tied weight is pruned
            tensors.prune(pruning)
            tensors.set_buffers(statistics)
            write_tensors(path, self.model.state_dict(), self._data)

    def _loader(self, split: Split) -> Loader:
        if split not in self._loaders:
            world, config = self._world, self.config
            self._loaders[split] = open_loader(
                config.data, split, seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
            )
        return self._loaders[split]

    @property
    def _recalibration_batch_size(self) -> int:
        """Not the global batch, for which one rank may lack the memory; and a single image may have no variance."""
        return max(2, min(self.config.data.batch_size, self.config.data.eval_batch_size))

    def _training_loader(self) -> Loader:
        """All images on every rank, in the order of the first epoch, not augmented, as test images are not."""
        if "recalibration" not in self._loaders:
            plain: dict[str, Any] = {"crop_padding": 0, "flip": False, "cutout": 0, "random_resized_crop": 0.0}
            data = replace(self.config.data, batch_size=self._recalibration_batch_size, **plain)
            self._loaders["recalibration"] = open_loader(
                data, "train", seed=self.config.seed, device=self._world.device
            )
        return self._loaders["recalibration"]

    def _training_batches(self) -> Iterator[Tensor]:
        for images, _ in self._reported(self._training_loader(), "recalibrated", self.batches):
            yield self._inputs(images)

    def _labelled_batches(self, split: Split) -> Iterator[Batch]:
        for images, labels in self._reported(self._loader(split), "measured"):
            labels = labels.to(self._world.device, non_blocking=True)
            yield Batch((self._inputs(images),), {}, labels, len(labels))

    def _reported(self, loader: Loader, what: str, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        return reported(loader, what, None if self._world.main else False, most=most)

    def _inputs(self, images: Tensor) -> Tensor:
        return self._normalize(images.to(self._world.device, non_blocking=True))


def check_same_pruning(paths: Iterable[Path], options: PruningOptions) -> None:
    """Raise :class:`UserError` rather than replace a result by one that was pruned in another way."""
    for path in paths:
        if path.is_file():
            there = PruningOptions.of_record(json.loads(path.read_text()))
            mine, theirs = _command_line(options), _command_line(there)
            if mine != theirs:
                raise UserError(f"{path} holds the result of {theirs}: move {path.parent} away to measure {mine}")


def _command_line(options: PruningOptions) -> str:
    words = ("scope", "granularity", "ranking", "criterion")
    return " ".join(f"--{word} {getattr(options, word)}" for word in words)


def accuracy(metrics: Metrics) -> dict[str, Any]:
    """Metrics for a JSON file, which has no infinity: the loss of a network pruned too far becomes ``None``."""
    return {key: value if abs(value) < float("inf") else None for key, value in asdict(metrics).items()}


def _trained_model(run: RunFolder, config: Config, classes: int, channels: int) -> nn.Module:
    network = config.model
    model = build_model(
        network.name, num_classes=classes, in_channels=channels, width=network.width, kwargs=network.kwargs
    )
    try:
        model.load_state_dict(run.load_weights())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.weights} is not of the run's model ({reason}): train the run again") from None
    return model
