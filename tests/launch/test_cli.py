"""The sfw-dist command, and what its verbs say of bad input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli, collect, prune_array, retry, status


@pytest.mark.parametrize(
    ("verb", "arguments", "told"),
    [
        (prune_array.main, ["RUN"], "not a run's folder"),
        (collect.main, ["RUN"], "not a run's folder"),
        (status.main, ["RUN"], "not a run's folder"),
        (retry.main, ["RUN"], "nothing was submitted"),
    ],
)
def test_mistakes_are_one_line(
    verb: Callable[[list[str]], int],
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback."""
    assert verb([str(tmp_path / word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_sfw_dist_hands_on_to_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sfw-dist", "evaluate", "no/such/run"])
    assert cli.main() == 2
    assert "no/such/run" in capsys.readouterr().err


def test_sfw_dist_lists_its_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sfw-dist", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in cli._VERBS)
