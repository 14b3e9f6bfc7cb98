"""Submit again what has failed of a run: its training, which resumes, or the missing pruning tasks.

python -m launch.retry runs/digits_sfw
python -m launch.retry runs/digits_sfw --cluster configs/cluster/example.yaml --cluster.time 240
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.retry", "slurm"):
    from launch.collect import unfinished
    from launch.prune_array import submit_array
    from launch.slurm import ClusterConfig, active_jobs, add_cluster_options, read_cluster
    from launch.submission import Submission, submissions
    from launch.train import submit_training
    from sfw_dist.config import load_config
    from sfw_dist.files import user_path
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def retry(run: RunFolder, cluster: ClusterConfig | None = None) -> list[Submission]:
    """Submit a run's failed training, or its missing pruning tasks.

    Args:
        run: the run's folder.
        cluster: where; by default the cluster of the last submission.

    Returns:
        The new submissions; none if nothing is missing.

    Raises:
        UserError: nothing was submitted before, or jobs still wait or run.
    """
    found = submissions(run)
    if not found:
        raise UserError(f"nothing was submitted for {run.path}: python -m launch.train or launch.prune_array")
    if active_jobs([job for submission in found for job in submission.jobs]):
        raise UserError(f"jobs of {run.path} still wait or run: see python -m launch.status {run.path}")
    cluster = cluster or found[-1].cluster
    trainings = [submission for submission in found if submission.what == "train"]
    if trainings and not run.weights.is_file():
        return [submit_training(load_config(trainings[-1].folder / "config.yaml"), cluster)]
    made, places = [], unfinished(run)
    configured = load_config(run.config).prune
    pruned = [(submission.pruning_options(configured), submission.tasks[task]) for submission, task in places]
    for options in dict.fromkeys(options for options, _ in pruned):
        made.append(submit_array(run, cluster, [task for other, task in pruned if other == options], options))
    return made


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.retry",
        description="Submit again what has failed of a run, and nothing else. --cluster.KEY VALUE sets any setting "
        "of the cluster.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="the run's folder")
    add_cluster_options(parser)
    parser.set_defaults(cluster=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object: what was submitted")
    options = parser.parse_args(argv)
    run = RunFolder(options.run)
    made = retry(run, read_cluster(options) if options.cluster else None)
    if options.json:
        print(json.dumps([{"what": s.what, "jobs": s.jobs, "tasks": s.tasks} for s in made]))
    elif not made:
        print(f"nothing is missing of {run.path}")
    for submission in [] if options.json else made:
        count = len(submission.tasks) or 1
        print(f"{submission.what}: {count} task(s)" + (f" from job {submission.jobs[0]} on" if submission.jobs else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
