"""Cancel all waiting and running jobs of runs. What they have written is kept, and `launch.retry` resumes from it.

python -m launch.cancel runs/digits_sfw
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.cancel", "slurm"):
    from launch.slurm import active_jobs, cancel
    from launch.submission import submissions
    from sfw_dist.files import user_path
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
_PATIENCE = 120.0


def cancel_run(run: RunFolder) -> list[str]:
    """Cancel a run's jobs, and wait until they have ended.

    Returns:
        The ids of the cancelled jobs.

    Raises:
        UserError: jobs have not ended after two minutes.
    """
    ids = [job for submission in submissions(run) for job in submission.jobs]
    found = active_jobs(ids) if ids else []
    if not found:
        return []
    cancel(found)
    until = time.monotonic() + _PATIENCE
    while left := active_jobs(ids):
        if time.monotonic() > until:
            raise UserError(
                f"{', '.join(left)} have not ended {_PATIENCE:g} s after scancel: ask the cluster's operators"
            )
        time.sleep(0.5)
    return found


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.cancel",
        description="Cancel all jobs of runs, and wait until they have ended.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the jobs of each run")
    options = parser.parse_args(argv)
    found = {str(path): cancel_run(RunFolder(path)) for path in options.runs}
    if options.json:
        print(json.dumps(found))
    else:
        for path, jobs in found.items():
            print(f"{path}: " + (f"cancelled {', '.join(jobs)}" if jobs else "no jobs wait or run"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
