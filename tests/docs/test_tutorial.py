"""The commands of the tutorials, run for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, block_commands
from tests.docs.run_page import write_files

TUTORIALS = {"tutorial": "tutorial", "tutorial-own-images": "photos"}
"""The run that each page makes."""
ON_A_CLUSTER = {"launch.train", "launch.prune_array"}
FEW_EPOCHS = ["--train.epochs", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_commands_of_a_tutorial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A newcomer follows a tutorial, and a command fails."""
    page = ROOT / "docs" / f"{name}.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_files(page)
    for words in block_commands(page):
        if words[0] not in ("python", "torchrun") or ON_A_CLUSTER & set(words):
            continue
        command = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *_free_port(words)]
        if "--config" in words:
            command += FEW_EPOCHS
        result = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "runs" / TUTORIALS[name] / "report" / "index.html").exists()


def _free_port(words: list[str]) -> list[str]:
    """``torchrun`` on a port that no other test has."""
    return ["torch.distributed.run", "--standalone", *words[1:]]
