"""The numbers of a report: the rows of the curve, and the notes about them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from sfw_dist.report.runs import Run

AS_TRAINED, RECALIBRATED = "as trained", "recalibrated"


def curve_rows(runs: Sequence[Run]) -> list[dict[str, object]]:
    """One row for each run and sparsity. Accuracies and sparsities are fractions."""
    return [
        {
            "run": run.label,
            "optimizer": run.optimizer,
            "seed": result.seed,
            "split": result.split,
            "scope": result.options.scope,
            "granularity": result.options.granularity,
            "ranking": result.options.ranking,
            "criterion": result.options.criterion,
            "sparsity": result.sparsity,
            "achieved_sparsity_all": result.sparsity_all,
            "achieved_sparsity_prunable": result.sparsity_prunable,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "bn_recalibrated": result.recalibrated is not None,
            "top1_recalibrated": result.recalibrated and result.recalibrated.top1,
            "top5_recalibrated": result.recalibrated and result.recalibrated.top5,
            "loss_recalibrated": result.recalibrated and result.recalibrated.loss,
            "recalibration_batches": result.recalibration_batches,
            "samples": result.samples,
            "parameters_total": result.parameters_total,
            "parameters_kept": result.parameters_kept,
            "compression_ratio": result.compression_ratio,
            "flops_dense": result.flops_dense,
            "flops": result.flops,
            "theoretical_speedup": result.theoretical_speedup,
            "dead_layers": len(result.dead_layers),
        }
        for run in runs
        for result in run.results
    ]


def curve_csv(runs: Sequence[Run]) -> str:
    """The rows of :func:`curve_rows` as CSV with a header."""
    rows = curve_rows(runs)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Curve:
    """One line of a figure and one row of a table: a run, with one kind of BatchNorm statistics."""

    index: int  # of the run among those of the report
    run: Run
    batchnorm: str  # AS_TRAINED or RECALIBRATED


def curves(runs: Sequence[Run]) -> list[Curve]:
    """One curve for each run, and a second one where BatchNorm was recalibrated."""
    found = []
    for index, run in enumerate(runs):
        found.append(Curve(index, run, AS_TRAINED))
        if (recalibrated := run.recalibrated) is not None:
            found.append(Curve(index, recalibrated, RECALIBRATED))
    return found


def chosen_sparsities(runs: Sequence[Run], wanted: Sequence[float]) -> list[float]:
    """The ``wanted`` sparsities that some run has; if there are none, as many of the runs' own, evenly spread."""
    present = [sparsity for sparsity in wanted if any(run.at(sparsity) for run in runs)]
    if present:
        return present
    available = sorted({result.sparsity for run in runs for result in run.results if result.sparsity > 0})
    count = min(len(wanted), len(available))
    return [available[round(place * (len(available) - 1) / max(count - 1, 1))] for place in range(count)]


def sparsity_within(run: Run, budget: float) -> float | None:
    """The sparsity up to which no result is more than ``budget`` (a fraction) below the dense accuracy.

    None when the dense accuracy is unknown or the first result is below it already.
    """
    dense = run.dense_top1
    if dense is None:
        return None
    tolerance = 1e-9  # 0.99 - 0.98 is a little more than 0.01
    good = takewhile(lambda result: dense - result.top1 <= budget + tolerance, run.results)
    return max((result.sparsity for result in good), default=None)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing runs: missing data, differing settings, layers without weights."""
    splits = {result.split for run in runs for result in run.results}
    across = [f"The accuracies come from different splits ({', '.join(sorted(splits))})."] if len(splits) > 1 else []
    both = any(run.recalibrated for run in runs)
    return across + [note for run in runs for note in [*_notes(run), *(_batchnorm_notes(run) if both else [])]]


def _batchnorm_notes(run: Run) -> list[str]:
    """Where the curve with BatchNorm recalibrated is missing or has gaps although other runs have one."""
    without = [percent(result.sparsity) for result in run.results if result.recalibrated is None]
    batches = sorted({result.recalibration_batches for result in run.results} - {0})
    found = []
    if any(result.bn_layers == 0 for result in run.results):
        found.append(f"{run.label}: the network has no BatchNorm to recalibrate.")
    elif without:
        shown = f"at {', '.join(without)}" if run.recalibrated else "anywhere"
        found.append(f"{run.label}: BatchNorm was not recalibrated {shown}.")
    if len(batches) > 1:
        found.append(f"{run.label}: BatchNorm was recalibrated over different numbers of batches ({_list(batches)}).")
    return found


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _notes(run: Run) -> list[str]:
    found = []
    if run.dense_top1 is None:
        found.append(f"{run.label}: no result at sparsity 0, so its dense accuracy is not drawn.")
    if run.metrics is None:
        found.append(f"{run.label}: no metrics.jsonl, so it is not in the figure of the training.")
    elif not run.epochs():
        found.append(f"{run.label}: no finished epoch in metrics.jsonl, so it is not in the figure of the training.")
    if run.weights is None:
        found.append(f"{run.label}: no finite weights in model.safetensors, so it is not in the figure of the weights.")
    methods = sorted({result.method for result in run.results if result.sparsity > 0})
    if len(methods) > 1:
        found.append(f"{run.label}: its points were not all pruned in the same way ({'; '.join(methods)}).")
    if run.environment.get("git_dirty"):
        found.append(f"{run.label}: trained from a checkout with changes that were not committed.")
    dead = next((result for result in run.results if result.dead_layers), None)
    if dead:
        found.append(
            f"{run.label}: no weight is left in {', '.join(dead.dead_layers)} from {percent(dead.sparsity)} on."
        )
    return found


def percent(fraction: float) -> str:
    """A sparsity for people: 0.9 is "90 %", 0.995 is "99.5 %"."""
    return f"{100 * fraction:.6g} %"
