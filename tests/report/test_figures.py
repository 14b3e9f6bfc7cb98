"""What the figures show of made-up runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.patches import StepPatch
from safetensors.numpy import save_file

from sfw_dist.report import figures
from sfw_dist.report.runs import read_runs
from tests.support.report import (
    MakeRun,
    epoch,
    page_of,
    recalibrate,
    rows_of,
    write_lines,
)


def test_two_runs_share_the_csv_and_the_curve(make_run: MakeRun) -> None:
    """The second run overwrites the first, or draws in its colour, or has no dense line."""
    runs = [make_run("digits_sfw"), make_run("digits_sgd", accuracy={0.0: 0.99, 0.9: 0.3})]
    rows = rows_of(*runs)
    assert [row["run"] for row in rows] == ["digits_sfw"] * 5 + ["digits_sgd"] * 2

    axes = figures.draw_curve(read_runs(runs)).axes[0]
    sfw, sfw_dense, sgd, sgd_dense = axes.get_lines()
    assert list(np.asarray(sgd.get_ydata())) == [99.0, 30.0]
    assert np.asarray(sgd.get_xdata()) == pytest.approx([1.0, 0.1], rel=1e-3)
    assert list(np.asarray(sgd_dense.get_ydata())) == [99.0, 99.0]
    assert sgd_dense.get_linestyle() == "--"
    assert sfw.get_color() == sfw_dense.get_color() != sgd.get_color() == sgd_dense.get_color()


def test_both_curves_of_a_run_are_drawn_and_told_apart(make_run: MakeRun) -> None:
    """Raw and recalibrated accuracies change places, or a run is not known by its colour any more."""
    runs = [make_run("a"), make_run("b", accuracy={0.0: 0.9, 0.9: 0.3})]
    for run in runs:
        recalibrate(run)
    figure = figures.draw_curve(read_runs(runs))
    for axes in figure.axes[:2]:
        raw, dense, again, raw_b, _, again_b = axes.get_lines()
        assert np.asarray(again.get_ydata()) == pytest.approx(np.asarray(raw.get_ydata()) + 1)
        assert list(np.asarray(raw_b.get_ydata())) == [90.0, 30.0]
        assert raw.get_linestyle() == raw_b.get_linestyle() == "--" and again.get_linestyle() == "-"
        assert list(np.asarray(dense.get_ydata())) == [98.0, 98.0]
        assert raw.get_color() == dense.get_color() == again.get_color() != again_b.get_color() == raw_b.get_color()
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["a", "b", "BatchNorm recalibrated", "BatchNorm as trained", "dense accuracy, as trained"]


def test_training_figure_shows_the_epochs(make_run: MakeRun) -> None:
    """A panel shows another quantity, or the gap of single steps instead of its mean."""
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 31, "epoch": 3, "loss": 1, "lr": 1, "gap": 1.0}\n')
    figure = figures.draw_training(read_runs([run]))
    assert figure is not None
    shown = {axes.get_title(): list(np.asarray(axes.get_lines()[0].get_ydata())) for axes in figure.axes}
    assert shown["Training loss"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert shown["Validation top-1 (%)"] == pytest.approx([50, 75, 97])
    assert shown["Learning rate"] == [1, 1, 1]
    assert shown["Frank-Wolfe gap, mean of the epoch"] == pytest.approx([5, 2.5, (5 / 3 + 1) / 2])


def test_gap_panel_is_absent_without_a_gap(make_run: MakeRun) -> None:
    """A run of SGD gets an empty panel for a quantity it does not have."""
    run = make_run()
    write_lines(run / "metrics.jsonl", [record for record in epoch(1, 0.5) if record["event"] == "epoch"])
    figure = figures.draw_training(read_runs([run]))
    assert figure is not None
    assert len(figure.axes) == 3


def test_histogram_counts_every_weight(make_run: MakeRun) -> None:
    """Zeros, whose logarithm is minus infinity, vanish from the magnitudes, or a NaN ends the report."""
    run = make_run()
    weights = np.array([[0.0, 0.0, 1e-20, 0.3], [0.1, -0.1, -0.3, np.nan]], np.float32)
    save_file({"fc.weight": weights}, run / "model.safetensors")
    figure = figures.draw_weights(read_runs([run]))
    assert figure is not None
    for axes in figure.axes:
        shares = [patch.get_data()[0] for patch in axes.patches if isinstance(patch, StepPatch)]
        assert [share.sum() for share in shares] == pytest.approx([100, 100])
    assert shares[0][0] == pytest.approx(100 * 3 / 7)


def test_dead_layer_is_drawn_and_noted(make_run: MakeRun) -> None:
    """A layer without weights vanishes from the logarithmic axis, and nobody learns why the network fails."""
    run = make_run()
    path = run / "prune" / "s0.9900.json"
    result = json.loads(path.read_text())
    result["dead_layers"] = ["conv1.weight"]
    result["layers"][0]["kept"] = 0
    path.write_text(json.dumps(result))
    figure = figures.draw_layers(read_runs([run]))
    assert figure is not None
    crosses = [line for line in figure.axes[-1].get_lines() if line.get_marker() == "x"]
    assert [list(np.asarray(line.get_xdata())) for line in crosses] == [[0]]
    assert "no weight is left in conv1.weight from 99 % on" in page_of(run)
