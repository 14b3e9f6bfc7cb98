"""The pruning array."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from launch import collect, prune_array, retry, train
from launch.submission import Submission
from sfw_dist.train.run_folder import RunFolder


def test_recalibration_is_handed_on_to_the_array_and_to_a_retry(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the curve is recalibrated over other batches than was asked for."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0
    arguments = [str(run.path), "--sparsities", "0.2,0.5", "--cluster", "debug"]
    assert prune_array.main([*arguments, "--recalibrate", "-1"]) == 2
    assert "--recalibrate must be at least 0, got -1" in capsys.readouterr().err
    finished = Submission.finished
    monkeypatch.setattr(Submission, "finished", lambda self, task: finished(self, task) if task == 0 else None)
    assert prune_array.main([*arguments, "--recalibrate", "2"]) == 1
    (again,) = retry.retry(run)
    assert again.tasks == [[0.5]] and again.recalibrate == 2
    assert collect.collect(run) == []
    rows = list(csv.DictReader((run.prune / "all.csv").read_text().splitlines()))
    assert [row["recalibration_batches"] for row in rows] == ["2", "2"] and all(
        row["top1_recalibrated"] for row in rows
    )
