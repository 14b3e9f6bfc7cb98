"""Prune a trained network to many sparsities as an array of jobs.

    python -m launch.prune_array runs/digits_sfw --cluster configs/cluster/example.yaml --parallelism 8
    python -m launch.prune_array runs/digits_sfw --sparsities 0.5,0.9:0.99:0.01 --per-task 3 --dry-run
    python -m launch.prune_array runs/digits_sfw --cluster local --parallelism 2

Each task writes its results whole and then marks itself complete; `python -m launch.collect RUN` merges them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.prune_array", "slurm"):
    from launch.job import PruneJob
    from launch.slurm import ClusterConfig, JobRequest, add_cluster_options, read_cluster, script
    from launch.submission import Submission
    from sfw_dist.config import load_config
    from sfw_dist.pruning.one_shot import Kind
    from sfw_dist.pruning.scope import Scope
    from sfw_dist.pruning.sparsities import parse_sparsities
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def group(sparsities: Sequence[float], per_task: int) -> list[list[float]]:
    """The sparsities of each task. Raises :class:`UserError`."""
    if per_task < 1:
        raise UserError(f"--per-task must be at least 1, got {per_task}: write 1, or more where tasks are short")
    return [list(sparsities[start : start + per_task]) for start in range(0, len(sparsities), per_task)]


def submit_array(
    run: RunFolder,
    cluster: ClusterConfig,
    tasks: list[list[float]],
    *,
    after: str | None = None,
    scope: Scope | None = None,
    kind: Kind | None = None,
    recalibrate: int | None = None,
) -> Submission:
    """Submit the tasks to Slurm, or run them here, not all at once; one that fails does not keep the others."""
    run = RunFolder(run.path.absolute())
    submission = Submission.new(run, "prune", cluster, tasks=tasks, scope=scope, kind=kind, recalibrate=recalibrate)
    jobs = [PruneJob(run.path, submission.folder, task) for task in range(len(tasks))]
    match cluster.kind:
        case "slurm":
            request = JobRequest(f"prune-{run.path.name}", after=after)
            submission.submit(request, jobs)
        case "local":
            with ThreadPoolExecutor(cluster.parallelism) as pool:
                list(pool.map(lambda task: _run_task(run, submission, task), range(len(tasks))))
        case "debug":
            for job in jobs:
                job()
    return submission


def _run_task(run: RunFolder, submission: Submission, task: int) -> None:
    """In a process of its own, with its messages in a file."""
    command = [sys.executable, "-m", "launch.job", str(run.path), str(submission.folder), str(task)]
    with submission.log(task).open("wb") as log:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.prune_array",
        description="Prune a trained network to many sparsities as an array of jobs. --cluster.KEY VALUE sets any "
        "setting of the cluster.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--sparsities", metavar="LIST", help="fractions removed, as in 0.5,0.9:0.99:0.01 (default: the run's)"
    )
    parser.add_argument("--scope", choices=get_args(Scope), help="what is pruned (default: the run's)")
    parser.add_argument("--kind", choices=get_args(Kind), help="what goes (default: the run's)")
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="batches from which BatchNorm's statistics are measured anew after pruning; 0: not (default: the run's)",
    )
    parser.add_argument("--per-task", type=int, default=1, metavar="N", help="sparsities of a task (default: 1)")
    parser.add_argument("--parallelism", dest="cluster.parallelism", metavar="N", help="tasks at a time")
    add_cluster_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the tasks and their job ids")
    options = parser.parse_args(argv)
    cluster = read_cluster(options)
    run = RunFolder.existing(options.run)
    chosen = parse_sparsities(options.sparsities) if options.sparsities else load_config(run.config).prune.sparsities
    tasks = group(chosen, options.per_task)
    if options.dry_run:
        request = JobRequest(f"prune-{run.path.name}")
        print(script(run.submissions.absolute() / "DRY_RUN", cluster, request, len(tasks)))
        return 0
    if (options.recalibrate or 0) < 0:
        raise UserError(f"--recalibrate must be at least 0, got {options.recalibrate}: write 50, or 0 for none")
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no model.safetensors: finish the training with --resume auto")
    asked = {"scope": options.scope, "kind": options.kind, "recalibrate": options.recalibrate}
    submission = submit_array(run, cluster, tasks, **asked)
    failed = [] if submission.jobs else [task for task in range(len(tasks)) if not submission.is_finished(task)]
    if options.json:
        print(json.dumps({"run": str(run.path), "tasks": tasks, "jobs": submission.jobs, "failed": failed}))
    elif submission.jobs:
        print(f"{len(tasks)} task(s) from job {submission.jobs[0]} on; then: python -m launch.collect {run.path}")
    else:
        print(f"{len(tasks) - len(failed)} of {len(tasks)} task(s) done; then: python -m launch.collect {run.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
