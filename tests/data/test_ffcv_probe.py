"""The probe of FFCV: in a process that may hang or crash."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfw_dist.data.loading import ffcv_probe


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "import os; os._exit(139)",
            r"its probe failed \(exit status 139\): apt-get install.*pip install 'sfw-dist\[ffcv\]'",
        ),
        ("raise ImportError('libopencv_core.so.406')", r"its probe failed \(ImportError: libopencv_core.so.406\)"),
        ("import time; time.sleep(60)", r"its probe did not end within 1 s"),
        ("pass", None),
    ],
)
def test_ffcv_is_probed_in_a_process_of_its_own(
    script: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV hangs or crashes where it does not work, and takes the run with it; or every rank probes again."""
    started: list[str] = []
    really = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[-1])
        return really([sys.executable, "-c", script], **options)

    monkeypatch.setattr(ffcv_probe.subprocess, "run", run)
    monkeypatch.setattr(ffcv_probe, "TIME_LIMIT", 1.0 if "sleep" in script else 60.0)
    problems = []
    for _ in range(2):
        ffcv_probe.ffcv_problem.cache_clear()
        problems.append(ffcv_probe.ffcv_problem(tmp_path))
    assert problems[0] == problems[1] and len(started) == 1
    assert problems[0] is None if told is None else re.match(told, str(problems[0]))
    assert started[0] == "from sfw_dist.data.loading.ffcv_probe import try_ffcv; try_ffcv()"
    monkeypatch.setattr(ffcv_probe, "_versions", lambda: "another")
    ffcv_probe.ffcv_problem.cache_clear()
    ffcv_probe.ffcv_problem(tmp_path)
    assert len(started) == 2
    ffcv_probe.ffcv_problem.cache_clear()
