"""The cluster: its settings, and the only module that uses submitit and Slurm's commands."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from sfw_dist.config import check_keys, read_yaml
from sfw_dist.errors import UserError

SUBMITIT_COMMAND = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit"
LEAST_SLURM_ARRAY = 1001
"""Slurm's default MaxArraySize, used if the site's is unknown; the largest index is one less."""


@dataclass
class ClusterConfig:
    """Where jobs run, and with which resources."""

    kind: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: processes of this machine, started at once; debug: this process itself."""
    partition: str | None = None
    """Slurm's partition; likewise account, qos and constraint."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int = 60
    """Minutes that a job may take; a training that needs more is requeued and resumes."""
    nodes: int = 1
    """Nodes of the training."""
    gpus_per_node: int = 0
    """GPUs of a node, each with one rank; 0 for ranks on CPUs."""
    ranks_per_node: int = 1
    """Ranks of a node where it has no GPUs."""
    cpus_per_rank: int = 1
    """Cores of each rank."""
    mem_gb: float | None = None
    """Memory of a node in GB."""
    signal_delay: int = 120
    """Seconds before the end of the time at which a training is told to save."""
    parallelism: int = 8
    """Pruning tasks at a time."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the jobs, for example GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that a job runs first, for example `module load cuda`."""

    def __post_init__(self) -> None:
        for name in ("time", "nodes", "ranks_per_node", "cpus_per_rank", "signal_delay", "parallelism"):
            if getattr(self, name) < 1:
                raise UserError(f"cluster.{name} must be at least 1, got {getattr(self, name)}: write 1 or more")
        if self.gpus_per_node < 0:
            raise UserError(f"cluster.gpus_per_node must be at least 0, got {self.gpus_per_node}: write 0 for CPUs")

    @property
    def ranks(self) -> int:
        """Number of ranks of a training, over all nodes."""
        return self.nodes * (self.gpus_per_node or self.ranks_per_node)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cluster FILE`` and ``--cluster.KEY VALUE``."""
    parser.add_argument(
        "--cluster", metavar="FILE", default="local", help="YAML of the cluster, or local or debug (default: local)"
    )
    for known in fields(ClusterConfig):
        parser.add_argument(f"--cluster.{known.name}", metavar="VALUE", help=argparse.SUPPRESS)


def read_cluster(options: argparse.Namespace) -> ClusterConfig:
    """Read the cluster's settings from the options of :func:`add_cluster_options`.

    Raises:
        UserError: the file cannot be read, or a setting is unknown or has a bad value.
    """
    where = options.cluster
    tree = {"kind": where} if where in ("local", "debug") else read_yaml(Path(where))
    given = {known.name: getattr(options, f"cluster.{known.name}") for known in fields(ClusterConfig)}
    tree |= {key: yaml.safe_load(value) for key, value in given.items() if value is not None}
    check_keys(tree, ClusterConfig, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClusterConfig)
    try:
        parsed = parser.parse_object(tree, defaults=True)
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())} ({where}): see configs/cluster/") from None
    return ClusterConfig(**vars(parsed))


@dataclass(frozen=True)
class JobRequest:
    """What one submission asks of Slurm in addition to the cluster's settings."""

    name: str
    training: bool = False
    """True: all ranks of a training. False: one task, with one GPU if the cluster has GPUs."""
    after: str | None = None
    """Slurm dependency, as in ``afterok:12``."""


def sbatch_parameters(cluster: ClusterConfig, request: JobRequest) -> dict[str, Any]:
    """Return submitit's parameters for a job."""
    gpus = cluster.gpus_per_node if request.training else min(cluster.gpus_per_node, 1)
    more: dict[str, Any] = {"requeue": True}
    if request.after:
        # Without kill-on-invalid-dep a job waits for ever for one that has failed.
        more |= {"dependency": request.after, "kill-on-invalid-dep": "yes"}
    setup = [f"export {key}={shlex.quote(str(value))}" for key, value in cluster.env.items()]
    parameters = {
        "job_name": request.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "nodes": cluster.nodes if request.training else 1,
        "ntasks_per_node": (cluster.gpus_per_node or cluster.ranks_per_node) if request.training else 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": cluster.cpus_per_rank,
        "mem": f"{cluster.mem_gb:g}GB" if cluster.mem_gb else None,
        "signal_delay_s": cluster.signal_delay,
        "array_parallelism": cluster.parallelism,
        "wckey": "",  # submitit sends one by default, which some sites refuse
        # srun does not take --cpus-per-task from the job since Slurm 22.05.
        "setup": [*setup, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *cluster.setup],
        # Without them the other ranks wait in a collective when one has died.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=60"],
        "additional_parameters": more,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def script(folder: Path, cluster: ClusterConfig, request: JobRequest, tasks: int) -> str:
    """Return the sbatch script that :func:`submit` would send; needs no Slurm."""
    parameters = sbatch_parameters(cluster, request)
    count = tasks if tasks > 1 else None
    return _make_sbatch_string(f"{SUBMITIT_COMMAND} {shlex.quote(str(folder))}", folder, map_count=count, **parameters)


def submit(
    folder: Path, cluster: ClusterConfig, request: JobRequest, calls: Sequence[Callable[[], object]]
) -> list[str]:
    """Submit calls as jobs; several become arrays, no larger than the site allows.

    Args:
        folder: for submitit's files.
        cluster: where jobs run, and with which resources.
        request: the kind of job.
        calls: what the jobs run, one each.

    Returns:
        A job id for each call, like ``12`` or ``12_0``.

    Raises:
        UserError: Slurm refuses, with its reason; nothing is submitted then.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch was not found: run this where Slurm is, or take --cluster local")
    limit = max_array_size()
    ids: list[str] = []
    with outside_jobs():
        executor = SlurmExecutor(folder, max_num_timeout=1000)  # retries are decided by launch.job, not by submitit
        executor.update_parameters(**sbatch_parameters(cluster, request))
        try:
            for start in range(0, len(calls), limit):
                with executor.batch():
                    jobs = [executor.submit(call) for call in calls[start : start + limit]]
                ids += [job.job_id for job in jobs]
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            if ids:  # the arrays before the one that was refused
                cancel(ids)
            reason = " ".join(str(getattr(error, "stderr", None) or error).split())[-300:]
            raise UserError(f"Slurm refused {request.name} ({reason}): correct the settings of --cluster") from None
    return ids


def max_array_size() -> int:
    """Return how many tasks an array of this site may have."""
    for line in slurm(["scontrol", "show", "config"]).splitlines():
        if line.startswith("MaxArraySize"):
            return max(int(line.partition("=")[2]) - 1, 1)
    return LEAST_SLURM_ARRAY - 1


@contextmanager
def outside_jobs() -> Iterator[None]:
    """Hide the environment variables of an enclosing job or rank, which a job submitted from it would inherit."""
    prefixes = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    hidden = {k: v for k, v in os.environ.items() if (k.startswith(prefixes) and k != "SLURM_CONF") or k in ranks}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)


def slurm(command: Sequence[str]) -> str:
    """Return the output of a Slurm command; empty if it fails, as sacct does on a cluster without accounting."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def states(ids: Sequence[str]) -> dict[str, str]:
    """Return the state of each job or array task that Slurm still knows, from its queue, accounting, or memory."""
    found: dict[str, str] = {}
    for row in slurm(["sacct", "-X", "--noheader", "--parsable2", "-o", "JobID,State", *_jobs(ids)]).splitlines():
        job, state = row.split("|")
        found[job] = state.split()[0]  # "CANCELLED by 1000"
    if not found:
        for job in {job.partition("_")[0] for job in ids}:
            for row in slurm(["scontrol", "--oneliner", "show", "job", job]).splitlines():
                values = dict(item.split("=", 1) for item in row.split() if "=" in item)
                task = f"{values['ArrayJobId']}_{values['ArrayTaskId']}" if "ArrayTaskId" in values else values["JobId"]
                found[task] = values["JobState"]
    for row in slurm(["squeue", "--noheader", "--array", "--format=%i|%T|%r", *_jobs(ids)]).splitlines():
        job, state, reason = row.split("|")
        found[job] = f"{state} ({reason})" if state == "PENDING" and reason not in ("None", "Priority") else state
    return {job: found[job] for job in ids if job in found}


def _jobs(ids: Sequence[str]) -> list[str]:
    return ["--jobs", ",".join(sorted({job.partition("_")[0] for job in ids}))]


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs that have not ended.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = sorted({job.partition("_")[0] for job in ids})
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel failed ({' '.join(done.stderr.split())}): see whether Slurm answers (sinfo)")


def active_jobs(ids: Sequence[str]) -> list[str]:
    """Return the ids of jobs that wait or run."""
    rows = slurm(["squeue", "--noheader", "--array", "--format=%i", "--me"]).split()
    return [job for job in ids if job in rows]
