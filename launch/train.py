"""Submit a training to a cluster, alone or with its pruning array and report.

    python -m launch.train --config configs/digits/sfw.yaml --cluster configs/cluster/example.yaml --chain
    python -m launch.train --config configs/digits/sfw.yaml --cluster configs/cluster/example.yaml --dry-run
    python -m launch.train --config configs/digits/sfw.yaml --cluster local --ranks-per-node 2 --chain

A training that runs out of time or is preempted saves, is requeued and resumes. All options of sfw_dist.train may
follow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sfw_dist.errors import command_imports, reports_user_errors

with command_imports("launch.train", "slurm"):
    from launch.collect import collect
    from launch.job import CollectJob, TrainJob
    from launch.local import run_ranks
    from launch.prune_array import group, submit_array
    from launch.slurm import ClusterConfig, JobRequest, add_cluster_options, read_cluster, script
    from launch.submission import Submission
    from sfw_dist.config import Config, add_resume_option, parse_run, save_config
    from sfw_dist.files import write_text
    from sfw_dist.train.inputs import check_input
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def submit_training(config: Config, cluster: ClusterConfig) -> Submission:
    """Submit a training to Slurm.

    Raises:
        UserError: Slurm refuses it.
    """
    submission = Submission.new(RunFolder(config.run_dir), "train", cluster)
    write_text(submission.folder / "config.yaml", save_config(config))
    request = JobRequest(f"train-{config.name}", training=True)
    submission.submit(request, [TrainJob(config)])
    return submission


def submit_collection(run: RunFolder, cluster: ClusterConfig, after: Sequence[str]) -> Submission:
    """Submit the job that draws the report and lists what is missing, after the jobs ``after`` however they end."""
    submission = Submission.new(run, "collect", cluster)
    arrays = sorted({job.partition("_")[0] for job in after})
    request = JobRequest(f"collect-{run.path.name}", after=":".join(["afterany", *arrays]))
    submission.submit(request, [CollectJob(run.path)])
    return submission


def submit_chain(config: Config, cluster: ClusterConfig, per_task: int) -> list[Submission]:
    """Submit a training, a pruning array that starts if it succeeds, and the collection that follows in any case."""
    run = RunFolder(config.run_dir)
    training = submit_training(config, cluster)
    tasks = group(config.prune.measured_sparsities, per_task)
    array = submit_array(run, cluster, tasks, config.prune, after=f"afterok:{training.jobs[0]}")
    return [training, array, submit_collection(run, cluster, array.jobs)]


def run_here(config: Config, cluster: ClusterConfig, arguments: Sequence[str], chain: bool, per_task: int) -> int:
    """Run the same without Slurm: the ranks as processes of this machine, then the tasks; the exit status."""
    if cluster.kind == "debug":
        TrainJob(config)()
    elif status := run_ranks(cluster.ranks, [sys.executable, "-m", "sfw_dist.train", *arguments]):
        return status
    if not chain:
        return 0
    run = RunFolder(config.run_dir)
    submit_array(run, cluster, group(config.prune.measured_sparsities, per_task), config.prune)
    problems = collect(run)
    print("\n".join(problems) or run.path / "report" / "index.html", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


def _scripts(config: Config, cluster: ClusterConfig, chain: bool, per_task: int) -> list[str]:
    """Return the scripts that would be submitted, with names in place of job ids, which Slurm has not given yet."""
    name, tasks = config.name, len(group(config.prune.measured_sparsities, per_task))
    requests = [(JobRequest(f"train-{name}", training=True), 1)]
    if chain:
        requests.append((JobRequest(f"prune-{name}", after="afterok:TRAIN"), tasks))
        requests.append((JobRequest(f"collect-{name}", after="afterany:ARRAY"), 1))
    folder = RunFolder(config.run_dir).submissions.absolute() / "DRY_RUN"
    return [script(folder, cluster, each, count) for each, count in requests]


def _absolute(config: Config) -> Config:
    """Return the configuration with absolute folders, which mean the same on every node."""
    data = replace(config.data, root=str(Path(config.data.root).absolute()))
    return replace(config, runs_dir=str(Path(config.runs_dir).absolute()), data=data)


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train",
        description="Submit a training to a cluster. All options of sfw_dist.train may follow, and "
        "--cluster.KEY VALUE for any setting of the cluster.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_cluster_options(parser)
    parser.add_argument("--nodes", dest="cluster.nodes", help="nodes (default: the cluster's)")
    parser.add_argument("--gpus-per-node", dest="cluster.gpus_per_node", help="GPUs of each, one a rank")
    parser.add_argument("--ranks-per-node", dest="cluster.ranks_per_node", help="ranks of each, without GPUs")
    parser.add_argument("--chain", action="store_true", help="then prune as an array, then collect and report")
    parser.add_argument(
        "--per-task", type=int, default=1, metavar="N", help="sparsities of a pruning task (default: 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the run and its job ids")
    options, arguments = parser.parse_known_args(argv)
    cluster = read_cluster(options)
    config, training = parse_run(arguments, add_options=add_resume_option)
    run = RunFolder(config.run_dir)
    if options.dry_run:
        print("\n".join(_scripts(config, cluster, options.chain, options.per_task)))
        return 0
    check_input(config, cluster.ranks - 1, cluster.ranks, resume=training.resume == "auto")
    if cluster.kind != "slurm":
        return run_here(config, cluster, arguments, options.chain, options.per_task)
    config = _absolute(config)
    made = submit_chain(config, cluster, options.per_task) if options.chain else [submit_training(config, cluster)]
    if options.json:
        print(json.dumps({"run": str(run.path), **{submission.what: submission.jobs for submission in made}}))
    else:
        for submission in made:
            print(f"{submission.what}: {len(submission.jobs)} job(s) from {submission.jobs[0]} on")
        print(f"look with: python -m launch.status {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
