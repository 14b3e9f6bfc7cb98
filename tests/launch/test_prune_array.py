"""The pruning array."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from launch import collect, prune_array, retry, train
from launch.submission import Submission
from sfw_dist.pruning import PruningOptions
from sfw_dist.train.run_folder import RunFolder


def test_pruning_options_are_handed_on_to_the_array_and_to_a_retry(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the curve is pruned in another way, or recalibrated over other batches, than was asked for."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0
    arguments = [str(run.path), "--sparsities", "0.2,0.5", "--cluster", "debug"]
    assert prune_array.main([*arguments, "--recalibrate", "-1"]) == 2
    assert "recalibrate must be at least 0, got -1" in capsys.readouterr().err
    finished = Submission.finished
    monkeypatch.setattr(Submission, "finished", lambda self, task: finished(self, task) if task == 0 else None)
    assert prune_array.main([*arguments, "--recalibrate", "2", "--kind", "layerwise", "--scope", "all"]) == 1
    (again,) = retry.retry(run)
    asked = PruningOptions(scope="all", ranking="layerwise", recalibrate=2)
    assert again.tasks == [[0.5]] and again.pruning_options(PruningOptions()) == asked
    assert collect.collect(run) == []
    rows = list(csv.DictReader((run.prune / "all.csv").read_text().splitlines()))
    assert {(row["scope"], row["granularity"], row["ranking"]) for row in rows} == {("all", "weight", "layerwise")}
    assert [row["recalibration_batches"] for row in rows] == ["2", "2"] and all(
        row["top1_recalibrated"] for row in rows
    )


def test_two_of_four_is_one_task_in_an_array(file: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks are made of the configured sparsities, and all of them but one fail."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0
    capsys.readouterr()
    assert prune_array.main([str(run.path), "--granularity", "2:4", "--cluster", "debug", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == [[0.5]]
    arguments = ["--config", str(file), "--prune.granularity", "2:4", "--chain", "--dry-run"]
    assert train.main(arguments) == 0
    assert "#SBATCH --array" not in capsys.readouterr().out
