"""The Python blocks of README and of the manual run."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import NOT_RUN, PAGES, ROOT, blocks, page_id
from tests.docs.run_page import compiled

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
MOST_NOT_RUN = 5


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """A reader copies the blocks of a page, in order, and one of them fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.docs.run_page", str(page)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_blocks_are_valid(page: Path) -> None:
    """A block, whether it is run or not, has a syntax error or imports a name of ours that does not exist."""
    for block in blocks(page):
        if block.language != "python":
            continue
        compiled(block)
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sfw_dist":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page_id(page)}:{block.line}: {node.module} has no {missing}"


def test_few_blocks_are_not_run() -> None:
    """Blocks that nobody runs go out of date; they are the exception, and say why."""
    marked = [block for page in PAGES for block in blocks(page) if block.text.startswith(NOT_RUN)]
    assert len(marked) <= MOST_NOT_RUN
    assert all(block.text.partition("\n")[0].removeprefix(NOT_RUN).strip() for block in marked)
