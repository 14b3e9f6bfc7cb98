"""Submitting a training: a chain on this machine, and what Slurm refuses."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from launch import cancel, status, train
from launch.submission import submissions
from sfw_dist.train.run_folder import RunFolder

CLUSTERS = Path(__file__).parents[2] / "configs" / "cluster"


def test_what_slurm_refuses_leaves_nothing(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a submission that never was, by which status and retry are misled."""
    programs = file.parent / "bin"
    programs.mkdir()
    for name, does in {"sbatch": "echo no such partition >&2; exit 1", "srun": "", "scontrol": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert train.main(["--config", str(file), "--cluster", str(CLUSTERS / "example.yaml")]) == 2
    error = capsys.readouterr().err
    assert "no such partition" in error and error.splitlines()[-1].startswith("error: Slurm refused train-here")
    assert not run.path.exists()


def test_a_chain_here(file: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """The verbs mean something else without Slurm, or all tasks run at once."""
    arguments = ["--config", str(file), "--cluster", "local", "--ranks-per-node", "2", "--chain", "--per-task", "10"]
    assert train.main([*arguments, "--cluster.parallelism", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "report" / "index.html")
    rows = list(csv.DictReader((run.prune / "all.csv").read_text().splitlines()))
    assert len(rows) == len(json.loads((run.prune / "all.json").read_text())) == 19
    (array,) = submissions(run, "prune")
    assert array.jobs == [] and [len(task) for task in array.tasks] == [10, 9]
    assert {row["state"] for row in status.run_status(run)} == {"COMPLETED"}
    assert cancel.cancel_run(run) == []


def test_dry_run_submits_and_writes_nothing(file: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A look at the script starts a job, or leaves a folder that a run then refuses."""
    assert train.main(["--config", str(file), "--nodes", "3", "--dry-run"]) == 0
    assert "#SBATCH --nodes=3" in capsys.readouterr().out
    assert train.main(["--config", str(file), "--chain", "--per-task", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("#!/bin/bash") == 3 and "#SBATCH --array=0-9%8" in lines
    assert "#SBATCH --dependency=afterok:TRAIN" in lines and "#SBATCH --dependency=afterany:ARRAY" in lines
    assert not run.path.exists()
