"""The commands of the tutorial, run for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, block_commands
from tests.docs.run_page import write_files

TUTORIAL = ROOT / "docs" / "tutorial.md"
FEW_EPOCHS = ["--train.epochs", "2"]


@pytest.mark.slow
def test_commands_of_the_tutorial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer follows the tutorial, and a command fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_files(TUTORIAL)
    for words in block_commands(TUTORIAL):
        if words[0] not in ("python", "torchrun"):
            continue
        command = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *_free_port(words)]
        if "--config" in words:
            command += FEW_EPOCHS
        result = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "runs" / "tutorial" / "report" / "index.html").exists()


def _free_port(words: list[str]) -> list[str]:
    """``torchrun`` on a port that no other test has."""
    return ["torch.distributed.run", "--standalone", *words[1:]]
