"""A cluster of slurm/local_cluster as the tests use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfw_dist.config import save_config
from tests.support.training import small_config

ROOT = Path(__file__).parents[2]
LOCAL_CLUSTER = ROOT / "slurm" / "local_cluster"
CLUSTER = ROOT / "configs" / "cluster" / "local_cluster.yaml"
PATIENCE = 240.0
"""Seconds: only a bound on a test that fails."""


def local_cluster(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LOCAL_CLUSTER / command), "--dir", str(folder), *options], capture_output=True, text=True, timeout=PATIENCE
    )


def started(folder: Path, *options: str) -> Path:
    """Start a cluster; its slurm.conf."""
    done = local_cluster("up", folder, *options)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().removeprefix("export SLURM_CONF="))


class Site:
    """A cluster, and a folder of runs on it."""

    def __init__(self, conf: Path, folder: Path, data: Path) -> None:
        self.folder, self._data = folder, data
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        here = {"SLURM_CONF": str(conf), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": programs}
        self._environment = {**os.environ, **here}

    def configuration(self, name: str, *, epochs: int = 2, **options: Any) -> Path:
        """A file of tests/training.py's small run."""
        config = small_config(self.folder / "runs", self._data, name, epochs=epochs, **options)
        path = self.folder / f"{name}.yaml"
        path.write_text(save_config(config))
        return path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def call(self, *command: str, succeeds: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self._environment | environment,
            cwd=self.folder,
            timeout=PATIENCE,
        )
        assert not succeeds or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def launch(self, verb: str, *arguments: str, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", f"launch.{verb}", *arguments, succeeds=succeeds)

    def submit(self, verb: str, *arguments: str) -> Any:
        """With ``--json``, on this cluster; the answer."""
        return json.loads(self.launch(verb, *arguments, "--cluster", str(CLUSTER), "--json").stdout)

    def train(self, name: str, *arguments: str, epochs: int = 2) -> Any:
        return self.submit("train", "--config", str(self.configuration(name, epochs=epochs)), *arguments)

    def status(self, name: str) -> list[dict[str, Any]]:
        answer: dict[str, list[dict[str, Any]]] = json.loads(
            self.launch("status", str(self.run(name)), "--json").stdout
        )
        return answer[str(self.run(name))]

    def running(self) -> list[str]:
        return self.call("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").stdout.split()

    def queue(self) -> list[str]:
        return self.call("squeue", "--noheader", "--array", "--format=%i").stdout.split()

    def step(self, name: str) -> int:
        """How far a training says it is."""
        try:
            return int(json.loads((self.run(name) / "heartbeat.json").read_text())["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def processes(self, job: str, **environment: str) -> list[int]:
        """The Python processes of a job's tasks, by what Slurm put in their environment."""
        wanted = {f"SLURM_JOB_ID={job}", *(f"{key}={value}" for key, value in environment.items())}
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    values = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
                    command = (folder / "cmdline").read_bytes()
                except OSError:  # it has just ended
                    continue
                if wanted <= values and any(value.startswith("SLURM_PROCID=") for value in values) and command:
                    found.append(int(folder.name))
        return found

    def logs(self, name: str) -> str:
        """For the message of a test that fails."""
        paths = sorted((self.run(name) / "submissions").glob("*/*.err"))
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in paths)

    def wait(self, what: str, true: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < until, f"waited {PATIENCE:g} s until {what}"
            time.sleep(0.3)
