"""Prune a trained network to many sparsities as an array of jobs.

    python -m launch.prune_array runs/digits_sfw --cluster configs/cluster/example.yaml --parallelism 8
    python -m launch.prune_array runs/digits_sfw --sparsities 0.5,0.9:0.99:0.01 --per-task 3 --dry-run
    python -m launch.prune_array runs/digits_sfw --cluster local --parallelism 2 --granularity filter

Each task writes complete result files and then marks itself finished; `python -m launch.collect RUN` merges them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.prune_array", "slurm"):
    from launch.job import PruneJob
    from launch.slurm import ClusterConfig, JobRequest, add_cluster_options, read_cluster, script
    from launch.submission import Submission
    from sfw_dist.config import load_config
    from sfw_dist.evaluate.pruning_arguments import add_pruning_arguments, pruning_options
    from sfw_dist.files import user_path
    from sfw_dist.pruning import PruningOptions, parse_sparsities
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def group(sparsities: Sequence[float], per_task: int) -> list[list[float]]:
    """Divide sparsities into tasks of ``per_task`` each. Raises :class:`UserError` where that is below 1.

    Example:
        >>> group([0.5, 0.9, 0.95], per_task=2)
        [[0.5, 0.9], [0.95]]
    """
    if per_task < 1:
        raise UserError(f"--per-task must be at least 1, got {per_task}: write 1, or more where tasks are short")
    return [list(sparsities[start : start + per_task]) for start in range(0, len(sparsities), per_task)]


def submit_array(
    run: RunFolder,
    cluster: ClusterConfig,
    tasks: list[list[float]],
    options: PruningOptions,
    *,
    after: str | None = None,
) -> Submission:
    """Submit the tasks to Slurm, or run them here, ``cluster.parallelism`` at a time; a failed one stops no other.

    Args:
        run: the trained run.
        cluster: where the tasks run.
        tasks: the sparsities of each task.
        options: how the network is pruned.
        after: a Slurm dependency, as in ``afterok:12``.
    """
    run = RunFolder(run.path.absolute())
    record = {**options.record(), "recalibrate": options.recalibrate}
    submission = Submission.new(run, "prune", cluster, tasks=tasks, **record)
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
    """Run one task in a separate process, with its messages in a file."""
    command = [sys.executable, "-m", "launch.job", str(run.path), str(submission.folder), str(task)]
    with submission.log(task).open("wb") as log:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = _parser().parse_args(argv)
    cluster = read_cluster(arguments)
    run = RunFolder.existing(arguments.run)
    configured = load_config(run.config).prune
    options = pruning_options(arguments, configured)
    given = parse_sparsities(arguments.sparsities) if arguments.sparsities else None
    tasks = group(options.default_sparsities(configured.sparsities) if given is None else given, arguments.per_task)
    if arguments.dry_run:
        request = JobRequest(f"prune-{run.path.name}")
        print(script(run.submissions.absolute() / "DRY_RUN", cluster, request, len(tasks)))
        return 0
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no model.safetensors: finish the training with --resume auto")
    submission = submit_array(run, cluster, tasks, options)
    failed = [] if submission.jobs else [task for task in range(len(tasks)) if not submission.is_finished(task)]
    if arguments.json:
        print(json.dumps({"run": str(run.path), "tasks": tasks, "jobs": submission.jobs, "failed": failed}))
    elif submission.jobs:
        print(f"{len(tasks)} task(s) from job {submission.jobs[0]} on; then: python -m launch.collect {run.path}")
    else:
        print(f"{len(tasks) - len(failed)} of {len(tasks)} task(s) done; then: python -m launch.collect {run.path}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.prune_array",
        description="Prune a trained network to many sparsities as an array of jobs. --cluster.KEY VALUE sets any "
        "setting of the cluster.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--sparsities", metavar="LIST", help="fractions removed, as in 0.5,0.9:0.99:0.01 (default: the run's)"
    )
    add_pruning_arguments(parser)
    parser.add_argument("--per-task", type=int, default=1, metavar="N", help="sparsities of a task (default: 1)")
    parser.add_argument("--parallelism", dest="cluster.parallelism", metavar="N", help="tasks at a time")
    add_cluster_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the tasks and their job ids")
    return parser


if __name__ == "__main__":
    sys.exit(main())
