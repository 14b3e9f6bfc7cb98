"""A budget instead of a ratio: the highest sparsity whose validation accuracy stays within some points of the dense.

Accuracy need not fall steadily with sparsity, so no search short of trying everything finds the highest one for
certain. This one first measures a coarse grid up to 99.9 %, then bisects between the highest point of the grid that
is within the budget and the next one, which is not, down to 0.1 points of sparsity. What it answers is within the
budget, 0.1 points more is not, and neither is anything higher on the grid; lower sparsities may fail, and are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from fractions import Fraction
from typing import Any

from sfw_dist.config import Config
from sfw_dist.distributed.world import World, barrier
from sfw_dist.errors import UserError
from sfw_dist.evaluate.pruned_models import TrainedRun, accuracy, check_same_pruning
from sfw_dist.files import make_folder, write_json
from sfw_dist.pruning.one_shot import Kind
from sfw_dist.pruning.scope import Scope
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder

PER_ONE = 1000
"""Sparsities are counted in thousandths: 0.1 points."""
GRID = (0, *range(100, 901, 100), *range(910, 991, 10), 995, 999)
"""Dense, the paper's 18, and two above them."""


def search(within: Callable[[Sequence[int]], Sequence[bool]]) -> int:
    """The highest sparsity found to be within the budget, in thousandths.

    Args:
        within: whether networks of these sparsities are; called with the whole grid, then with one at a time. The
            dense network, 0, is within any budget.
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
    """Whether at most ``points`` percent of the images are lost, in whole images: 99 % - 98 % is no more than 1 %."""
    lost = round(dense.top1 * dense.samples) - round(pruned.top1 * pruned.samples)
    return lost <= Fraction(str(points)) / 100 * dense.samples


def evaluate_max_drop(
    run: RunFolder,
    world: World,
    points: float,
    *,
    scope: Scope | None = None,
    kind: Kind | None = None,
    recalibrate: int | None = None,
    data_root: str | None = None,
    export: bool = False,
) -> dict[str, Any]:
    """Search on validation images, then measure what was found on the test images, once. Collective.

    The dense network, too, is measured on validation images, and all of them with BatchNorm recalibrated if that is on.
    Writes ``prune/max_drop_<points>.json``, with every point that was tried, and returns what it wrote.

    Args:
        points: of top-1 accuracy in percent that may be lost; a loss of exactly so much is within.
        export: write the network that was found, too, as ``prune/max_drop_<points>.safetensors``.
        scope, kind, recalibrate, data_root: as for `sfw_dist.evaluate.pruned_models.TrainedRun`.

    Raises:
        UserError: points out of range, a kind that takes one sparsity only, no validation split, and as `TrainedRun`.
    """
    if not 0 <= points < 100:
        raise UserError(f"--max-drop must be in [0, 100) points of accuracy, got {points}: write 1.0 for one point")
    opened = TrainedRun(run, world, scope=scope, kind=kind, recalibrate=recalibrate, data_root=data_root)
    with closing(opened) as trained:
        _check_can_search(trained.config, run)
        path = run.prune / f"max_drop_{float(points)}.json"
        check_same_pruning([path], trained.config.prune)
        if world.main:
            make_folder(run.prune)
        measured = _Measured(trained, points)
        sparsity = search(measured.within) / PER_ONE
        masks = trained.masks(sparsity)
        statistics = trained.recalibrated([masks])
        test = trained.measure("test", [masks], [statistics])[0][0]
        result = {
            "max_drop": points,
            "resolution": 1 / PER_ONE,
            **trained.describe(sparsity, masks),
            "validation": measured.row(round(sparsity * PER_ONE)),
            "test": accuracy(test),
            "searched": measured.rows(),
        }
        if world.main:
            if export:
                trained.export(masks, statistics[0], path.with_suffix(".safetensors"))
            write_json(path, result)
    barrier(world)
    return result


class _Measured:
    """Validation metrics of the sparsities that the search has asked for, in thousandths."""

    def __init__(self, trained: TrainedRun, points: float) -> None:
        self._trained, self._points = trained, points
        self._metrics: dict[int, Metrics] = {}

    def within(self, sparsities: Sequence[int]) -> list[bool]:
        masks = [self._trained.masks(thousandths / PER_ONE) for thousandths in sparsities]
        statistics = [[found] for found in self._trained.recalibrated(masks)]
        measured = self._trained.measure("validation", masks, statistics)
        self._metrics |= {thousandths: only for thousandths, (only,) in zip(sparsities, measured, strict=True)}
        return [self._is_within(thousandths) for thousandths in sparsities]

    def rows(self) -> list[dict[str, Any]]:
        """What the search has seen, by rising sparsity."""
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


def _check_can_search(config: Config, run: RunFolder) -> None:
    if ":" in config.prune.kind:
        raise UserError(
            f"--max-drop needs a kind that takes any sparsity, got {config.prune.kind}: write --kind global"
        )
    if config.data.validation_fraction == 0:
        raise UserError(
            f"--max-drop searches on validation images, and {run.path} was trained without (data.validation_fraction "
            "0): train with 0.1, or measure --sparsities"
        )
