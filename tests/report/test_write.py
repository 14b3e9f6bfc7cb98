"""The report as files: complete, repeatable, and all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfw_dist.errors import UserError
from sfw_dist.report.write import write_report
from tests.support.report import (
    FIGURES,
    MakeRun,
)


def test_report_has_all_files_and_is_repeatable(make_run: MakeRun, tmp_path: Path) -> None:
    """A figure is missing or no PNG, a temporary file stays, or a time stamp changes the report with each writing."""
    run = make_run()
    index, again = write_report([run]), write_report([run], tmp_path / "again")
    assert index == run / "report" / "index.html"
    assert {path.name for path in index.parent.iterdir()} == FIGURES | {"curve.csv", "index.html"}
    for name in FIGURES:
        assert (index.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for path in index.parent.iterdir():
        assert path.read_bytes() == (again.parent / path.name).read_bytes(), path.name


def test_missing_files_cost_only_their_figures(make_run: MakeRun) -> None:
    """A run without metrics or weights gets no report, or an old figure stays although the page says there is none."""
    run = make_run()
    missing = {"metrics.jsonl": "training.png", "model.safetensors": "weights.png"}
    (run / "report").mkdir()
    for name, figure in missing.items():
        (run / name).unlink()
        (run / "report" / figure).write_bytes(b"of an earlier report")
    index = write_report([run])
    assert {path.name for path in index.parent.glob("*.png")} == FIGURES - set(missing.values())
    text = index.read_text(encoding="utf-8")
    for name, figure in missing.items():
        assert f"{figure} is not drawn" in text
        assert name in text


@pytest.mark.usefixtures("quick_figures")
def test_failed_write_keeps_the_old_report(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves a truncated page or a temporary file in place of yesterday's report."""
    run = make_run()
    report = run / "report"
    report.mkdir()
    before = {name: name.encode() for name in ("index.html", "curve.png")}
    for name, content in before.items():
        (report / name).write_bytes(content)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*--out"):
        write_report([run])
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
