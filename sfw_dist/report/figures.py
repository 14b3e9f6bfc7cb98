"""The figures, each drawn in memory and returned as the bytes of a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from sfw_dist.report.runs import PruningResult, Record, Run, number
from sfw_dist.report.table import AS_TRAINED, RECALIBRATED, chosen_sparsities, curves, percent

FloatArray = npt.NDArray[np.float64]
Series = tuple[FloatArray, FloatArray]  # epochs, values
Lines = dict[str, dict[str, Any]]  # legend text and line style

# Okabe and Ito's colours, which people with any colour vision can tell apart; their yellow is too pale for a line.
# Brown and grey are ours, for an eighth and a ninth run; the markers help.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D46", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 and 9 have no common factor: 63 runs before a pair repeats
LAYER_SPARSITIES = (0.5, 0.9, 0.95, 0.99)
SPARSITY_TICKS = (0.0, 0.9, 0.99, 0.999, 0.5, 0.95, 0.995, 0.8, 0.98, 0.998, 0.7, 0.97)  # the most wanted first
RATIO_TICKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
DASHES, DOTS = (0, (5, 4)), (0, (1, 2.5))
DASHED: dict[str, Any] = {"linestyle": DASHES, "linewidth": 1}
WITHOUT: dict[str, Any] = {
    "linestyle": (0, (4, 2)),
    "linewidth": 1.3,
}  # a curve as trained; others are recalibrated
MOST_DECADES = 8  # of magnitudes below the largest weight
MOST_LAYER_NAMES = 60
LONGEST_LABEL = 48
LEGEND_WIDTH = 130  # characters

INK, SOFT, GRID = "#22252b", "#5d6470", "#e7e8ea"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#b4b8bf",
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def colour(index: int) -> str:
    """The colour of the run at this place among the runs of a report."""
    return COLOURS[index % len(COLOURS)]


def draw_all(runs: Sequence[Run]) -> dict[str, bytes]:
    """Draw every figure that the runs have data for; PNG files by name."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            figure = draw(runs)
            if figure is not None:
                drawn[name] = _png(figure)
    return drawn


def draw_curve(runs: Sequence[Run]) -> Figure:
    """Draw accuracy against sparsity and against the theoretical speed-up; dotted: the dense accuracy as trained.

    Where any run has BatchNorm recalibrated, its lines are solid; lines without recalibration then are dashed with
    hollow markers. The sparsity axis is logarithmic in the fraction that is kept: 90 % to 99 % take as much space as
    0 % to 90 %.
    """
    figure = Figure(figsize=(10.5, 5.0), layout="constrained")
    by_sparsity, by_speedup = figure.subplots(1, 2, sharey=True, width_ratios=(1.9, 1))
    shown = curves(runs)
    both = any(curve.batchnorm == RECALIBRATED for curve in shown)
    for curve in shown:
        style = {"color": colour(curve.index), "marker": _marker(curve.index), "markersize": 4.5}
        if both and curve.batchnorm == AS_TRAINED:
            style |= {**WITHOUT, "markerfacecolor": "white"}
        results = [result for result in curve.run.results if _density(result) > 0]  # an empty one has no place there
        top1 = [100 * result.top1 for result in results]
        by_sparsity.plot([_density(result) for result in results], top1, **style)
        by_speedup.plot([result.theoretical_speedup for result in results], top1, **style)
        if curve.batchnorm == AS_TRAINED and (dense := curve.run.dense_top1) is not None:
            for axes in (by_sparsity, by_speedup):
                axes.axhline(100 * dense, color=colour(curve.index), linestyle=DOTS, linewidth=1, zorder=1)

    densities = [_density(result) for run in runs for result in run.results if _density(result) > 0]
    _scale_sparsity(by_sparsity, "x", min(densities, default=1.0), distance=0.05)
    by_sparsity.set(xlabel="sparsity: prunable weights removed", ylabel="top-1 accuracy (%)")
    kept = by_sparsity.secondary_xaxis("top")
    kept.spines["top"].set_visible(False)
    kept.set_xlabel("one prunable weight kept in …", fontsize=9)
    _show_ratios(kept.xaxis, [1 / ratio for ratio in RATIO_TICKS], "")
    by_speedup.tick_params("y", left=False)
    by_speedup.set(xscale="log", xlabel="theoretical speed-up: dense FLOPs / FLOPs left")
    _show_ratios(by_speedup.xaxis, RATIO_TICKS, "×")
    kinds: Lines = {"BatchNorm recalibrated": {}, "BatchNorm as trained": WITHOUT} if both else {}
    dotted = "dense accuracy, as trained" if both else "dense accuracy"
    _legend(figure, runs, lines=kinds | {dotted: {"linestyle": DOTS, "linewidth": 1}})
    return figure


def draw_weights(runs: Sequence[Run]) -> Figure | None:
    """Draw the distribution of the weights, by value and by magnitude in decades. None: no run has weights."""
    weights = {index: run.weights for index, run in enumerate(runs) if run.weights is not None}
    if not weights:
        return None
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    by_value, by_magnitude = figure.subplots(1, 2, sharey=True)
    limit = max(float(np.abs(values).max()) for values in weights.values()) or 1.0
    highest = float(np.log10(limit))
    for index, values in weights.items():
        decades = np.log10(np.maximum(np.abs(values), limit * 10.0**-MOST_DECADES))
        _histogram(by_value, values, np.linspace(-limit, limit, 122), colour(index))
        _histogram(by_magnitude, decades, np.linspace(highest - MOST_DECADES, highest, 122), colour(index))
        by_magnitude.axvline(float(np.median(decades)), color=colour(index), linestyle=DASHES, linewidth=1)
    by_value.set(title="By value", xlabel="weight w", ylabel="share of the weights in a bin (%)", yscale="log")
    by_magnitude.set(title="By magnitude", xlabel="log₁₀ |w|; zeros and smaller ones are in the first bin")
    by_magnitude.tick_params("y", which="both", left=False)
    _legend(figure, runs, list(weights), lines={"median magnitude": DASHED})
    return figure


def draw_training(runs: Sequence[Run]) -> Figure | None:
    """Draw loss, validation accuracy, learning rate and Frank-Wolfe gap by epoch. None: no run finished an epoch."""
    trained = [index for index, run in enumerate(runs) if run.epochs()]
    panels = [panel for panel in PANELS if any(np.isfinite(panel.series(runs[index])[1]).any() for index in trained)]
    if not panels:
        return None
    columns = 2 if len(panels) in (2, 4) else len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(10.5, 0.4 + 3.0 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        for index in trained:
            epochs, values = panel.series(runs[index])
            every = max(1, len(epochs) // 10)
            style = {"color": colour(index), "marker": _marker(index), "markersize": 4, "linewidth": 1.4}
            axes.plot(epochs, values, markevery=every, **style)
        axes.set(title=panel.title, yscale=panel.scale, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, runs, trained)
    return figure


def draw_layers(runs: Sequence[Run]) -> Figure | None:
    """Draw the sparsity of each layer at a few sparsities of the whole network. None: no layer is listed."""
    names = list(dict.fromkeys(layer.name for run in runs for result in run.results for layer in result.layers))
    sparsities = chosen_sparsities(runs, LAYER_SPARSITIES)
    if not names or not sparsities:
        return None
    figure = Figure(figsize=(10.5, 1.2 + 1.8 * len(sparsities)), layout="constrained")
    panels = figure.subplots(len(sparsities), 1, sharex=True, squeeze=False)[:, 0]
    for axes, sparsity in zip(panels, sparsities, strict=True):
        results = {index: result for index, run in enumerate(runs) if (result := run.at(sparsity))}
        _draw_layers_at(axes, results, {name: position for position, name in enumerate(names)})
        axes.axhline(1 - sparsity, color=SOFT, linestyle=DASHES, linewidth=1, zorder=1)
        axes.set_title(f"Network {percent(sparsity)} sparse")
    step = -(-len(names) // MOST_LAYER_NAMES)
    shown = [_shortened(name.removesuffix(".weight")) for name in names[::step]]
    panels[-1].set_xticks(range(0, len(names), step), shown, fontsize=8, parse_math=False)
    panels[-1].tick_params("x", rotation=90 if len(names) > 6 else 0)
    figure.supylabel("sparsity of the layer", fontsize=10, color=SOFT)
    _legend(figure, runs, lines={"the whole network": DASHED})
    return figure


def _draw_layers_at(axes: Axes, results: dict[int, PruningResult], place: dict[str, int]) -> None:
    """One line for each run. A layer without weights, which has no logarithm, is a cross at the upper edge."""
    alive = [layer.density for result in results.values() for layer in result.layers if layer.density > 0]
    edge = 0.5 * min(alive, default=1.0)
    for index, result in results.items():
        x = [place[layer.name] for layer in result.layers]
        y = [layer.density or np.nan for layer in result.layers]
        axes.plot(x, y, color=colour(index), marker=_marker(index), markersize=4.5, linewidth=1)
        dead = [place[layer.name] for layer in result.layers if layer.density == 0]
        if dead:
            (crosses,) = axes.plot(dead, [edge] * len(dead), "x", color=colour(index), clip_on=False)
            crosses.set(markersize=9, markeredgewidth=2.2)
    _scale_sparsity(axes, "y", edge, distance=0.12)


def _scale_sparsity(axes: Axes, direction: str, lowest_density: float, distance: float) -> None:
    """Show densities as sparsities, on a logarithmic scale that rises with sparsity.

    ``distance`` is the least distance between two ticks, as a fraction of the axis.
    """
    first, last = 1.12, 0.89 * lowest_density
    axes.set(**{f"{direction}scale": "log", f"{direction}lim": (first, last)})
    length = np.log(first / last)
    sparsities: list[float] = []
    for wanted in SPARSITY_TICKS:
        apart = [abs(np.log((1 - wanted) / (1 - other))) >= distance * length for other in sparsities]
        if 1 - wanted > last and all(apart):
            sparsities.append(wanted)
    getattr(axes, f"{direction}axis").set(
        major_locator=FixedLocator([1 - sparsity for sparsity in sparsities]),
        major_formatter=FixedFormatter([percent(sparsity) for sparsity in sparsities]),
        minor_locator=NullLocator(),
    )


def _show_ratios(axis: Axis, places: Sequence[float], sign: str) -> None:
    axis.set(
        major_locator=FixedLocator(places),
        major_formatter=FixedFormatter([f"{ratio}{sign}" for ratio in RATIO_TICKS]),
        minor_locator=NullLocator(),
    )


def _histogram(axes: Axes, values: npt.NDArray[np.float32], edges: FloatArray, color: str) -> None:
    # The edges are float64, and so is what is clipped to them: rounding cannot push the outermost values out.
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    shares = 100 * counts / values.size
    axes.stairs(shares, edges, color=color, linewidth=1.4)
    axes.stairs(shares, edges, color=color, alpha=0.12, fill=True)


def _legend(
    figure: Figure, runs: Sequence[Run], indices: Sequence[int] | None = None, lines: Lines | None = None
) -> None:
    """Name the runs below the panels; ``lines`` explains the line styles that all colours share."""
    shown = range(len(runs)) if indices is None else indices
    handles = [Line2D([], [], color=colour(index), marker=_marker(index), markersize=4.5) for index in shown]
    labels = [_shortened(runs[index].label) for index in shown]
    for label, style in (lines or {}).items():
        handles.append(Line2D([], [], color=SOFT, **style))
        labels.append(label)
    fitting = LEGEND_WIDTH // (max(map(len, labels)) + 8)  # 8: the line, the marker and the gap
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), fitting))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run's name may hold a dollar sign


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _density(result: PruningResult) -> float:
    return 1 - result.sparsity_prunable


def _by_epoch(key: str, factor: float = 1.0) -> Callable[[Run], Series]:
    """The value of the epochs' records, times ``factor``."""

    def series(run: Run) -> Series:
        epochs = run.epochs()
        return _numbers(epochs, "epoch"), factor * _numbers(epochs, key)

    return series


def _mean_gap(run: Run) -> Series:
    """The Frank-Wolfe gap is logged by step: its mean over each epoch."""
    records = [record for record in run.metrics or () if record["event"] == "train"]
    epochs, gaps = _numbers(records, "epoch"), _numbers(records, "gap")
    logged = np.isfinite(gaps)
    present = np.unique(epochs[logged])
    return present, np.array([gaps[logged & (epochs == epoch)].mean() for epoch in present])


def _numbers(records: Sequence[Record], key: str) -> FloatArray:
    return np.array([number(record, key) for record in records])


@dataclass(frozen=True)
class Panel:
    """One quantity of the training figure."""

    title: str
    scale: str
    series: Callable[[Run], Series]


PANELS = (
    Panel("Training loss", "log", _by_epoch("train_loss")),
    Panel("Validation top-1 (%)", "linear", _by_epoch("validation_top1", factor=100)),
    Panel("Learning rate", "log", _by_epoch("lr")),
    Panel("Frank-Wolfe gap, mean of the epoch", "log", _mean_gap),
)
DRAWINGS: dict[str, Callable[[Sequence[Run]], Figure | None]] = {
    "curve.png": draw_curve,
    "weights.png": draw_weights,
    "training.png": draw_training,
    "layers.png": draw_layers,
}
