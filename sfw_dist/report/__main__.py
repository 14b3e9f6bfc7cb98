"""Draw one or several runs on one page: ``python -m sfw_dist.report``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sfw_dist.errors import command_imports, reports_user_errors

with command_imports("sfw_dist.report", "train"):
    from sfw_dist.files import user_path
    from sfw_dist.report import table
    from sfw_dist.report.runs import read_runs
    from sfw_dist.report.write import strict_json, write_files

EXAMPLE = """example:
  python -m sfw_dist.report runs/digits_sfw runs/digits_sgd --out reports/digits
"""


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m sfw_dist.report",
        description="Draw accuracy against sparsity, the weights, the training and the layers of runs, on one page.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="a run's folder; each is one line in a figure"
    )
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="where to write (default: report/ in the first run)"
    )
    parser.add_argument("--json", action="store_true", help="print the page's path and the curve's rows as JSON")
    arguments = parser.parse_args(argv)

    runs = read_runs(arguments.runs)
    index = write_files(runs, arguments.out)
    if arguments.json:
        print(json.dumps({"index": str(index), "curve": [strict_json(row) for row in table.curve_rows(runs)]}))
    else:
        print(index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
