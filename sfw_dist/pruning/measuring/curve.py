"""What a sweep has measured: a row for each sparsity, as text, HTML, CSV and a figure."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sfw_dist.errors import UserError, needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS = ("sparsity", "prunable_total", "prunable_kept", "parameters_total", "parameters_kept", "samples")
"""The columns beside those of the metrics."""
RECALIBRATED = "_recalibrated"
"""What the name of a metric ends with that was measured with BatchNorm's new statistics."""


@dataclass(frozen=True)
class CurvePoint:
    """A network pruned to one sparsity.

    Attributes:
        sparsity: that was asked for.
        prunable_total: how many entries the prunable parameters have.
        prunable_kept: how many numbers of them are left, exactly.
        parameters_total: how many entries all parameters have.
        parameters_kept: how many numbers are left of all parameters.
        samples: over how many the means were taken, on all ranks together.
        metrics: means with BatchNorm's statistics as trained, by name.
        recalibrated: means with new statistics; ``None`` where none were measured.
    """

    sparsity: float
    prunable_total: int
    prunable_kept: int
    parameters_total: int
    parameters_kept: int
    samples: int
    metrics: Mapping[str, float]
    recalibrated: Mapping[str, float] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """All of it in one flat dictionary; metrics with new statistics are named ``top1_recalibrated``, say."""
        counts = {name: getattr(self, name) for name in COUNTS}
        again = {f"{name}{RECALIBRATED}": value for name, value in (self.recalibrated or {}).items()}
        return {**counts, **self.metrics, **again}


@dataclass(frozen=True, repr=False)
class Curve(Sequence[CurvePoint]):
    """The points of a sweep, in the order in which the sparsities were given.

    Example:
        >>> points = [CurvePoint(s, 40, 40 - int(40 * s), 46, 46 - int(40 * s), 9, {"top1": 1 - s}) for s in (0.0, 0.5)]
        >>> curve = Curve(points)
        >>> print(curve.table())
        sparsity  parameters kept    top1
               0               46  1.0000
             0.5               26  0.5000
        >>> curve[1].prunable_kept, curve.rows[1]["top1"]
        (20, 0.5)
    """

    points: Sequence[CurvePoint]

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> CurvePoint: ...
    @overload
    def __getitem__(self, index: slice) -> Curve: ...
    def __getitem__(self, index: int | slice) -> CurvePoint | Curve:
        return Curve(self.points[index]) if isinstance(index, slice) else self.points[index]

    def __iter__(self) -> Iterator[CurvePoint]:
        return iter(self.points)

    def __repr__(self) -> str:
        return f"<Curve of {len(self)} sparsities>\n{self.table()}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for each point, as ``pandas.DataFrame`` takes them."""
        return [point.row for point in self.points]

    def table(self) -> str:
        """The sparsities, the numbers that are left and the metrics as text, a line each."""
        cells = [self._head(), *self._body()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> None:
        """Write all columns of :attr:`rows`, with full precision. The file appears as a whole.

        With several ranks each has the same curve: call this on one of them.
        """
        from sfw_dist.files import write_text  # here, because it has locks too, which Windows does not know

        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(Path(path), text.getvalue())

    def plot(self, ax: Axes | None = None, *, metric: str | None = None, label: str | None = None) -> Axes:
        """Draw a metric against the sparsity; where BatchNorm was recalibrated that, and as trained in dashes.

        Args:
            ax: where to draw; ``None``: a new figure of matplotlib's pyplot.
            metric: its name; ``None``: the first one.
            label: of the line, for a legend that compares several curves.

        Returns:
            The axes, to change and to save: ``curve.plot().figure.savefig("curve.png")``.

        Raises:
            UserError: no such metric.
            MissingExtraError: matplotlib is not installed.
        """
        names = list(self.points[0].metrics) if self.points else []
        metric = names[0] if metric is None and names else metric
        if metric not in names:
            raise UserError(f"no metric {metric!r} in this curve: choose one of {', '.join(names) or 'none'}")
        if ax is None:
            with needs_extra("Curve.plot", "train"):
                from matplotlib import pyplot
            _, ax = pyplot.subplots()
        rows, again, name = self.rows, f"{metric}{RECALIBRATED}", metric if label is None else label
        x, new = [row["sparsity"] for row in rows], again in rows[0]
        trained = f"{name}, BatchNorm as trained" if new else name
        (line,) = ax.plot(x, [row[metric] for row in rows], "o--" if new else "o-", label=trained)
        if new:
            ax.plot(x, [row[again] for row in rows], "o-", color=line.get_color(), label=f"{name}, recalibrated")
        ax.set_xlabel("sparsity")
        ax.set_ylabel(metric)
        ax.legend()
        return ax

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self._head())
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>\n" for line in self._body()
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"

    def _columns(self) -> list[str]:
        return list(self.rows[0]) if self.points else list(COUNTS)

    def _shown(self) -> list[str]:
        return ["sparsity", "parameters_kept", *(name for name in self._columns() if name not in COUNTS)]

    def _head(self) -> list[str]:
        return [_title(name) for name in self._shown()]

    def _body(self) -> list[list[str]]:
        return [[_cell(name, row[name]) for name in self._shown()] for row in self.rows]


def _title(name: str) -> str:
    if name.endswith(RECALIBRATED):
        return f"{name.removesuffix(RECALIBRATED)}, recalibrated"
    return "parameters kept" if name == "parameters_kept" else name


def _cell(name: str, value: float) -> str:
    if name == "sparsity":
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
