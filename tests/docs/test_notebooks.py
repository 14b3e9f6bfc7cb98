"""The notebooks of the manual run, cell by cell, in a kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.pages import ROOT, page_id

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def _shown(cell: nbformat.NotebookNode) -> list[set[str]]:
    """The kinds of what a cell shows, but for warnings: matplotlib tells of its list of fonts at its first start."""
    outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    return [set(output.data) if "data" in output else {output.output_type} for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=page_id)
def test_notebooks_run_and_show_what_is_stored(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader runs the cells and one of them fails, or they show something else than the page that was read."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [_shown(cell) for cell in fresh.cells] == [_shown(cell) for cell in stored.cells]
    shown = [kinds for cell in fresh.cells for kinds in _shown(cell)]
    assert {"text/html", "text/plain"} in shown, "the curve is shown as a table"
    assert any("image/png" in kinds for kinds in shown), "the curve is drawn"
