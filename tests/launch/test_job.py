"""What runs inside a job: its ranks, its requeue, and its end on a signal."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from launch import job, train
from launch.job import PruneJob, rank_environment
from launch.slurm import ClusterConfig
from launch.submission import Submission
from sfw_dist.errors import UserError
from sfw_dist.train.run_folder import RunFolder

TASK = {
    "SLURM_JOB_ID": "60000000", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
}  # fmt: skip


def test_ranks_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of one number; a port above 32000, or the old one again after a requeue."""
    answer = subprocess.CompletedProcess([], 0, stdout="n1\nn2\n")
    monkeypatch.setattr(job.subprocess, "run", lambda *arguments, **options: answer)
    ranks = rank_environment(TASK)
    assert {key: ranks[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    }  # fmt: skip
    again = rank_environment(TASK | {"SLURM_RESTART_COUNT": "1"})
    assert 15000 <= int(ranks["MASTER_PORT"]) < 32000 and again["MASTER_PORT"] != ranks["MASTER_PORT"]
    assert rank_environment({}) == {}


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"SLURM_JOB_ID": "12"}, ["scontrol", "requeue", "12"]),
        (
            {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
            ["scontrol", "requeue", "12_3"],
        ),
    ],
)
def test_what_is_requeued(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: list[str]) -> None:
    """The last element of an array has the array's id, and would start all of it again."""
    calls: list[list[str]] = []
    monkeypatch.setattr(job.subprocess, "run", lambda command, **options: calls.append(command))
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="did not requeue"):
        job.requeue()
    assert calls == [asked]
    with pytest.raises(UserError):
        job.requeue(first=False)
    assert calls == [asked]


def test_a_preempted_task_asks_for_its_requeue(file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal kills the task, which then counts as failed; or a library that catches exceptions swallows it."""
    train.main(["--config", str(file), "--cluster", "debug"])
    submission = Submission.new(run, "prune", ClusterConfig(), tasks=[[0.5]])
    asked: list[bool] = []
    monkeypatch.setattr(job, "requeue", lambda: asked.append(True))

    def preempted_in_a_library(*arguments: object, **options: object) -> None:
        with suppress(Exception):
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(job, "sweep_run", preempted_in_a_library)
    before = signal.getsignal(signal.SIGUSR2)
    try:
        PruneJob(run.path, submission.folder, 0)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert asked == [True] and not submission.is_finished(0)
