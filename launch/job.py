"""What runs inside a job: a training that requeues itself, a task of the pruning array, the collection of results.

Signal handlers only set a flag. After a step the ranks agree to stop, all save, and rank 0 asks Slurm to run the job
again. It resumes from the newest complete checkpoint, and ends with the weights of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.collect import collect
from launch.submission import Submission
from sfw_dist.config import Config, load_config
from sfw_dist.distributed.world import joined_world
from sfw_dist.errors import UserError
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.signals import SignalHandler
from sfw_dist.train.trainer import INTERRUPTED, train

_FIRST_PORT, _PORTS = 15000, 17000  # below the ephemeral range


@dataclass
class TrainJob:
    """A training, as every rank runs it."""

    config: Config

    def __call__(self) -> None:
        with SignalHandler() as signals:
            os.environ.update(rank_environment(os.environ))
            with joined_world() as world:
                status = train(self.config, world, resume=True, signals=signals)
        if status == INTERRUPTED and signals.preempted:
            requeue(first=world.main)
        if status:
            sys.exit(status)


@dataclass
class PruneJob:
    """One task of a pruning array: prune and measure some sparsities, then mark the task as finished."""

    run: Path
    submission: Path
    task: int

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, _preempted)
        submission = Submission(self.submission)
        try:
            with joined_world() as world:
                run = RunFolder.existing(self.run)
                options = submission.pruning_options(load_config(run.config).prune)
                sweep_run(run, world, options, sparsities=submission.tasks[self.task])
            submission.finished(self.task)
        except _PreemptedError:  # files that were written are complete, and the others will be written next time
            requeue()


@dataclass
class CollectJob:
    """The end of a chain: merge what the array wrote, and draw the report."""

    run: Path

    def __call__(self) -> None:
        if problems := collect(RunFolder.existing(self.run)):
            print("\n".join(problems), file=sys.stderr)
            sys.exit(1)


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch.distributed reads, from those of a Slurm task; none outside Slurm."""
    if "SLURM_PROCID" not in slurm:
        return {}
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", slurm["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    tasks_per_node = int(slurm["SLURM_NTASKS"]) // int(slurm["SLURM_JOB_NUM_NODES"])
    # Another port after a requeue: the old one may still be in use.
    port = (int(slurm["SLURM_JOB_ID"]) * 31 + int(slurm.get("SLURM_RESTART_COUNT", "0")) * 101) % _PORTS
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(_FIRST_PORT + port),
    }


def requeue(first: bool = True) -> None:
    """Have Slurm run this job again, and wait until it ends this attempt.

    Args:
        first: whether this rank asks Slurm; one rank does.

    Raises:
        UserError: Slurm did not end the attempt in two minutes.
    """
    if first:
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            # The last element's own id is the array's, which would requeue all elements.
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        subprocess.run(["scontrol", "requeue", job], check=True)
    time.sleep(120)  # Slurm ends the step long before
    raise UserError("Slurm did not requeue the job: resume with python -m launch.retry RUN")


class _PreemptedError(BaseException):
    """No ``Exception``: a library that catches those, while it parses or imports, would swallow the signal."""


def _preempted(number: int, frame: FrameType | None) -> None:
    raise _PreemptedError


def main() -> int:
    """Run one task of a local array; it has a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m launch.job", description="Run one task of a submitted array.")
    parser.add_argument("run", type=Path)
    parser.add_argument("submission", type=Path)
    parser.add_argument("task", type=int)
    options = parser.parse_args()
    PruneJob(options.run, options.submission, options.task)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
