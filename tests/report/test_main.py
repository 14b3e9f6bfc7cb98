"""The command: its output and its errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sfw_dist.report.__main__ import main
from tests.support.report import (
    ACCURACY,
    MakeRun,
)


def remove_prune(run: Path) -> None:
    for path in (run / "prune").iterdir():
        path.unlink()


def spoil_result(run: Path) -> None:
    (run / "prune" / "s0.9000.json").write_text('{"sparsity": 0.9}')


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no results": (remove_prune, r"has no prune/\*\.json: run python -m sfw_dist\.evaluate .*bad first"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), "is not a run's folder"),
    "configuration is no YAML": (
        lambda run: (run / "config.yaml").write_text("a: [1\nb: }"),
        "config.yaml is not valid",
    ),
    "configuration is a list": (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml is not a mapping"),
    "result lacks a key": (spoil_result, "s0.9000.json has no '"),
    "result is cut": (lambda run: (run / "prune" / "s0.9000.json").write_text('{"spa'), "s0.9000.json is not JSON"),
    "weights are cut": (lambda run: (run / "model.safetensors").write_bytes(b"\x09"), "model.safetensors cannot be"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_second_run_leaves_nothing_behind(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str
) -> None:
    """Half a report is left, or a trace of many lines that does not say which of the runs is bad."""
    spoil, message = SPOILT[fault]
    good, bad = make_run("good"), make_run("bad")
    spoil(bad)
    assert main([str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert str(bad) in error
    assert not (tmp_path / "out").exists()
    assert not (good / "report").exists()


@pytest.mark.usefixtures("quick_figures")
def test_json_is_strict_and_complete(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A program cannot read the output: NaN (here of top-5, which ten-class files may lack) is not JSON."""
    run = make_run()
    assert main([str(run), "--json"]) == 0

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed["index"] == str(run / "report" / "index.html")
    assert [row["sparsity"] for row in printed["curve"]] == sorted(ACCURACY)
    assert printed["curve"][0]["top5"] is None


@pytest.mark.usefixtures("quick_figures")
def test_home_is_replaced_where_no_shell_does(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when ``--out=~/page`` makes a folder that is called ``~``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([f"~/{make_run().name}", "--out=~/page"]) == 0
    assert (tmp_path / "page" / "index.html").is_file()
