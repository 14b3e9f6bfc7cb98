"""The command ``python -m sfw_dist.data``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfw_dist.data.__main__ import main
from tests.support.raw_data import (
    flip_middle_byte,
    register,
)


def test_command_prepares_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts cannot tell success from damage: exit statuses 0, 1, 2 or the JSON are wrong."""
    register(monkeypatch)
    arguments = ["tiny", "--root", str(tmp_path)]
    assert main(["prepare", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": 14, "test": 6}
    assert main(["prepare", *arguments]) == 0
    assert "14 train, 6 test" in capsys.readouterr().out
    assert main(["verify", *arguments]) == 0
    capsys.readouterr()

    flip_middle_byte(tmp_path / "tiny" / "train_images.npy")
    flip_middle_byte(tmp_path / "tiny" / "test_labels.npy")
    assert main(["verify", *arguments]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["verify", *arguments, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_command_reports_user_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or exit status 1, which means that verify found damage."""
    for command in ("prepare", "verify"):
        assert main([command, "nonesuch", "--root", str(tmp_path)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and "nonesuch" in output.err


@pytest.mark.parametrize("command", [[], ["prepare"], ["verify"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a subcommand is bare."""
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "python -m sfw_dist.data prepare digits --root data" in capsys.readouterr().out
