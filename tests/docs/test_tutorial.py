"""The commands of the tutorials, run for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
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
        if words[0] in ("python", "torchrun") and not ON_A_CLUSTER & set(words):
            run(words)
    assert (tmp_path / "runs" / TUTORIALS[name] / "report" / "index.html").exists()


def run(words: list[str]) -> None:
    """Run a command: what neither trains nor is a script in this process, which has torch imported."""
    if words[:2] == ["python", "-m"] and words[2].startswith("sfw_dist.") and "--config" not in words:
        assert import_module(f"{words[2]}.__main__").main(words[3:]) == 0
        return
    # torchrun on a port that no other test has.
    module = ["-m", "torch.distributed.run", "--standalone"] if words[0] == "torchrun" else []
    command = [sys.executable, *module, *words[1:], *(FEW_EPOCHS if "--config" in words else [])]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
