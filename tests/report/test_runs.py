"""What is read from a run's folder, and which files are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sfw_dist.errors import UserError
from sfw_dist.report.runs import read_runs
from sfw_dist.report.write import write_report
from tests.support.report import (
    LAYERS,
    MakeRun,
    epoch,
    rows_of,
    write_lines,
)


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
    """A run killed before its first checkpoint starts again in the same folder, and its first attempt is drawn too."""
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


def test_weights_are_those_of_conv_and_linear_layers(make_run: MakeRun) -> None:
    """BatchNorm's weights, all near one, drown the peak at zero (here they are a million, to be seen)."""
    weights = read_runs([make_run()])[0].weights
    assert weights is not None
    assert weights.size == sum(LAYERS.values())
    assert np.abs(weights).max() < 10


def test_runs_of_one_name_stay_apart(make_run: MakeRun) -> None:
    """Two seeds of one configuration become one zigzag line in a spreadsheet."""
    runs = [make_run("digits", folder="x/seed0"), make_run("digits", folder="x/seed1"), make_run("other")]
    rows = rows_of(*runs)
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["digits (seed0)", "digits (seed1)", "other"]
    twins = [make_run("digits", folder=f"{place}/seed0") for place in "yz"]
    assert [run.label for run in read_runs(twins)] == [f"digits ({folder})" for folder in twins]


def test_missing_and_repeated_folders_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    """A misspelt folder gives a trace; the same run twice gives two lines on top of each other."""
    run = make_run()
    with pytest.raises(UserError, match="absent is not a folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(UserError, match="is given 2 times"):
        write_report([run, run / ".." / run.name])
    with pytest.raises(UserError, match="no run given"):
        write_report([])


def test_an_unknown_pruning_is_named(make_run: MakeRun) -> None:
    """A file of a later version is drawn as something that this version knows."""
    run = make_run()
    path = run / "prune" / "s0.5000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "blocks"}))
    with pytest.raises(UserError, match=r"s0\.5000\.json has a wrong value \(unknown kind 'blocks'"):
        read_runs([run])
