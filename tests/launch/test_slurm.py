"""The cluster's settings, Slurm's scripts as texts, and what its commands answer."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from launch.slurm import ClusterConfig, JobRequest, add_cluster_options, outside_jobs, read_cluster, script
from launch.slurm import states as slurm_states
from sfw_dist.errors import UserError

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
    text = script(Path("/runs/a/submissions/1"), gpu_cluster(), JobRequest("train-a", training=True), 1)
    assert text.replace(sys.executable, "PYTHON") == TRAINING


def test_the_script_of_an_array_after_a_training() -> None:
    """Tasks that take all nodes, an array without its limit, or a dependency that pends for ever."""
    text = script(Path("/s"), gpu_cluster(), JobRequest("prune-a", after="afterok:12"), 18)
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
