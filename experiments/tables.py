"""The numbers of a study: a row for each run and sparsity, their means and spreads, and both as CSV and Markdown.

Accuracies and differences of accuracies are percent and points; sparsities are fractions.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from sfw_dist.errors import UserError

KINDS = {"top1_recalibrated": "BatchNorm recalibrated", "top1": "BatchNorm as trained"}
"""The accuracies, and what a reader calls them."""
DROPS = {"top1": "drop", "top1_recalibrated": "drop_recalibrated"}
TABLE_SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Row:
    """One run at one sparsity."""

    study: str
    arm: str
    label: str
    seed: int
    sparsity: float  # fraction of the prunable weights that was to be removed
    compression: float  # prunable weights over those kept: 1 / (1 - sparsity)
    sparsity_all: float  # achieved, over all parameters
    top1: float  # test accuracy, percent
    top1_recalibrated: float | None  # None: the network has no BatchNorm
    validation_top1: float | None  # of the dense network after the last epoch, percent; None: nothing held out
    seconds_train: float | None  # sum over the epochs, their validation included; None: not logged


@dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation around it; NaN where there is none."""

    mean: float
    std: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f}" if math.isnan(self.std) else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Point:
    """An arm at one sparsity, over its seeds. A drop is a run's own dense accuracy minus the one here."""

    arm: str
    label: str
    sparsity: float
    compression: float
    n: int
    top1: Spread
    top1_recalibrated: Spread
    drop: Spread
    drop_recalibrated: Spread

    def accuracy(self, kind: str) -> Spread:
        """The spread of one of :data:`KINDS`."""
        return self.top1 if kind == "top1" else self.top1_recalibrated

    @property
    def best_known(self) -> Spread:
        """Recalibrated, where the network has BatchNorm."""
        return self.top1 if math.isnan(self.top1_recalibrated.mean) else self.top1_recalibrated


Summary = dict[str, list[Point]]
"""By arm, its points by rising sparsity."""


def rows_csv(rows: Sequence[Row]) -> str:
    """The rows with a header; numbers in full, so that :func:`read_rows` gives back the very same."""
    return _csv([field.name for field in fields(Row)], [astuple(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """What :func:`rows_csv` wrote.

    Raises:
        UserError: no such file, other columns, no row, or a value that is no number.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the study first, without --draw")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        wanted = [field.name for field in fields(Row)]
        if list(reader.fieldnames or ()) != wanted:
            raise UserError(f"{path} has columns {reader.fieldnames}: they must be {', '.join(wanted)}")
        rows = [_row(record, f"{path}, line {reader.line_num}") for record in reader]
    if not rows:
        raise UserError(f"{path} has no rows: run the study again, without --draw")
    return rows


def _row(record: Mapping[str, str], where: str) -> Row:
    try:
        return Row(
            study=record["study"],
            arm=record["arm"],
            label=record["label"],
            seed=int(record["seed"]),
            sparsity=float(record["sparsity"]),
            compression=float(record["compression"]),
            sparsity_all=float(record["sparsity_all"]),
            top1=float(record["top1"]),
            top1_recalibrated=_optional(record["top1_recalibrated"]),
            validation_top1=_optional(record["validation_top1"]),
            seconds_train=_optional(record["seconds_train"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}: restore the line, or run the study again without --draw") from None


def _optional(text: str) -> float | None:
    return float(text) if text else None


def summarise(rows: Sequence[Row]) -> Summary:
    """Means and spreads over the seeds, arms in the order of their rows.

    Raises:
        UserError: a run has no row at sparsity 0, from which its drops are measured, or two at one sparsity.
    """
    runs = {(row.arm, row.seed, row.sparsity): row for row in rows}
    if len(runs) < len(rows):
        raise UserError(f"{len(rows) - len(runs)} rows repeat an arm, seed and sparsity: leave one of each")
    for row in rows:
        if (row.arm, row.seed, 0.0) not in runs:
            raise UserError(f"{row.arm}, seed {row.seed}, has no row at sparsity 0: drops are measured from it")
    summary: Summary = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        sparsities = sorted({row.sparsity for row in rows if row.arm == arm})
        at = {s: [row for row in rows if row.arm == arm and row.sparsity == s] for s in sparsities}
        summary[arm] = [_point(at[s], [runs[arm, row.seed, 0.0] for row in at[s]]) for s in sparsities]
    return summary


def _point(rows: Sequence[Row], dense: Sequence[Row]) -> Point:
    """Of one arm and sparsity, by seed; ``dense`` are the same runs at sparsity 0."""
    pairs = list(zip(rows, dense, strict=True))
    return Point(
        arm=rows[0].arm,
        label=rows[0].label,
        sparsity=rows[0].sparsity,
        compression=rows[0].compression,
        n=len(rows),
        top1=_spread(row.top1 for row in rows),
        top1_recalibrated=_spread(row.top1_recalibrated for row in rows),
        drop=_spread(own.top1 - row.top1 for row, own in pairs),
        drop_recalibrated=_spread(_difference(own.top1_recalibrated, row.top1_recalibrated) for row, own in pairs),
    )


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _spread(values: Iterable[float | None]) -> Spread:
    """NaN unless every seed has a value: a mean over some of them would not be over ``n`` seeds."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    if len(known) < len(listed):
        return Spread(math.nan, math.nan)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan)


def summary_csv(summary: Summary) -> str:
    """One line an arm and sparsity; what is unknown is empty."""
    measures = [name for kind in ("top1", "top1_recalibrated") for name in (kind, DROPS[kind])]
    header = ["arm", "label", "sparsity", "compression", "n", *(f"{m}_{s}" for m in measures for s in ("mean", "std"))]
    lines = []
    for point in (point for points in summary.values() for point in points):
        values = asdict(point)
        numbers = [values[measure][part] for measure in measures for part in ("mean", "std")]
        shown = ["" if math.isnan(number) else number for number in numbers]
        lines.append([point.arm, point.label, point.sparsity, point.compression, point.n, *shown])
    return _csv(header, lines)


def markdown(summary: Summary, title: str) -> str:
    """A table for each kind of accuracy that some arm has: arms × sparsities."""
    present = {point.sparsity for points in summary.values() for point in points}
    sparsities = [sparsity for sparsity in TABLE_SPARSITIES if sparsity in present]
    parts = [f"{title}\n"]
    for kind, words in KINDS.items():
        if has_kind(summary, kind):
            parts.append(f"Test top-1 (%), {words}, {seeds_in_words(summary)}:\n")
            parts.append("\n".join(_markdown_table(summary, kind, sparsities)) + "\n")
    return "\n".join(parts)


def _markdown_table(summary: Summary, kind: str, sparsities: Sequence[float]) -> list[str]:
    lines = [_cells("sparsity", *(f"{sparsity:g}" for sparsity in sparsities))]
    lines.append("|---|" + "---:|" * len(sparsities))
    for points in summary.values():
        at = {point.sparsity: str(point.accuracy(kind)) for point in points}
        lines.append(_cells(points[0].label.replace("|", "\\|"), *(at.get(sparsity, "–") for sparsity in sparsities)))
    return lines


def _cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def has_kind(summary: Summary, kind: str) -> bool:
    """Whether any arm has this accuracy."""
    return any(not math.isnan(point.accuracy(kind).mean) for points in summary.values() for point in points)


def seeds_in_words(summary: Summary) -> str:
    """What a mean and its spread are taken over."""
    counts = sorted({point.n for points in summary.values() for point in points})
    if counts == [1]:
        return "one seed"
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± sample standard deviation of {shown} seeds"


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()
