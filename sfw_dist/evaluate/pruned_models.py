"""A finished run, opened to be pruned and measured: its network, its data, and what was asked of BatchNorm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sfw_dist.config import Config, PruneConfig, load_config
from sfw_dist.data.loading import Loader, Normalize, Split, dataset_info, open_loader
from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.pruning.low_rank import Factors
from sfw_dist.pruning.masks import magnitude_masks
from sfw_dist.pruning.one_shot import Kind, Pruning, masked_parameters, singular_factors, truncated
from sfw_dist.pruning.recalibration import Statistics, batch_norms, recalibrated_statistics
from sfw_dist.pruning.scope import Scope
from sfw_dist.pruning.summary import count_flops, dead_layers, kept_flops, layer_table
from sfw_dist.train.metrics import Metrics, Tally
from sfw_dist.train.run_folder import RunFolder, write_tensors
from sfw_dist.train.strategies import autocast

AS_TRAINED: Statistics = {}
"""Overrides nothing."""


class TrainedRun:
    """The network of a finished run on this rank, and its data; close it at the end.

    Args:
        run: with ``model.safetensors``.
        scope, kind, recalibrate: ``None`` takes the run's configuration (``prune:``).
        data_root: where the data set lies now, if elsewhere than in training.

    Raises:
        UserError: ``recalibrate`` below 0, no such run, not yet trained, another model's weights, or a data set that is
            not there.
    """

    def __init__(
        self,
        run: RunFolder,
        world: World,
        *,
        scope: Scope | None = None,
        kind: Kind | None = None,
        recalibrate: int | None = None,
        data_root: str | None = None,
    ) -> None:
        config = load_config(run.config)
        if data_root is not None:
            config = replace(config, data=replace(config.data, root=data_root))
        given = {"scope": scope, "kind": kind, "recalibrate": recalibrate}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        self.config = replace(config, prune=replace(config.prune, **options))
        self._world = world
        self._loaders: dict[str, Loader] = {}
        info = dataset_info(config.data)
        self._image_shape = info.image_shape
        self.model = _trained_model(run, config, len(info.classes), info.image_shape[0]).to(world.device).eval()
        self._normalize = Normalize(info.mean, info.std).to(world.device)
        self._flops: dict[str, int] | None = None
        self._factors: Factors | None = None
        self.norms = len(batch_norms(self.model))
        """BatchNorm layers."""
        self.batches = 0
        """What the statistics are measured from; 0: they stay as trained."""
        if self.norms and self.config.prune.recalibrate:
            self.batches = min(self.config.prune.recalibrate, len(self._training_loader()))

    def close(self) -> None:
        """Release the data."""
        for loader in self._loaders.values():
            loader.close()

    def masks(self, sparsity: float) -> Pruning:
        """As `prune`, with the run's scope and kind, but without changing the model."""
        scope, kind = self.config.prune.scope, self.config.prune.kind
        if kind != "low_rank":
            return magnitude_masks(self.model, sparsity, scope=scope, kind=kind)
        if self._factors is None:
            self._factors = singular_factors(self.model, scope=scope)  # once: they serve every sparsity
        return truncated(self._factors, sparsity)

    def recalibrated(self, masks: Sequence[Pruning]) -> list[Statistics]:
        """BatchNorm's statistics for the network under each of ``masks``, in one pass; collective.

        As trained when there are no ``batches``.
        """
        if not self.batches:
            return [AS_TRAINED for _ in masks]
        with autocast(self.config, self._world.device):
            return recalibrated_statistics(self.model, masks, self._training_batches(), self._world)

    def measure(
        self, split: Split, masks: Sequence[Pruning], statistics: Sequence[Sequence[Statistics]]
    ) -> list[list[Metrics]]:
        """Metrics of the network under each of ``masks``, with each of its ``statistics``; collective.

        In one pass over the split. Only the masks (a byte an entry) or ranks and BatchNorm's statistics are kept for
        each sparsity; what is left of the weights is made anew for every batch.
        """
        device = self._world.device
        tallies = [[Tally(device) for _ in variants] for variants in statistics]
        for images, labels in self._loader(split):
            inputs, labels = self._inputs(images), labels.to(device, non_blocking=True)
            for mask, variants, sums in zip(masks, statistics, tallies, strict=True):
                pruned = masked_parameters(self.model, mask)
                for variant, tally in zip(variants, sums, strict=True):
                    with torch.no_grad(), autocast(self.config, device):
                        tally.add(functional_call(self.model, {**pruned, **variant}, (inputs,)), labels)
        return [[tally.total(self._world) for tally in sums] for sums in tallies]

    def describe(self, sparsity: float, masks: Pruning) -> dict[str, Any]:
        """What a result's file says of a pruned network beside its accuracy."""
        if self._flops is None:
            self._flops = count_flops(self.model, torch.zeros(1, *self._image_shape, device=self._world.device))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        removed = masks.total - masks.kept
        return {
            "sparsity": sparsity,
            "scope": self.config.prune.scope,
            "kind": self.config.prune.kind,
            "achieved_sparsity_all": removed / total,
            "achieved_sparsity_prunable": masks.sparsity,
            "flops_dense": sum(self._flops.values()),
            "flops": kept_flops(self._flops, masks),
            "parameters_total": total,
            "parameters_kept": total - removed,
            "layers": layer_table(self.model, masks),
            "dead_layers": dead_layers(masks),
            "bn_layers": self.norms,
            "bn_recalibrated": self.batches > 0,
            "recalibration_batches": self.batches,
            "recalibration_batch_size": self._recalibration_batch_size if self.batches else 0,
            "seed": self.config.seed,
        }

    def export(self, masks: Pruning, statistics: Statistics, path: Path) -> None:
        """Write the pruned network's parameters and buffers by name, with these statistics."""
        write_tensors(path, {**self.model.state_dict(), **masked_parameters(self.model, masks), **statistics})

    def _loader(self, split: Split) -> Loader:
        if split not in self._loaders:
            world, config = self._world, self.config
            self._loaders[split] = open_loader(
                config.data, split, seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
            )
        return self._loaders[split]

    @property
    def _recalibration_batch_size(self) -> int:
        """Not the global batch, which one rank may have no memory for; and a single image may have no variance."""
        return max(2, min(self.config.data.batch_size, self.config.data.eval_batch_size))

    def _training_loader(self) -> Loader:
        """The order of the first epoch, whole on every rank; not augmented, as the images to predict are not."""
        if "recalibration" not in self._loaders:
            plain: dict[str, Any] = {"crop_padding": 0, "flip": False, "cutout": 0, "random_resized_crop": 0.0}
            data = replace(self.config.data, batch_size=self._recalibration_batch_size, **plain)
            self._loaders["recalibration"] = open_loader(
                data, "train", seed=self.config.seed, device=self._world.device
            )
        return self._loaders["recalibration"]

    def _training_batches(self) -> Iterator[Tensor]:
        for images, _ in islice(self._training_loader(), self.batches):
            yield self._inputs(images)

    def _inputs(self, images: Tensor) -> Tensor:
        return self._normalize(images.to(self._world.device, non_blocking=True))


def check_same_pruning(paths: Iterable[Path], prune: PruneConfig) -> None:
    """Raise :class:`UserError` rather than let one result take the place of another that was not pruned alike."""
    for path in paths:
        if path.is_file():
            there = json.loads(path.read_text())
            if (there["scope"], there["kind"]) != (prune.scope, prune.kind):
                raise UserError(
                    f"{path} holds the result of --scope {there['scope']} --kind {there['kind']}: move "
                    f"{path.parent} away to measure --scope {prune.scope} --kind {prune.kind}"
                )


def accuracy(metrics: Metrics) -> dict[str, Any]:
    """For a file: ``None`` in place of what JSON cannot say, an infinite loss of a network pruned too far."""
    return {key: value if abs(value) < float("inf") else None for key, value in asdict(metrics).items()}


def _trained_model(run: RunFolder, config: Config, classes: int, channels: int) -> nn.Module:
    model = build_model(config.model.name, num_classes=classes, in_channels=channels, width=config.model.width)
    try:
        model.load_state_dict(run.load_weights())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.weights} is not of the run's model ({reason}): train the run again") from None
    return model
