"""Prune a trained run to many sparsities and measure each, in one pass over the test set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from sfw_dist.distributed.world import World, barrier
from sfw_dist.errors import UserError
from sfw_dist.evaluate.pruned_models import AS_TRAINED, TrainedRun, accuracy, check_same_pruning
from sfw_dist.files import make_folder, write_json
from sfw_dist.pruning.one_shot import Kind
from sfw_dist.pruning.scope import Scope
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder


def evaluate(
    run: RunFolder,
    world: World,
    *,
    sparsities: Sequence[float] | None = None,
    scope: Scope | None = None,
    kind: Kind | None = None,
    recalibrate: int | None = None,
    data_root: str | None = None,
    export: bool = False,
) -> list[dict[str, Any]]:
    """Prune and measure a finished run; writes ``prune/s<sparsity>.json`` and returns what it wrote. Collective.

    Each file holds the accuracy with BatchNorm's statistics as trained (``top1``, ``top5``, ``loss``) and, where the
    network has BatchNorm, recalibrated (``top1_recalibrated``, ...; null where not).

    Args:
        run: with ``model.safetensors``.
        sparsities: ``None`` takes the run's configuration (``prune:``).
        scope, kind, recalibrate, data_root: as for `sfw_dist.evaluate.pruned_models.TrainedRun`.
        export: write the pruned networks, too, as ``prune/s<sparsity>.safetensors``, recalibrated where the file beside
            says ``bn_recalibrated``.

    Raises:
        UserError: as `TrainedRun`, sparsities that would share a file, or a file there of another scope or kind.
    """
    opened = TrainedRun(run, world, scope=scope, kind=kind, recalibrate=recalibrate, data_root=data_root)
    with closing(opened) as trained:
        prune = trained.config.prune
        if sparsities is None:
            sparsities = [0.5] if prune.kind == "2:4" else prune.sparsities
        files = {sparsity: run.prune / f"s{sparsity:.4f}.json" for sparsity in sparsities}
        if len(set(files.values())) < len(files):
            raise UserError(f"sparsities {', '.join(map(str, files))} agree in four decimals: leave some out")
        check_same_pruning(files.values(), prune)
        if world.main:
            make_folder(run.prune)  # somebody may have deleted it, to measure anew

        masks = [trained.masks(sparsity) for sparsity in sparsities]
        statistics = trained.recalibrated(masks)
        variants = [[AS_TRAINED, found] if trained.batches else [AS_TRAINED] for found in statistics]
        measured = trained.measure("test", masks, variants)
        results = []
        for sparsity, mask, found, metrics in zip(sparsities, masks, statistics, measured, strict=True):
            result = {
                **trained.describe(sparsity, mask),
                "split": "test",
                **accuracy(metrics[0]),
                **_recalibrated(metrics[1] if trained.batches else None),
            }
            results.append(result)
            if world.main:
                write_json(files[sparsity], result)
                if export:
                    trained.export(mask, found, files[sparsity].with_suffix(".safetensors"))
    barrier(world)
    return results


def _recalibrated(metrics: Metrics | None) -> dict[str, Any]:
    values = {} if metrics is None else accuracy(metrics)
    return {f"{key}_recalibrated": values.get(key) for key in ("top1", "top5", "loss")}
