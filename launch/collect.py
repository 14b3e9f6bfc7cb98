"""Merge what a pruning array wrote into one CSV, one JSON and the report, and list what is missing.

    python -m launch.collect runs/digits_sfw
    python -m launch.collect runs/digits_sfw --json

The exit status is 1 when anything is missing; `python -m launch.retry RUN` submits only that.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from sfw_dist.errors import command_imports, reports_user_errors

with command_imports("launch.collect", "slurm"):
    from launch.slurm import states
    from launch.submission import Submission, submissions
    from sfw_dist.files import user_path, write_json, write_text
    from sfw_dist.pruning import PruningOptions
    from sfw_dist.report.write import write_report
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
_COLUMNS = (
    "sparsity", "scope", "granularity", "ranking", "criterion", "top1", "top5", "loss", "samples",
    "achieved_sparsity_all", "achieved_sparsity_prunable", "parameters_kept", "flops", "bn_recalibrated",
    "top1_recalibrated", "top5_recalibrated", "loss_recalibrated", "recalibration_batches", "seed",
)  # fmt: skip


def collect(run: RunFolder) -> list[str]:
    """Write ``prune/all.csv``, ``prune/all.json`` and the report of the results that are there.

    Returns:
        A line for each task whose results are missing.
    """
    results = [json.loads(path.read_text()) for path in sorted(run.prune.glob("s*.json"))]
    problems = missing_lines(run)
    if results:
        table = io.StringIO()
        writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**result, **PruningOptions.of_record(result).record()} for result in results)
        write_text(run.prune / "all.csv", table.getvalue())
        write_json(run.prune / "all.json", results)
        write_report([run.path])
    elif not problems:
        problems = [f"{run.path} has no pruning results: python -m launch.prune_array {run.path}"]
    return problems


def unfinished(run: RunFolder) -> list[tuple[Submission, int]]:
    """For every set of sparsities that no task has finished, the newest submitted task."""
    newest: dict[tuple[float, ...], tuple[Submission, int]] = {}
    done: set[tuple[float, ...]] = set()
    for submission in submissions(run, "prune"):
        for task, sparsities in enumerate(submission.tasks):
            newest[tuple(sparsities)] = (submission, task)
            if submission.is_finished(task):
                done.add(tuple(sparsities))
    return [place for sparsities, place in newest.items() if sparsities not in done]


def missing_lines(run: RunFolder) -> list[str]:
    """A line for each unfinished task: its sparsities, how it ended, and where its log is."""
    places = unfinished(run)
    known = states([submission.jobs[task] for submission, task in places if submission.jobs])
    lines = []
    for submission, task in places:
        job = submission.jobs[task] if submission.jobs else f"task {task}"
        sparsities = ", ".join(f"{sparsity:g}" for sparsity in submission.tasks[task])
        state = known.get(job, "did not finish").lower()
        lines.append(f"missing: sparsity {sparsities} ({job} {state}): see {submission.log(task)}")
    return lines


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.collect",
        description="Merge the results of a pruning array, draw the report, and list what is missing.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    run = RunFolder.existing(options.run)
    problems = collect(run)
    files = [str(path) for path in (run.prune / "all.csv", run.path / "report" / "index.html") if path.is_file()]
    answer: dict[str, Any] = {"files": files, "problems": problems}
    print(json.dumps(answer) if options.json else "\n".join(files))
    if not options.json:
        print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
