"""The command: what is gathered from the runs, drawn, and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.run_study import gather, main
from experiments.study import read_study
from experiments.tables import Row, read_rows, rows_csv
from tests.support.studies import planned, rows, write_study


def test_arguments_that_the_training_refuses_show_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a study trains for hours before a misspelt argument shows."""
    study = write_study(tmp_path, arguments={"optimizer.lrr": 1})
    assert main([str(study), "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_draw_makes_everything_from_the_rows_alone(tmp_path: Path) -> None:
    """Fails when figures of filed results cannot be drawn again without the runs."""
    (tmp_path / "runs.csv").write_text(rows_csv(rows()))
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs.csv", "summary.csv", "table.md", "curve.png", "compression.png")
    }
    for name in ("curve.png", "compression.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| arm a | 85.0 ± 7.1 | 81.5 ± 7.8 |" in table and "| arm b | – | – |" in table
    with (tmp_path / "summary.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["arm"], last["n"], last["drop_mean"], last["drop_std"]) == ("b", "1", "10.0", "")


def test_draw_names_a_file_that_is_none_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a wrong runs.csv ends in a traceback."""
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    (tmp_path / "runs.csv").write_text(rows_csv(rows()).replace("90.0", "ninety"))
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    missing, columns, value = capsys.readouterr().err.splitlines()
    assert "does not exist" in missing and "['a', 'b']" in columns and "line 2" in value and "ninety" in value


def test_gathering_takes_rows_and_commands_from_the_runs(tmp_path: Path) -> None:
    """Fails when a sparsity that the study does not have is taken up, or a run's own files are copied."""
    run = planned(tmp_path)
    (run.folder / "prune").mkdir(parents=True)
    (run.folder / "config.yaml").write_text("name: x\n")
    epochs = [{"event": "epoch", "epoch": n, "seconds": 2.5, "validation_top1": n / 4} for n in (1, 2)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    for sparsity, top1 in ((0.0, 0.75), (0.3, 0.7), (0.5, 0.5)):
        (run.folder / f"prune/s{sparsity:.4f}.json").write_text(json.dumps(result(sparsity, top1)))
    gather(run.study, [run], tmp_path / "out")

    dense, pruned = read_rows(tmp_path / "out/runs.csv")
    assert dense == Row("tiny", "sfw", "SFW", 1, 0.0, 1.0, 0.0, 75.0, 87.5, 50.0, 5.0)
    assert pruned == Row("tiny", "sfw", "SFW", 1, 0.5, 2.0, 0.25, 50.0, 75.0, 50.0, 5.0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.csv", "tiny.yaml", "commands.txt"}
    commands = (tmp_path / "out/commands.txt").read_text().splitlines()
    assert commands == [run.shown(run.train_command()), run.shown(run.evaluate_command())]
    assert read_study(tmp_path / "out/tiny.yaml") == run.study


def result(sparsity: float, top1: float) -> dict[str, Any]:
    """As ``prune/s*.json`` has it, of a network whose prunable weights are half of all."""
    return {
        "sparsity": sparsity,
        "achieved_sparsity_all": sparsity / 2,
        "achieved_sparsity_prunable": sparsity,
        **{"scope": "weights", "kind": "global", "split": "test", "samples": 100, "seed": 1},
        **{"top1": top1, "top5": 1.0, "loss": 1.0},
        **{"top1_recalibrated": (1 + top1) / 2, "top5_recalibrated": 1.0, "loss_recalibrated": 1.0},
        **{"parameters_total": 100, "parameters_kept": 100, "flops_dense": 10, "flops": 10, "layers": []},
    }
