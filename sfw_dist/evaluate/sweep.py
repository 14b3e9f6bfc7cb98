"""Prune a trained run to many sparsities and measure each, in one pass over the test set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from sfw_dist.distributed.world import World, barrier
from sfw_dist.errors import UserError
from sfw_dist.evaluate.pruned_models import PrunedModels, accuracy, check_same_pruning
from sfw_dist.files import make_folder, write_json
from sfw_dist.pruning import PruningOptions
from sfw_dist.pruning.recalibration import AS_TRAINED
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder


def sweep_run(
    run: RunFolder,
    world: World,
    options: PruningOptions | None = None,
    *,
    sparsities: Sequence[float] | None = None,
    data_root: str | None = None,
    export: bool = False,
) -> list[dict[str, Any]]:
    """Prune a finished run to each sparsity and measure it on the test images. Collective.

    Writes ``prune/s<sparsity>.json``: each file holds the accuracy with BatchNorm's statistics as trained (``top1``,
    ``top5``, ``loss``) and, where the network has BatchNorm, recalibrated (``top1_recalibrated``, ...; null where not).

    Args:
        run: with ``model.safetensors``.
        world: the ranks that share the work.
        options: how to prune; ``None`` takes the run's configuration (``prune:``).
        sparsities: fractions removed; ``None`` takes the run's configuration.
        data_root: where the data set lies now, if elsewhere than in training.
        export: also write the pruned networks, as ``prune/s<sparsity>.safetensors``, recalibrated where the JSON file
            of the same name says ``bn_recalibrated``.

    Returns:
        What was written, in the order of the sparsities.

    Raises:
        UserError: as `PrunedModels`, sparsities that would share a file, or a file that is there from another pruning.
    """
    with closing(PrunedModels(run, world, options, data_root=data_root)) as models:
        if sparsities is None:
            sparsities = models.options.default_sparsities(models.config.prune.sparsities)
        files = {sparsity: run.prune / f"s{sparsity:.4f}.json" for sparsity in sparsities}
        if len(set(files.values())) < len(files):
            raise UserError(f"sparsities {', '.join(map(str, files))} agree in four decimals: leave some out")
        check_same_pruning(files.values(), models.options)
        if world.main:
            make_folder(run.prune)  # somebody may have deleted it to measure again

        prunings = [models.at(sparsity) for sparsity in sparsities]
        statistics = models.recalibrated(prunings)
        variants = [[AS_TRAINED, found] if models.batches else [AS_TRAINED] for found in statistics]
        measured = models.measure("test", prunings, variants)
        results = []
        for sparsity, pruning, found, metrics in zip(sparsities, prunings, statistics, measured, strict=True):
            result = {
                **models.describe(sparsity, pruning),
                "split": "test",
                **accuracy(metrics[0]),
                **_recalibrated(metrics[1] if models.batches else None),
            }
            results.append(result)
            if world.main:
                write_json(files[sparsity], result)
                if export:
                    models.export(pruning, found, files[sparsity].with_suffix(".safetensors"))
    barrier(world)
    return results


def _recalibrated(metrics: Metrics | None) -> dict[str, Any]:
    values = {} if metrics is None else accuracy(metrics)
    return {f"{key}_recalibrated": values.get(key) for key in ("top1", "top5", "loss")}
