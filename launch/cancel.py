"""Cancel all jobs of runs that wait or run. What they have written stays, and `launch.retry` goes on from it.

python -m launch.cancel runs/digits_cnn
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.cancel", "slurm"):
    from launch.slurm import cancel, live
    from launch.submission import submissions
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
_PATIENCE = 120.0


def cancel_run(run: RunFolder) -> list[str]:
    """Cancel, and wait until nothing is left; the jobs there were. Raises :class:`UserError`."""
    ids = [job for submission in submissions(run) for job in submission.jobs]
    found = live(ids) if ids else []
    if not found:
        return []
    cancel(found)
    until = time.monotonic() + _PATIENCE
    while left := live(ids):
        if time.monotonic() > until:
            raise UserError(f"{', '.join(left)} still there {_PATIENCE:g} s after scancel: ask the cluster's operators")
        time.sleep(0.5)
    return found


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.cancel",
        description="Cancel all jobs of runs, and wait until they have ended.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the jobs of each run")
    options = parser.parse_args(argv)
    found = {str(path): cancel_run(RunFolder(path)) for path in options.runs}
    if options.json:
        print(json.dumps(found))
    else:
        for path, jobs in found.items():
            print(f"{path}: " + (f"cancelled {', '.join(jobs)}" if jobs else "nothing waits or runs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
