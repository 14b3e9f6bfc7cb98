"""launch without Slurm: scripts as texts, settings, the same verbs on this machine, a job and its environment."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import cancel, collect, job, prune_array, retry, status, train
from launch.job import PruneJob, rank_environment
from launch.slurm import ClusterConfig, Wanted, add_cluster_options, outside_jobs, read_cluster, script
from launch.slurm import states as slurm_states
from launch.submission import Submission, submissions
from sfw_dist.config import save_config
from sfw_dist.errors import UserError
from sfw_dist.train.run_folder import RunFolder
from tests.support.training import small_config

CLUSTERS = Path(__file__).parents[2] / "configs" / "cluster"
TRAINING = """\
#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=6
#SBATCH --error=/runs/a/submissions/1/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=train-a
#SBATCH --mem=64GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/runs/a/submissions/1/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --wckey=''

# setup
export NCCL_SOCKET_IFNAME='ib0; rm -rf /'
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/a/submissions/1/%j_%t_log.out --error /runs/a/submissions/1/%j_%t_log.err \
--kill-on-bad-exit=1 --wait=60 PYTHON -u -m submitit.core._submit /runs/a/submissions/1
"""


def gpu_cluster() -> ClusterConfig:
    return ClusterConfig(
        partition="gpu",
        account="vision",
        nodes=2,
        gpus_per_node=4,
        cpus_per_rank=6,
        mem_gb=64,
        parallelism=3,
        env={"NCCL_SOCKET_IFNAME": "ib0; rm -rf /"},
        setup=["module load cuda"],
    )


def test_the_script_of_a_training() -> None:
    """A trap comes back: no end when one rank dies, cores lost, a wckey that sites refuse, a value run by the shell."""
    text = script(Path("/runs/a/submissions/1"), gpu_cluster(), Wanted("train-a", training=True), 1)
    assert text.replace(sys.executable, "PYTHON") == TRAINING


def test_the_script_of_an_array_after_a_training() -> None:
    """Tasks that take all nodes, an array without its limit, or a dependency that pends for ever."""
    text = script(Path("/s"), gpu_cluster(), Wanted("prune-a", after="afterok:12"), 18)
    lines = set(text.splitlines())
    assert {
        "#SBATCH --array=0-17%3",
        "#SBATCH --dependency=afterok:12",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --output=/s/%A_%a_0_log.out",
    } <= lines


def cluster_of(*arguments: str) -> ClusterConfig:
    parser = argparse.ArgumentParser()
    add_cluster_options(parser)
    return read_cluster(parser.parse_args(arguments))


def test_settings_come_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    """An override is lost, or is taken as text where a number or a list is meant."""
    file = tmp_path / "site.yaml"
    file.write_text("partition: gpu\nnodes: 2\ngpus_per_node: 8\n")
    cluster = cluster_of("--cluster", str(file), "--cluster.nodes", "3", "--cluster.setup", "[module load a]")
    assert (cluster.partition, cluster.nodes, cluster.setup, cluster.kind) == ("gpu", 3, ["module load a"], "slurm")
    assert cluster.ranks == 24
    assert cluster_of().kind == "local" and cluster_of("--cluster", "debug").kind == "debug"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=str)
def test_every_cluster_file_can_be_read(path: Path) -> None:
    """A setting was renamed, and the examples were forgotten."""
    assert cluster_of("--cluster", str(path)).kind == "slurm"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (["--cluster.nodes", "0"], "cluster.nodes must be at least 1, got 0"),
        (["--cluster.nodes", "two"], "nodes"),
        (["--cluster.gpus_per_node", "-1"], "gpus_per_node must be at least 0"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], told: str) -> None:
    """A traceback, or a job that Slurm refuses after a minute."""
    with pytest.raises(UserError, match=told) as error:
        cluster_of(*arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    """A typing mistake is ignored, and the job runs with the default."""
    file = tmp_path / "site.yaml"
    file.write_text("partiton: gpu\n")
    with pytest.raises(UserError, match="unknown key partiton: did you mean partition"):
        cluster_of("--cluster", str(file))


def test_a_job_is_submitted_as_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job submitted from a job inherits its nodes, its array task or its rank."""
    for key in ("SLURM_JOB_ID", "SBATCH_PARTITION", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with outside_jobs():
        assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "RANK", "WORLD_SIZE"} & os.environ.keys()
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SLURM_JOB_ID"] == os.environ["RANK"] == "7"


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


def test_states_without_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sacct every job is unknown for ever; with it, the queue knows better what waits."""
    answers = {
        "sacct": "",
        "scontrol": "JobId=12 ArrayJobId=12 ArrayTaskId=1 JobState=FAILED Reason=x\n"
        "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobState=COMPLETED\n",
        "squeue": "12_2|PENDING|JobArrayTaskLimit\n",
    }
    monkeypatch.setattr("launch.slurm.slurm", lambda command: answers[command[0]])
    expected = {"12_0": "COMPLETED", "12_1": "FAILED", "12_2": "PENDING (JobArrayTaskLimit)"}
    assert slurm_states(["12_0", "12_1", "12_2", "99"]) == expected
    answers["sacct"] = "12_0|COMPLETED\n12_1|CANCELLED by 1000\n"
    assert slurm_states(["12_1"]) == {"12_1": "CANCELLED"}


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


# --- on this machine --------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, digits: Path) -> Path:
    config = small_config(tmp_path / "runs", digits, "here", epochs=1)
    path = tmp_path / "here.yaml"
    path.write_text(save_config(config))
    return path


@pytest.fixture
def run(file: Path) -> RunFolder:
    return RunFolder(file.parent / "runs" / "here")


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


def test_what_failed_here_is_listed_and_tried_again(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed task goes unnoticed; or everything is computed again for its sake."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0

    def broken_for_half(name: str) -> Callable[..., Any]:
        whole = getattr(job, name)

        def evaluate(run: RunFolder, world: object, *, sparsities: list[float], **options: Any) -> Any:
            if sparsities == [0.5]:
                raise RuntimeError("the node died")
            return whole(run, world, sparsities=sparsities, **options)

        return evaluate

    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluate", broken_for_half("evaluate"))
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


def test_a_preempted_task_asks_for_its_requeue(file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal kills the task, which then counts as failed."""
    train.main(["--config", str(file), "--cluster", "debug"])
    submission = Submission.new(run, "prune", ClusterConfig(), tasks=[[0.5]], scope=None, kind=None)
    asked: list[bool] = []
    monkeypatch.setattr(job, "requeue", lambda: asked.append(True))
    monkeypatch.setattr(job, "evaluate", lambda *arguments, **options: signal.raise_signal(signal.SIGUSR2))
    before = signal.getsignal(signal.SIGUSR2)
    try:
        PruneJob(run.path, submission.folder, 0)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert asked == [True] and not submission.is_finished(0)


@pytest.mark.parametrize(
    ("verb", "arguments", "told"),
    [
        (prune_array.main, ["RUN"], "not a run's folder"),
        (collect.main, ["RUN"], "not a run's folder"),
        (status.main, ["RUN"], "not a run's folder"),
        (retry.main, ["RUN"], "nothing was submitted"),
    ],
)
def test_mistakes_are_one_line(
    verb: Callable[[list[str]], int],
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback."""
    assert verb([str(tmp_path / word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_dry_run_submits_and_writes_nothing(file: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A look at the script starts a job, or leaves a folder that a run then refuses."""
    assert train.main(["--config", str(file), "--nodes", "3", "--dry-run"]) == 0
    assert "#SBATCH --nodes=3" in capsys.readouterr().out
    assert train.main(["--config", str(file), "--chain", "--per-task", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("#!/bin/bash") == 3 and "#SBATCH --array=0-9%8" in lines
    assert "#SBATCH --dependency=afterok:TRAIN" in lines and "#SBATCH --dependency=afterany:ARRAY" in lines
    assert not run.path.exists()
