"""Read the runs, draw the report in memory, and only then write it."""

from __future__ import annotations

import math
from pathlib import Path

from sfw_dist.errors import UserError
from sfw_dist.files import make_folder, replacing
from sfw_dist.report import figures, page, table
from sfw_dist.report.runs import Run, read_runs


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the report of ``runs`` into ``out`` and return the path of its ``index.html``.

    Args:
        runs: run folders, each with ``prune/s*.json``; one line a folder in every figure.
        out: the report's folder; default: ``report`` in the first run's folder.

    Raises:
        UserError: a folder is no run, has no pruning results, or holds a file that cannot be read. Then nothing is
            written.
    """
    return write_files(read_runs(runs), out)


def write_files(runs: list[Run], out: Path | None) -> Path:
    """Write the report of runs that were read already; arguments, answer and errors as for :func:`write_report`."""
    drawn = figures.draw_all(runs)
    files = {
        **drawn,
        "curve.csv": table.curve_csv(runs).encode(),
        "index.html": page.render(runs, drawn).encode(),  # last: when the page is there, so is all it shows
    }
    folder = runs[0].folder / "report" if out is None else out
    try:
        make_folder(folder)
        for name, content in files.items():
            with replacing(folder / name) as file:
                file.write(content)
        for name in figures.DRAWINGS:
            if name not in drawn:  # an earlier report's figure would contradict this one
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder} ({error.strerror}): choose another with --out") from error
    return folder / "index.html"


def strict_json(row: dict[str, object]) -> dict[str, object]:
    """NaN and infinity, which JSON does not have, become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
