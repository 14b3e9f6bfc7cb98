"""What has failed is listed and submitted again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import collect, job, prune_array, retry, train
from launch.slurm import ClusterConfig
from launch.submission import Submission
from sfw_dist.train.run_folder import RunFolder


def test_what_failed_here_is_listed_and_tried_again(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed task goes unnoticed; or everything is computed again for its sake."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0

    sweep_run = job.sweep_run

    def broken_for_half(*arguments: Any, sparsities: list[float]) -> Any:
        if sparsities == [0.5]:
            raise RuntimeError("the node died")
        return sweep_run(*arguments, sparsities=sparsities)

    with monkeypatch.context() as patch:
        patch.setattr(job, "sweep_run", broken_for_half)
        with pytest.raises(RuntimeError, match="the node died"):
            prune_array.main([str(run.path), "--sparsities", "0.2,0.5", "--cluster", "debug"])
    capsys.readouterr()
    assert collect.main([str(run.path), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith("missing: sparsity 0.5 (task 1 did not finish): see ")
    before = (run.prune / "s0.2000.json").stat().st_mtime_ns
    (again,) = retry.retry(run)
    assert again.tasks == [[0.5]] and again.is_finished(0)
    assert collect.main([str(run.path)]) == 0
    assert (run.prune / "s0.2000.json").stat().st_mtime_ns == before
    assert retry.retry(run) == []


def test_an_array_from_before_is_retried_as_it_was_asked_for(file: Path, run: RunFolder) -> None:
    """Its record has the older words, and null for what was the run's."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0
    Submission.new(run, "prune", ClusterConfig(kind="debug"), tasks=[[0.5]], scope=None, kind="filters")
    (again,) = retry.retry(run)
    assert again.is_finished(0)
    (result,) = [json.loads(path.read_text()) for path in run.prune.glob("s*.json")]
    assert (result["scope"], result["granularity"], result["ranking"]) == ("weights", "filter", "global")
