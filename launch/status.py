"""Show the state of runs and their jobs: a line for each training and pruning task. Reads only.

python -m launch.status runs/digits_sfw
python -m launch.status runs/* --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.status", "slurm"):
    from launch.slurm import states
    from launch.submission import Submission, submissions
    from sfw_dist.files import user_path
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
STALLED_AFTER = 600.0
"""Seconds without a heartbeat after which a running training counts as stalled."""


def run_status(run: RunFolder) -> list[dict[str, Any]]:
    """Return a row for the training, and for each task of the newest pruning array and collection.

    Raises:
        UserError: the folder is not a run's.
    """
    if not (run.config.is_file() or run.submissions.is_dir()):
        raise UserError(f"{run.path} is not a run's folder: train one with python -m launch.train")
    newest = {submission.what: submission for submission in submissions(run)}
    known = states([job for submission in newest.values() for job in submission.jobs])
    rows = [_training_row(run, newest.get("train"), known)]
    for what in ("prune", "collect"):
        if what in newest:
            rows += [_task_row(newest[what], task, known) for task in range(_tasks(newest[what]))]
    return rows


def _tasks(submission: Submission) -> int:
    return len(submission.tasks) or len(submission.jobs)


def _training_row(run: RunFolder, submission: Submission | None, known: dict[str, str]) -> dict[str, Any]:
    job = submission.jobs[0] if submission and submission.jobs else None
    beat = _heartbeat(run)
    state = known.get(job or "")
    if run.weights.is_file():
        state = "COMPLETED"
    elif state is None:
        state = "ENDED" if job else "LOCAL"
    age = time.time() - beat["time"] if beat else None
    if state in ("RUNNING", "LOCAL") and age is not None and age > STALLED_AFTER:
        state = "STALLED"
    values = {key: beat.get(key) for key in ("epoch", "step", "loss", "images_per_second")}
    return {"what": "train", "job": job, "state": state, **values, "heartbeat_age": age and round(age, 1)}


def _task_row(submission: Submission, task: int, known: dict[str, str]) -> dict[str, Any]:
    job = submission.jobs[task] if submission.jobs else None
    finished = submission.what == "prune" and submission.is_finished(task)
    state = "COMPLETED" if finished else known.get(job or "", "ENDED")
    row: dict[str, Any] = {"what": submission.what, "job": job, "state": state}
    return row | ({"sparsities": submission.tasks[task]} if submission.what == "prune" else {})


def _heartbeat(run: RunFolder) -> dict[str, Any]:
    try:
        beat: dict[str, Any] = json.loads((run.path / "heartbeat.json").read_text())
        return beat
    except (OSError, ValueError):  # not there yet
        return {}


def _line(row: dict[str, Any]) -> str:
    text = f"  {row['what']:8}{row['job'] or '-':>14}  {row['state']:30}"
    if row["what"] == "prune":
        return text + ", ".join(f"{sparsity:g}" for sparsity in row["sparsities"])
    if row.get("epoch") is None:
        return text.rstrip()
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    speed = f", {row['images_per_second']:,.0f} images/s" if row["images_per_second"] else ""
    return f"{text}epoch {row['epoch']}, step {row['step']}, loss {loss}{speed}, {row['heartbeat_age']:.0f} s ago"


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.status",
        description="Show the state of runs and their jobs. Reads only.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object: a list of rows for each run")
    options = parser.parse_args(argv)
    found = {str(path): run_status(RunFolder(path)) for path in options.runs}
    if options.json:
        print(json.dumps(found))
    else:
        for path, rows in found.items():
            print("\n".join([path, *map(_line, rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
