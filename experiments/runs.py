"""The runs of a study: their commands, which of them are left to run, and running several at a time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from experiments.study import Arm, Study
from sfw_dist.config import first_difference, load_config, parse_run
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder
from sfw_dist.train.run_folder import RunFolder

SHOWN = "$ "
"""What a command begins with in a log."""


class Outcome(Enum):
    """How a run ended."""

    DONE = "ended"
    FAILED = "FAILED"
    STOPPED = "stopped"


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    study: Study
    arm: Arm
    seed: int
    runs_dir: Path
    threads: int  # for computing and, unless the study says otherwise, for reading data

    @property
    def name(self) -> str:
        return f"{self.study.name}-{self.arm.name}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def log(self) -> Path:
        return self.runs_dir / f"{self.name}.log"

    def settings(self) -> list[str]:
        """Return the options of the training's command."""
        own = {"seed": self.seed, "runs_dir": str(self.runs_dir), "name": self.name}
        dotted = own | {"data.workers": self.threads} | self.arm.arguments
        pairs = [(f"--{key}", _as_text(value)) for key, value in dotted.items()]
        return ["--config", self.arm.config, *(part for pair in pairs for part in pair)]

    def train_command(self) -> list[str]:
        """Return the command that starts the training, or resumes it."""
        return ["python", "-m", "sfw_dist.train", *self.settings(), "--resume", "auto"]

    def evaluate_command(self, sparsities: str | None = None) -> list[str]:
        """Return the command that prunes and measures; ``sparsities`` defaults to the study's."""
        chosen = self.study.sparsities_text if sparsities is None else sparsities
        return ["python", "-m", "sfw_dist.evaluate", str(self.folder), "--sparsities", chosen]

    def commands_run(self) -> list[str]:
        """Return the distinct commands in the run's log, in order; without a log, those that would make it."""
        if not self.log.is_file():
            return [self.shown(command) for command in (self.train_command(), self.evaluate_command())]
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return list(dict.fromkeys(line.removeprefix(SHOWN) for line in lines if line.startswith(SHOWN)))

    def shown(self, command: Sequence[str]) -> str:
        """Return a command as one would type it."""
        return f"OMP_NUM_THREADS={self.threads} {shlex.join(command)}"


def _as_text(value: Any) -> str:
    """A value as the command line takes it: text as it is, everything else as YAML in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check(runs: Sequence[PlannedRun]) -> None:
    """Check all runs before the first one starts.

    Raises:
        UserError: options that the training would refuse, or a folder that holds a run with other settings.
    """
    for run in runs:
        try:
            config, _ = parse_run(run.settings())
        except UserError as error:
            raise UserError(f"arm {run.arm.name}: {error}") from None
        folder = RunFolder(run.folder)
        difference = first_difference(config, load_config(folder.config)) if folder.config.is_file() else None
        if difference:
            raise UserError(f"{run.folder} holds a run with other settings ({difference}): choose another --runs-dir")


def pending(run: PlannedRun) -> list[list[str]]:
    """Return the commands of a run that are left."""
    folder = RunFolder(run.folder)
    if not folder.weights.is_file():
        return [run.train_command(), run.evaluate_command()]
    sparsities = run.study.sparsities
    missing = [s for s in sparsities if not (folder.prune / f"s{s:.4f}.json").is_file()]
    if not missing:
        return []
    # A study to which sparsities were added measures only the new ones.
    return [run.evaluate_command(None if missing == sparsities else ",".join(map(str, missing)))]


class Children:
    """Child processes that threads wait for, and that can all be stopped at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self, command: Sequence[str], threads: int, log: Path) -> int | None:
        """Run a command, append its output to ``log``, and return its exit status; None if :meth:`stop` came first."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with self._lock, log.open("ab") as file:
            if self.stopping:
                return None
            # A process group of its own: a terminal's ctrl-C would reach the child directly, in addition to our SIGINT.
            child = subprocess.Popen(
                [sys.executable, *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self._running.add(child)
        status = child.wait()
        with self._lock:
            self._running.discard(child)
        return status

    def stop(self) -> None:
        """Ask all children to save and end, and start no more."""
        with self._lock:
            self.stopping = True
            for child in self._running:
                child.send_signal(signal.SIGINT)


def run_all(runs: Sequence[PlannedRun], jobs: int) -> dict[PlannedRun, Outcome]:
    """Run what is pending of each run, ``jobs`` of them at a time; one that fails does not stop the others.

    Raises:
        KeyboardInterrupt: after those that were running have saved and ended.
    """
    children = Children()
    outcomes: dict[PlannedRun, Outcome] = {}
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[tuple[Outcome, float]], PlannedRun] = {}
        try:
            for run in runs:
                futures[pool.submit(_run, run, children)] = run
            for future in as_completed(futures):
                outcome, seconds = future.result()
                outcomes[futures[future]] = outcome
                left = len(runs) - len(outcomes)
                expected = (time.monotonic() - began) / len(outcomes) * left
                what = f"{outcome.value} {futures[future].name} after {seconds:.0f} s: {left} left"
                print(what + (f", about {_duration(expected)}\n" if left else "\n"), end="", flush=True)
        except BaseException:
            children.stop()
            print("stopping: the runs save what they have", file=sys.stderr, flush=True)
            raise
    return outcomes


def _run(run: PlannedRun, children: Children) -> tuple[Outcome, float]:
    """Run the pending commands of one run; how it ended, and the seconds that took."""
    if children.stopping:
        return Outcome.STOPPED, 0.0
    began = time.monotonic()
    print(f"started {run.name}\n", end="", flush=True)  # one write: threads would print between two
    make_folder(run.runs_dir)
    for command in pending(run):
        with run.log.open("a", encoding="utf-8") as file:
            file.write(f"{SHOWN}{run.shown(command)}\n")
        status = children.run(command, run.threads, run.log)
        if status is None or (status and children.stopping):
            return Outcome.STOPPED, time.monotonic() - began
        if status:
            return Outcome.FAILED, time.monotonic() - began
    return Outcome.DONE, time.monotonic() - began


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"
