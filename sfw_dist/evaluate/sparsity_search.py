"""The highest sparsity whose validation accuracy stays within some points of the dense network's (``--max-drop``).

Accuracy need not fall steadily with sparsity, so only trying every sparsity would find the highest one for certain.
This search first measures a coarse grid up to 99.9 %, then bisects between the highest point of the grid that is within
the budget and the next one, which is not, down to 0.1 points of sparsity. The answer is within the budget, 0.1 points
more is not, and neither is anything higher on the grid; lower sparsities may fail, and the result lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from fractions import Fraction
from typing import Any

from sfw_dist.distributed.world import World, barrier
from sfw_dist.errors import UserError
from sfw_dist.evaluate.pruned_models import PrunedModels, accuracy, check_same_pruning
from sfw_dist.files import make_folder, write_json
from sfw_dist.pruning import PruningOptions
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder

PER_ONE = 1000
"""Sparsities are counted in thousandths: 0.1 points."""
GRID = (0, *range(100, 901, 100), *range(910, 991, 10), 995, 999)
"""Dense, the paper's 18, and two above them."""


def search(within: Callable[[Sequence[int]], Sequence[bool]]) -> int:
    """Find the highest sparsity that is within the budget.

    Args:
        within: for each of some sparsities in thousandths, whether the network pruned to it is within the budget;
            called with the whole grid, then with one sparsity at a time. The dense network, 0, is within any budget.

    Returns:
        The sparsity in thousandths.

    Example:
        >>> search(lambda sparsities: [sparsity <= 637 for sparsity in sparsities])
        637
    """
    found = dict(zip(GRID, within(GRID), strict=True))
    assert found[0]
    good = max(sparsity for sparsity in GRID if found[sparsity])
    bad = next((sparsity for sparsity in GRID if sparsity > good), None)
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        if within([middle])[0]:
            good = middle
        else:
            bad = middle
    return good


def stays_within(dense: Metrics, pruned: Metrics, points: float) -> bool:
    """Whether at most ``points`` percent of the images are lost.

    Counted in whole images: in floating point 0.99 - 0.98 is more than 0.01.
    """
    lost = round(dense.top1 * dense.samples) - round(pruned.top1 * pruned.samples)
    return lost <= Fraction(str(points)) / 100 * dense.samples


def search_run(
    run: RunFolder,
    world: World,
    points: float,
    options: PruningOptions | None = None,
    *,
    data_root: str | None = None,
    export: bool = False,
) -> dict[str, Any]:
    """Search on validation images, then measure the network that was found on the test images, once. Collective.

    The dense network is measured too, on both, and all of them with BatchNorm recalibrated if that is on.
    Writes ``prune/max_drop_<points>.json``, with every sparsity that was tried.

    Args:
        run: with ``model.safetensors``.
        world: the ranks that share the work.
        points: of top-1 accuracy in percent that may be lost, in [0, 100); a loss of exactly so much is within.
        options: how to prune; ``None`` takes the run's configuration (``prune:``).
        data_root: where the data set lies now, if elsewhere than in training.
        export: also write the network that was found, as ``prune/max_drop_<points>.safetensors``.

    Returns:
        What was written.

    Raises:
        UserError: points out of range, a granularity that takes one sparsity only, no validation split, and as
            `sfw_dist.evaluate.pruned_models.PrunedModels`.
    """
    if not 0 <= points < 100:
        raise UserError(f"--max-drop must be in [0, 100) points of accuracy, got {points}: write 1.0 for one point")
    with closing(PrunedModels(run, world, options, data_root=data_root)) as models:
        _check_can_search(models, run)
        path = run.prune / f"max_drop_{float(points)}.json"
        check_same_pruning([path], models.options)
        if world.main:
            make_folder(run.prune)
        measured = _Measured(models, points)
        sparsity = search(measured.within) / PER_ONE
        prunings = [models.at(0.0), pruning := models.at(sparsity)]
        statistics = models.recalibrated(prunings)
        (dense,), (test,) = models.measure("test", prunings, [[found] for found in statistics])
        result = {
            "max_drop": points,
            "resolution": 1 / PER_ONE,
            **models.describe(sparsity, pruning),
            "validation": measured.row(round(sparsity * PER_ONE)),
            "test": accuracy(test),
            "test_dense": accuracy(dense),
            "searched": measured.rows(),
        }
        if world.main:
            if export:
                models.export(pruning, statistics[1], path.with_suffix(".safetensors"))
            write_json(path, result)
    barrier(world)
    return result


class _Measured:
    """Validation metrics of the sparsities that the search has asked for, in thousandths."""

    def __init__(self, models: PrunedModels, points: float) -> None:
        self._models, self._points = models, points
        self._metrics: dict[int, Metrics] = {}

    def within(self, sparsities: Sequence[int]) -> list[bool]:
        prunings = [self._models.at(thousandths / PER_ONE) for thousandths in sparsities]
        statistics = [[found] for found in self._models.recalibrated(prunings)]
        measured = self._models.measure("validation", prunings, statistics)
        self._metrics |= {thousandths: only for thousandths, (only,) in zip(sparsities, measured, strict=True)}
        return [self._is_within(thousandths) for thousandths in sparsities]

    def rows(self) -> list[dict[str, Any]]:
        """What the search has measured, by rising sparsity."""
        return [self.row(thousandths) for thousandths in sorted(self._metrics)]

    def row(self, thousandths: int) -> dict[str, Any]:
        metrics = self._metrics[thousandths]
        return {
            "sparsity": thousandths / PER_ONE,
            **accuracy(metrics),
            "drop": 100 * (self._metrics[0].top1 - metrics.top1),
            "within": self._is_within(thousandths),
        }

    def _is_within(self, thousandths: int) -> bool:
        return stays_within(self._metrics[0], self._metrics[thousandths], self._points)


def _check_can_search(models: PrunedModels, run: RunFolder) -> None:
    if models.options.only_sparsity is not None:
        raise UserError(
            f"--max-drop needs a granularity that takes any sparsity, got {models.options.granularity}: write "
            "--granularity weight"
        )
    if models.config.data.validation_fraction == 0:
        raise UserError(
            f"--max-drop searches on validation images, and {run.path} was trained without (data.validation_fraction "
            "0): train with 0.1, or measure --sparsities"
        )
