"""A folder for configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.config_files import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML file below the test's folder."""

    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file
