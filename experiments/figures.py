"""The figures of a study, drawn in memory and returned as PNG files' bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.tables import KINDS, Point, Spread, Summary, has_kind, seeds_in_words
from sfw_dist.report.figures import COLOURS, MARKERS, SOFT, STYLE, WITHOUT, colour
from sfw_dist.report.table import percent

Drawing = Callable[[Summary, str], Figure]
FIGURES = ("curve.png", "compression.png", "bars.png")
WIDTH = 10.5  # inches
MOST_TOGETHER = 4  # arms whose two kinds of lines one panel can hold
MOST_ARMS = len(COLOURS)  # that lines can tell apart; beyond, a dot chart is drawn as well
TURN = 0.9  # sparsity at which the second panel begins
RATIOS = (1, 2, 4, 8, 16, 32)
BAR_SPARSITIES = (0.0, 0.9, 0.95)
LEGEND_WIDTH = 130  # characters


def draw_all(summary: Summary, title: str) -> dict[str, bytes]:
    """Every figure that suits the study, by file name."""
    several = any(len(points) > 1 for points in summary.values())
    drawings: dict[str, Drawing] = {"curve.png": draw_curve, "compression.png": draw_compression} if several else {}
    if len(summary) > MOST_ARMS or not several:
        drawings["bars.png"] = draw_bars
    with matplotlib.rc_context(STYLE):
        return {name: _png(draw(summary, title)) for name, draw in drawings.items()}


def draw_curve(summary: Summary, title: str) -> Figure:
    """Accuracy against sparsity; the right panel has the last tenth. Solid: recalibrated; dashed: as trained.

    Of more than a few arms the two kinds would hide each other, so that each gets a row of panels.
    """
    kinds = [kind for kind in KINDS if has_kind(summary, kind)]
    rows = [[kind] for kind in kinds] if len(summary) > MOST_TOGETHER else [kinds]
    figure = Figure(figsize=(WIDTH, _legend_height(summary) + 4.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, sharey=True, sharex="col", squeeze=False)
    highest = max(0.99, *(point.sparsity for points in summary.values() for point in points))
    for (low, high), shown in zip(panels, rows, strict=True):
        for axes, first, last in ((low, 0.0, TURN), (high, TURN, highest)):
            for kind in shown:
                _lines(axes, _within(summary, _sparsity, first, last), kind, _sparsity)
        where = f", {KINDS[shown[0]]}" if len(rows) > 1 else ""
        low.set_ylabel(f"test top-1 (%){where}")
        high.tick_params("y", left=False)
    for axes, first, last, step in ((panels[-1, 0], 0.0, TURN, 0.1), (panels[-1, 1], TURN, highest, 0.01)):
        margin = 0.02 * (last - first)
        axes.set(xlim=(first - margin, last + margin), xlabel="sparsity: prunable weights removed")
        ticks = np.arange(first, last + 1e-6, step)
        axes.set_xticks(ticks, [percent(round(tick, 2)) for tick in ticks])
    styles = {KINDS[kind]: _style(kind) for kind in kinds} if len(kinds) > 1 else {}
    _name(figure, summary, title, styles)
    return figure


def draw_compression(summary: Summary, title: str) -> Figure:
    """Accuracy dense and with 2 to 32 times fewer prunable weights, BatchNorm recalibrated where there is any."""
    figure = Figure(figsize=(WIDTH, _legend_height(summary) + 4.2), layout="constrained")
    axes = figure.subplots()
    _lines(axes, _within(summary, _compression, RATIOS[0], RATIOS[-1]), None, _compression)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATIOS, ["dense", *(f"{ratio}×" for ratio in RATIOS[1:])])
    axes.minorticks_off()
    axes.set(xlabel="compression: prunable weights / those kept", ylabel=f"test top-1 (%), {_best_kind(summary)}")
    _name(figure, summary, title, {})
    return figure


def draw_bars(summary: Summary, title: str) -> Figure:
    """Accuracy of each arm, dense and at two sparsities: a dot, and the spread as a line through it."""
    present = {point.sparsity for points in summary.values() for point in points}
    sparsities = [sparsity for sparsity in BAR_SPARSITIES if sparsity in present]
    figure = Figure(figsize=(WIDTH, 1.4 + 0.27 * len(summary)), layout="constrained")
    panels = figure.subplots(1, len(sparsities), sharey=True, squeeze=False)[0]
    for axes, sparsity in zip(panels, sparsities, strict=True):
        for place, points in enumerate(summary.values()):
            spread = next((point.best_known for point in points if point.sparsity == sparsity), None)
            if spread is not None:
                bar = None if np.isnan(spread.std) else spread.std
                axes.errorbar(spread.mean, place, xerr=bar, fmt="o", color=COLOURS[0], markersize=5, elinewidth=1.6)
        axes.set(title="dense" if sparsity == 0 else f"{percent(sparsity)} removed", xlabel="test top-1 (%)")
        axes.tick_params("y", left=False)
    panels[0].set_yticks(range(len(summary)), [points[0].label for points in summary.values()], parse_math=False)
    panels[0].set_ylim(len(summary) - 0.5, -0.5)
    figure.suptitle(f"{title}\n{_best_kind(summary)}, {seeds_in_words(summary)}", fontsize=10.5, parse_math=False)
    return figure


def _sparsity(point: Point) -> float:
    return point.sparsity


def _compression(point: Point) -> float:
    return point.compression


def _within(summary: Summary, place: Callable[[Point], float], first: float, last: float) -> Summary:
    """The points of each arm from ``first`` to ``last``; 1 / (1 - 0.9375) need not be 16 to the last digit."""
    tolerance = 1e-6 * last
    return {
        arm: [point for point in points if first - tolerance <= place(point) <= last + tolerance]
        for arm, points in summary.items()
    }


def _best_kind(summary: Summary) -> str:
    """What :attr:`Point.best_known` is, in words."""
    return KINDS["top1_recalibrated" if has_kind(summary, "top1_recalibrated") else "top1"]


def _lines(axes: Axes, summary: Summary, kind: str | None, place: Callable[[Point], float]) -> None:
    """One line an arm, with a band of one standard deviation; kind None: recalibrated where there is BatchNorm."""
    for index, points in enumerate(summary.values()):
        x = np.array([place(point) for point in points])
        spreads = [_spread(point, kind) for point in points]
        mean, std = (np.array([getattr(spread, part) for spread in spreads]) for part in ("mean", "std"))
        style = _marked(index) | {"markersize": 3.5, "linewidth": 1.4} | _style(kind)
        axes.plot(x, mean, **style)
        alpha = 0.15 if len(summary) <= MOST_ARMS else 0.06
        axes.fill_between(x, mean - std, mean + std, color=colour(index), alpha=alpha, linewidth=0)


def _spread(point: Point, kind: str | None) -> Spread:
    return point.best_known if kind is None else point.accuracy(kind)


def _style(kind: str | None) -> dict[str, Any]:
    return {**WITHOUT, "markerfacecolor": "white"} if kind == "top1" else {}


def _marked(index: int) -> dict[str, Any]:
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}


def _columns(summary: Summary) -> int:
    """Of the legend, so that the longest label fits; 8 characters: the line, the marker and the gap."""
    longest = max(len(points[0].label) for points in summary.values())
    return max(1, min(len(summary), LEGEND_WIDTH // (longest + 8)))


def _legend_height(summary: Summary) -> float:
    """Inches that the names below the panels take, and the title above them."""
    return 0.8 + 0.2 * -(-len(summary) // _columns(summary))


def _name(figure: Figure, summary: Summary, title: str, styles: dict[str, dict[str, Any]]) -> None:
    """The title above, and what the lines are below."""
    figure.suptitle(f"{title}\n{seeds_in_words(summary)}", fontsize=10.5, parse_math=False)
    handles = [Line2D([], [], markersize=4.5, **_marked(index)) for index in range(len(summary))]
    handles += [Line2D([], [], color=SOFT, **style) for style in styles.values()]
    labels: Sequence[str] = [*(points[0].label for points in summary.values()), *styles]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=_columns(summary))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may hold a dollar sign


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
