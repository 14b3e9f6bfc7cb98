"""The report of made-up runs: what a reader sees must be what the files say."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import StepPatch
from safetensors.numpy import save_file

from sfw_dist.errors import UserError
from sfw_dist.report import figures, page, table
from sfw_dist.report.__main__ import main
from sfw_dist.report.runs import read_runs
from sfw_dist.report.write import write_report

FIGURES = {"curve.png", "weights.png", "training.png", "layers.png"}
ACCURACY = {0.0: 0.98, 0.5: 0.98, 0.9: 0.971, 0.95: 0.95, 0.99: 0.4}
LAYERS = {"conv1.weight": 576, "conv2.weight": 73_728, "fc.weight": 1_280}
BIASES = 416

MakeRun = Callable[..., Path]


def pruning_result(sparsity: float, top1: float) -> dict[str, Any]:
    """A ``prune/s*.json`` in which every layer has the same sparsity and a multiplication costs one weight."""
    prunable = sum(LAYERS.values())
    removed = {name: round(sparsity * size) for name, size in LAYERS.items()}
    kept = prunable - sum(removed.values())
    return {
        "sparsity": sparsity,
        "scope": "weights",
        "kind": "global",
        "achieved_sparsity_all": 1 - (kept + BIASES) / (prunable + BIASES),
        "achieved_sparsity_prunable": 1 - kept / prunable,
        "top1": top1,
        "top5": None,
        "loss": 0.1,
        "samples": 450,
        "split": "test",
        "flops_dense": 2 * prunable,
        "flops": 2 * kept,
        "parameters_total": prunable + BIASES,
        "parameters_kept": kept + BIASES,
        "layers": [
            {
                "name": name,
                "shape": [size],
                "parameters": size,
                "kept": size - removed[name],
                "sparsity": removed[name] / size,
            }
            for name, size in LAYERS.items()
        ],
        "dead_layers": [],
        "bn_recalibrated": False,
        "seed": 0,
    }


def epoch(number: int, top1: float) -> list[dict[str, Any]]:
    """The records of one epoch of ten steps."""
    step = 10 * number
    return [
        {"event": "train", "step": step, "epoch": number, "loss": 1 / number, "lr": 1.0, "gap": 5.0 / number},
        {
            "event": "epoch",
            "epoch": number,
            "step": step,
            "train_loss": 1 / number,
            "validation_loss": 1.0,
            "validation_top1": top1,
            "validation_top5": 1.0,
            "lr": 1.0,
            "seconds": 1.5,
        },
    ]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a complete run folder; tests then take away or spoil what they are about."""

    def make(name: str = "digits_sfw", *, folder: str = "", accuracy: dict[float, float] = ACCURACY) -> Path:
        run = tmp_path / (folder or name)
        (run / "prune").mkdir(parents=True)
        settings = {"name": name, "seed": 0, "data": {"name": "digits"}, "optimizer": {"name": "sfw", "lr": 1.0}}
        (run / "config.yaml").write_text(json.dumps(settings, indent=2))
        (run / "environment.json").write_text(
            json.dumps({"command": ["train.py", "--config", "a b.yaml"], "git_dirty": False})
        )
        write_lines(run / "metrics.jsonl", [{"event": "start"}, *epoch(1, 0.5), *epoch(2, 0.75), *epoch(3, 0.97)])
        generator = np.random.default_rng(0)
        weights = {name: generator.standard_normal((size // 2, 2), np.float32) for name, size in LAYERS.items()}
        save_file({**weights, "bn.weight": np.full(7, 1e6, np.float32)}, run / "model.safetensors")
        for sparsity, top1 in accuracy.items():
            path = run / "prune" / f"s{sparsity:.4f}.json"
            path.write_text(json.dumps(pruning_result(sparsity, top1)))
        return run

    return make


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the drawing, which takes seconds, where a test is about what is done with the figures."""
    monkeypatch.setattr(figures, "draw_all", lambda _: {"curve.png": b"new"})


def rows_of(*runs: Path) -> list[dict[str, str]]:
    """The rows of curve.csv."""
    return list(csv.DictReader(io.StringIO(table.curve_csv(read_runs(runs)))))


def page_of(*runs: Path) -> str:
    """The page, without its figures."""
    return page.render(read_runs(runs), {})


class Parsed(HTMLParser):
    """Text, tags and addresses of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.cells[-1] and self.lasttag in ("td", "th", "span", "strong", "br"):
            self.cells[-1][-1] += data.strip()


def test_report_has_all_files_and_is_repeatable(make_run: MakeRun, tmp_path: Path) -> None:
    """A figure is missing or no PNG, a temporary file stays, or a time stamp changes the report with each writing."""
    run = make_run()
    index, again = write_report([run]), write_report([run], tmp_path / "again")
    assert index == run / "report" / "index.html"
    assert {path.name for path in index.parent.iterdir()} == FIGURES | {"curve.csv", "index.html"}
    for name in FIGURES:
        assert (index.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for path in index.parent.iterdir():
        assert path.read_bytes() == (again.parent / path.name).read_bytes(), path.name


def test_csv_holds_the_numbers_of_the_files(make_run: MakeRun) -> None:
    """A ratio is inverted, a sparsity is mixed up with another, or a row is lost: checked against hand-made numbers."""
    rows = rows_of(make_run())
    assert [float(row["sparsity"]) for row in rows] == sorted(ACCURACY)
    assert [float(row["top1"]) for row in rows] == list(ACCURACY.values())
    at_90 = rows[2]
    kept = 58 + 7_373 + 128  # of 576, 73,728 and 1,280
    assert float(at_90["achieved_sparsity_prunable"]) == pytest.approx(1 - kept / 75_584)
    assert float(at_90["achieved_sparsity_all"]) == pytest.approx(1 - (kept + 416) / 76_000)
    assert int(at_90["parameters_kept"]) == kept + 416
    assert float(at_90["compression_ratio"]) == pytest.approx(76_000 / (kept + 416))
    assert float(at_90["theoretical_speedup"]) == pytest.approx(75_584 / kept)
    assert (at_90["run"], at_90["optimizer"], at_90["samples"], at_90["split"]) == ("digits_sfw", "sfw", "450", "test")


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


def recalibrate(run: Path, gain: float = 0.01, batches: int = 9, **more: Any) -> None:
    """Give a run's results an accuracy after recalibration."""
    for path in (run / "prune").iterdir():
        result = json.loads(path.read_text())
        anew = {"top1_recalibrated": result["top1"] + gain, "top5_recalibrated": None, "loss_recalibrated": 0.05}
        told = {"bn_recalibrated": True, "bn_layers": 3, "recalibration_batches": batches}
        path.write_text(json.dumps({**result, **anew, **told, **more}))


def test_both_curves_of_a_run_are_drawn_and_told_apart(make_run: MakeRun) -> None:
    """Raw and recalibrated accuracies change places, or a run is not known by its colour any more."""
    runs = [make_run("a"), make_run("b", accuracy={0.0: 0.9, 0.9: 0.3})]
    for run in runs:
        recalibrate(run)
    figure = figures.draw_curve(read_runs(runs))
    for axes in figure.axes[:2]:
        raw, dense, anew, raw_b, _, anew_b = axes.get_lines()
        assert np.asarray(anew.get_ydata()) == pytest.approx(np.asarray(raw.get_ydata()) + 1)
        assert list(np.asarray(raw_b.get_ydata())) == [90.0, 30.0]
        assert raw.get_linestyle() == raw_b.get_linestyle() == "--" and anew.get_linestyle() == "-"
        assert list(np.asarray(dense.get_ydata())) == [98.0, 98.0]
        assert raw.get_color() == dense.get_color() == anew.get_color() != anew_b.get_color() == raw_b.get_color()
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["a", "b", "BatchNorm recalibrated", "BatchNorm as trained", "dense accuracy, as trained"]


def test_tables_and_csv_hold_both_accuracies(make_run: MakeRun) -> None:
    """An accuracy stands in the other's row; a budget is counted from the dense accuracy of the other curve."""
    run = make_run(accuracy={0.0: 0.95, 0.5: 0.94, 0.9: 0.93})
    recalibrate(run, gain=0.03, top1_recalibrated=0.96)
    cells = Parsed(page_of(run)).cells
    assert cells[0] == ["Run", "Optimizer", "Pruning", "BatchNorm", "Dense", "50 %", "90 %"]
    assert cells[1] == ["digits_sfw", "sfw", "global, weights", "as trained", "95.0", "94.0", "93.0"]
    assert cells[2][3:] == ["recalibrated", "96.0", "96.0", "96.0"]
    assert ["digits_sfw", "as trained", "0 %", "50 %", "90 %", "90 %"] in cells
    assert ["digits_sfw", "recalibrated", *["90 %"] * 4] in cells
    row = rows_of(run)[2]
    assert (row["top1"], row["top1_recalibrated"], row["bn_recalibrated"]) == ("0.93", "0.96", "True")
    assert (row["loss_recalibrated"], row["recalibration_batches"]) == ("0.05", "9")


def test_files_from_before_recalibration_are_read(make_run: MakeRun) -> None:
    """An old run cannot be reported any more, has an empty second curve, or takes the other's away."""
    old, new, mixed, plain = make_run("old"), make_run("new"), make_run("mixed"), make_run("plain")
    (row,) = {(row["bn_recalibrated"], row["top1_recalibrated"]) for row in rows_of(old)}
    assert row == ("False", "")
    assert "not recalibrated" not in page_of(old) and "BatchNorm</th>" not in page_of(old)
    recalibrate(new)
    recalibrate(mixed)
    recalibrate(plain, top1_recalibrated=None, bn_layers=0)
    path = mixed / "prune" / "s0.9000.json"
    path.write_text(json.dumps(pruning_result(0.9, 0.5)))
    path = mixed / "prune" / "s0.5000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recalibration_batches": 2}))
    assert len(figures.draw_curve(read_runs([old, new])).axes[0].get_lines()) == 2 + 3
    text = page_of(old, new, mixed, plain)
    assert "old: BatchNorm was not recalibrated anywhere." in text and "new: BatchNorm" not in text
    assert "mixed: BatchNorm was not recalibrated at 90 %." in text
    assert "mixed: BatchNorm was recalibrated over different numbers of batches (2, 9)." in text
    assert "plain: the network has no BatchNorm to recalibrate." in text


def test_dense_accuracy_after_training_is_not_of_the_recalibrated_curve(make_run: MakeRun) -> None:
    """Without a result at sparsity 0 a budget would compare statistics as trained with recalibrated ones."""
    run = make_run(accuracy={0.9: 0.9})
    recalibrate(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "eval", "split": "test", "sparsity": 0.0, "top1": 0.96}) + "\n")
    raw, anew = (curve.run for curve in table.curves(read_runs([run])))
    assert (raw.dense_top1, anew.dense_top1) == (0.96, None)


def test_table_shows_percent_with_one_decimal(make_run: MakeRun) -> None:
    """Fractions instead of percent, cells under the wrong sparsity, or a missing sparsity that shifts the row."""
    runs = [make_run("a"), make_run("b", accuracy={0.0: 0.99, 0.9: 0.3})]
    cells = Parsed(page_of(*runs)).cells
    assert cells[0][3:] == ["Dense", "50 %", "90 %", "95 %", "99 %"]
    assert ["command", "train.py --config 'a b.yaml'"] in cells
    assert cells[1] == ["a", "sfw", "global, weights", "98.0", "98.0", "97.1", "95.0", "40.0"]
    assert cells[2] == ["b", "sfw", "global, weights", "99.0", "–", "30.0", "–", "–"]


def test_sparsity_that_a_budget_buys(make_run: MakeRun) -> None:
    """A network that recovers beyond a failure is credited with the later sparsity, or rounding decides 0.98 - 0.97."""
    (run,) = read_runs([make_run(accuracy={0.0: 0.98, 0.5: 0.97, 0.9: 0.5, 0.95: 0.98})])
    assert table.sparsity_within(run, 0.005) == 0.0
    assert table.sparsity_within(run, 0.01) == 0.5
    assert table.sparsity_within(run, 0.5) == 0.95


def test_dense_accuracy_falls_back_to_the_evaluation_after_training(make_run: MakeRun) -> None:
    """Without a result at sparsity 0 the dense line is lost although training evaluated the network."""
    run = make_run(accuracy={0.9: 0.9})
    assert read_runs([run])[0].dense_top1 is None
    with (run / "metrics.jsonl").open("a") as file:
        for split, sparsity, top1 in (("test", 0.0, 0.96), ("validation", 0.0, 0.5), ("test", 0.7, 0.4)):
            line = {"event": "eval", "split": split, "sparsity": sparsity, "top1": top1}
            file.write(json.dumps(line) + "\n")
    assert read_runs([run])[0].dense_top1 == 0.96


def test_superseded_lines_are_dropped(make_run: MakeRun) -> None:
    """A run killed in epoch 4 and resumed from epoch 2 shows epochs 3 and 4 twice: a zigzag in the curve."""
    run = make_run()
    killed = [*epoch(1, 0.1), *epoch(2, 0.2), *epoch(3, 0.3), epoch(4, 0.4)[0]]
    resumed = [{"event": "resume", "step": 20, "epoch": 2}, *epoch(3, 0.8), *epoch(4, 0.9)]
    write_lines(run / "metrics.jsonl", [{"event": "start"}, *killed, *resumed])
    (read,) = read_runs([run])
    assert [(record["epoch"], record["validation_top1"]) for record in read.epochs()] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.8),
        (4, 0.9),
    ]
    steps = [record["step"] for record in read.metrics or () if record["event"] == "train"]
    assert steps == [10, 20, 30, 40]


def test_second_start_supersedes_everything(make_run: MakeRun) -> None:
    """A run killed before its first checkpoint starts anew in the same folder, and its first attempt is drawn too."""
    run = make_run()
    start = {"event": "start"}
    write_lines(run / "metrics.jsonl", [start, epoch(1, 0.1)[0], start, *epoch(1, 0.5)])
    (read,) = read_runs([run])
    assert read.metrics == (start, *epoch(1, 0.5))


@pytest.mark.parametrize("tail", [b'{"event": "epoch", "ep', b'{"event": "start", "name": "\xc3'])
def test_cut_last_line_is_ignored(make_run: MakeRun, tail: bytes) -> None:
    """A report of a killed run fails on its last line, or loses the lines before; a cut may fall inside a letter."""
    run = make_run()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert [record["epoch"] for record in read_runs([run])[0].epochs()] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"event": "epo', "[1, 2]", '{"step": 3}'])
def test_broken_line_is_named(make_run: MakeRun, line: str) -> None:
    """A broken line in the middle is skipped silently, and the figure of the training lies."""
    run = make_run()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3, ")):
        write_report([run])


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


def test_weights_are_those_of_conv_and_linear_layers(make_run: MakeRun) -> None:
    """BatchNorm's weights, all near one, drown the peak at zero (here they are a million, to be seen)."""
    weights = read_runs([make_run()])[0].weights
    assert weights is not None
    assert weights.size == sum(LAYERS.values())
    assert np.abs(weights).max() < 10


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


def test_missing_files_cost_only_their_figures(make_run: MakeRun) -> None:
    """A run without metrics or weights gets no report, or an old figure stays beside a page that denies it."""
    run = make_run()
    missing = {"metrics.jsonl": "training.png", "model.safetensors": "weights.png"}
    (run / "report").mkdir()
    for name, figure in missing.items():
        (run / name).unlink()
        (run / "report" / figure).write_bytes(b"of an earlier report")
    index = write_report([run])
    assert {path.name for path in index.parent.glob("*.png")} == FIGURES - set(missing.values())
    text = index.read_text(encoding="utf-8")
    for name, figure in missing.items():
        assert f"{figure} is not drawn" in text
        assert name in text


def test_page_is_safe_to_open_and_to_mail(make_run: MakeRun, tmp_path: Path) -> None:
    """A name, configuration or environment from elsewhere becomes markup, or the page loads what is not in it."""
    evil = """<script src="//evil.example/x.js"></script><img src=x onerror='a()'> $\\frac & _x"""
    run = make_run(evil, folder="evil")
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    text = write_report([run], tmp_path / "report").read_text(encoding="utf-8")
    assert text.count("&lt;script src=") >= 5  # title, table, configuration, environment's key and value

    parsed = Parsed(text)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert len(parsed.addresses) == len(FIGURES)
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    for loads in ("http:", "https:", "url(", "@import"):
        assert loads not in text


def test_runs_of_one_name_stay_apart(make_run: MakeRun) -> None:
    """Two seeds of one configuration become one zigzag line in a spreadsheet."""
    runs = [make_run("digits", folder="x/seed0"), make_run("digits", folder="x/seed1"), make_run("other")]
    rows = rows_of(*runs)
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["digits (seed0)", "digits (seed1)", "other"]
    twins = [make_run("digits", folder=f"{place}/seed0") for place in "yz"]
    assert [run.label for run in read_runs(twins)] == [f"digits ({folder})" for folder in twins]


def test_mixed_pruning_is_noted(make_run: MakeRun) -> None:
    """One point of the curve was pruned 2:4 and nobody is told."""
    run = make_run()
    path = run / "prune" / "s0.5000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "2:4"}))
    assert "not all pruned in the same way (2:4, weights; global, weights)" in page_of(run)


def remove_prune(run: Path) -> None:
    for path in (run / "prune").iterdir():
        path.unlink()


def spoil_result(run: Path) -> None:
    (run / "prune" / "s0.9000.json").write_text('{"sparsity": 0.9}')


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no results": (remove_prune, r"has no prune/\*\.json: run python -m sfw_dist\.evaluate .*bad first"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), "is not a run's folder"),
    "configuration is no YAML": (
        lambda run: (run / "config.yaml").write_text("a: [1\nb: }"),
        "config.yaml is not valid",
    ),
    "configuration is a list": (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml is not a mapping"),
    "result lacks a key": (spoil_result, "s0.9000.json has no '"),
    "result is cut": (lambda run: (run / "prune" / "s0.9000.json").write_text('{"spa'), "s0.9000.json is not JSON"),
    "weights are cut": (lambda run: (run / "model.safetensors").write_bytes(b"\x09"), "model.safetensors cannot be"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_second_run_leaves_nothing_behind(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str
) -> None:
    """Half a report is left, or a trace of many lines that does not say which of the runs is bad."""
    spoil, message = SPOILT[fault]
    good, bad = make_run("good"), make_run("bad")
    spoil(bad)
    assert main([str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert str(bad) in error
    assert not (tmp_path / "out").exists()
    assert not (good / "report").exists()


def test_missing_and_repeated_folders_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    """A misspelt folder gives a trace; the same run twice gives two lines on top of each other."""
    run = make_run()
    with pytest.raises(UserError, match="absent is not a folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(UserError, match="is given 2 times"):
        write_report([run, run / ".." / run.name])
    with pytest.raises(UserError, match="no run given"):
        write_report([])


@pytest.mark.usefixtures("quick_figures")
def test_failed_write_keeps_the_old_report(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves a truncated page or a temporary file in place of yesterday's report."""
    run = make_run()
    report = run / "report"
    report.mkdir()
    before = {name: name.encode() for name in ("index.html", "curve.png")}
    for name, content in before.items():
        (report / name).write_bytes(content)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*--out"):
        write_report([run])
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


@pytest.mark.usefixtures("quick_figures")
def test_json_is_strict_and_complete(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A program cannot read the output: NaN (here of top-5, which ten-class files may lack) is not JSON."""
    run = make_run()
    assert main([str(run), "--json"]) == 0

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed["index"] == str(run / "report" / "index.html")
    assert [row["sparsity"] for row in printed["curve"]] == sorted(ACCURACY)
    assert printed["curve"][0]["top5"] is None
