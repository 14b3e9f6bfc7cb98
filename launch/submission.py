"""A folder for each submission: what was submitted, from which code, and its jobs' ids."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from launch.slurm import ClusterConfig, JobRequest, submit
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder, write_json, write_text
from sfw_dist.pruning import PruningOptions
from sfw_dist.train.run_folder import RunFolder, environment

What = Literal["train", "prune", "collect"]


class Submission:
    """``RUN/submissions/<UTC time>_<what>/``: record.json, environment.json, diff.patch, done/, submitit's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record: dict[str, Any] = json.loads((folder / "record.json").read_text())

    @classmethod
    def new(cls, run: RunFolder, what: What, cluster: ClusterConfig, **record: Any) -> Submission:
        """Make a new folder: job ids may be reused, and submitit would read another job's files."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        names = (f"{stamp}_{what}{f'_{n}' if n else ''}" for n in range(1000))
        folder = next(run.submissions / name for name in names if not (run.submissions / name).exists())
        make_folder(folder / "done")
        write_json(folder / "environment.json", environment())
        write_text(folder / "diff.patch", _uncommitted())
        write_json(folder / "record.json", {"what": what, "cluster": asdict(cluster), "jobs": [], **record})
        return cls(folder)

    @property
    def what(self) -> What:
        what: What = self._record["what"]
        return what

    @property
    def cluster(self) -> ClusterConfig:
        return ClusterConfig(**self._record["cluster"])

    @property
    def jobs(self) -> list[str]:
        """A job id for each task; empty if the tasks ran without Slurm."""
        return list(self._record["jobs"])

    @property
    def tasks(self) -> list[list[float]]:
        """The sparsities of each task of a pruning array."""
        return [list(map(float, task)) for task in self._record.get("tasks", [])]

    def pruning_options(self, default: PruningOptions) -> PruningOptions:
        """How a pruning array prunes; what the record of an older array leaves open is the default's."""
        return PruningOptions.of_record(self._record, default)

    def submit(self, request: JobRequest, calls: Sequence[Callable[[], object]]) -> None:
        """Submit a job for each call to Slurm.

        Raises:
            UserError: Slurm refuses; the folder is then removed.
        """
        try:
            self._record["jobs"] = submit(self.folder, self.cluster, request, calls)
        except UserError:
            shutil.rmtree(self.folder)
            for parent in (self.folder.parent, self.folder.parent.parent):
                with contextlib.suppress(OSError):  # it is not empty
                    parent.rmdir()
            raise
        write_json(self.folder / "record.json", self._record)

    def finished(self, task: int) -> None:
        """Mark a task as complete; the task calls this at its end."""
        write_json(self.folder / "done" / f"{task}.json", {"time": time.time()})

    def is_finished(self, task: int) -> bool:
        return (self.folder / "done" / f"{task}.json").is_file()

    def log(self, task: int) -> Path:
        """Return the file with the task's messages."""
        if not self.jobs:
            return self.folder / f"task_{task}.log"
        return self.folder / f"{self.jobs[task]}_0_log.err"


def submissions(run: RunFolder, what: What | None = None) -> list[Submission]:
    """Return a run's submissions, oldest first.

    Args:
        run: the run's folder.
        what: only those of this kind; ``None`` for all.

    Raises:
        UserError: a submission cannot be read.
    """
    found = []
    for path in sorted(run.submissions.glob("*/record.json"), key=lambda p: (p.stat().st_ctime_ns, p.parent.name)):
        try:
            submission = Submission(path.parent)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): move {path.parent} away") from None
        if what in (None, submission.what):
            found.append(submission)
    return sorted(found, key=lambda submission: submission.folder.name)


def _uncommitted() -> str:
    """The difference of the working tree to its commit."""
    try:
        done = subprocess.run(["git", "diff", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
