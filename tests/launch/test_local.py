"""launch.local; that ranks really train together is tested in tests/multiprocess."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).parents[2]


def _rank(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_every_rank_gets_its_place(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib
        e = os.environ
        assert e["MASTER_ADDR"] == "127.0.0.1" and 0 < int(e["MASTER_PORT"]) < 65536
        assert e["RANK"] == e["LOCAL_RANK"] and e["WORLD_SIZE"] == e["LOCAL_WORLD_SIZE"] == "3"
        (pathlib.Path({str(tmp_path)!r}) / e["RANK"]).touch()
    """
    assert local.run_ranks(3, _rank(code)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_the_status_of_the_rank_that_failed_is_returned_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits in a collective for ever; it must not keep the job alive."""
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.5)
    code = "import os, sys, time; sys.exit(2) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert local.run_ranks(2, _rank(code)) == 2


def test_a_rank_killed_by_a_signal_is_a_failure() -> None:
    assert local.run_ranks(1, _rank("import os; os.kill(os.getpid(), 9)")) == 128 + signal.SIGKILL


def test_sigterm_is_passed_on_and_sigint_left_to_the_ranks(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole foreground group itself; the launcher must outlive it to wait."""
    ready = tmp_path / "ready"
    rank = (
        f"import pathlib, signal, time; signal.signal(2, print); pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    )
    code = f"from launch import local; import sys; sys.exit(local.run_ranks(1, [sys.executable, '-c', {rank!r}]))"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not ready.exists() and launcher.poll() is None:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        launcher.kill()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["--nproc", "3", "--data.batch_size", "128"], "write 126"),
        (["--nproc", "2", "--optimizer.lr", "0"], "optimizer.lr"),
        (["--nproc", "2", "--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_shows_before_any_rank_starts(
    arguments: list[str],
    part: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "run_ranks", lambda *a: pytest.fail("a rank was started"))
    given = ["--name", "x", "--runs_dir", str(tmp_path / "runs"), "--data.root", str(digits), *arguments]
    assert local.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error
    assert not (tmp_path / "runs").exists()
