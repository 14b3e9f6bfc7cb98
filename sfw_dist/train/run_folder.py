"""A run's folder: its files, how they are written (never half), and the lock on it.

runs/<name>/config.yaml  data.json  environment.json  metrics.jsonl  heartbeat.json  tensorboard/
            checkpoints/  model.safetensors  prune/  report/
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sfw_dist.config import Config, first_difference, load_config, save_config
from sfw_dist.data.record import DataRecord
from sfw_dist.distributed.world import World, any_rank, barrier
from sfw_dist.errors import UserError
from sfw_dist.files import LockedError, file_lock, make_folder, replacing, write_json, write_text

_START = "pretrained_sha256"
_PACKAGES = ("sfw-dist", "torch", "torchvision", "timm", "numpy", "ffcv", "deepspeed", "submitit")


class RunFolder:
    """The files of one run. Only rank 0 writes, except for the shards of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.prune = path / "prune"
        self.weights = path / "model.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.submissions = path / "submissions"
        self.lock = path / ".lock"

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open the folder of a run that has begun.

        Raises:
            UserError: ``path`` is not a run's folder.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"{path} is not a run's folder (no config.yaml): train one with python -m sfw_dist.train")
        return folder

    def check_free_for(self, config: Config, resume: bool) -> None:
        """Check that a run with this configuration may be trained in the folder.

        Raises:
            UserError: the folder is not a run's, holds another configuration, or exists and ``resume`` is false.
        """
        if not self.path.exists():
            return
        foreign = not self.path.is_dir() or any(
            file not in (self.lock, self.submissions) for file in self.path.iterdir()
        )
        if foreign and not self.config.is_file():
            raise UserError(f"{self.path} exists and is not a run's folder: choose another --name or --runs_dir")
        if not self.config.is_file():
            return
        difference = first_difference(config, load_config(self.config))
        if difference:
            raise UserError(f"{self.path} holds another configuration ({difference}): choose another --name")
        if not resume:
            raise UserError(f"{self.path} exists: resume it with --resume auto, or choose another --name")

    def check_data(self, data: DataRecord) -> None:
        """Check that the run was trained on these data; nothing is known of a run of earlier versions.

        Raises:
            UserError: other data, with what differs.
        """
        before = self.data_record()
        if before and (difference := data.difference(before)):
            raise UserError(
                f"{self.path} was trained on other data ({difference}): give the folder of data set "
                f"{before.name!r} as it was, by --data.root (evaluate: --data-root), or train under another --name"
            )

    def data_record(self) -> DataRecord | None:
        """The data that the run is trained on, from data.json, or from model.safetensors if that was copied alone.

        Raises:
            UserError: the file is damaged.
        """
        try:
            if self.data.is_file():
                return DataRecord.from_json(self.data.read_bytes())
            if self.weights.is_file():
                with safe_open(self.weights, framework="pt") as file:
                    return DataRecord.from_metadata(file.metadata())
        except SafetensorError:
            return None  # load_weights tells it
        except ValueError as error:
            raise UserError(f"{self.data} is damaged ({error}): remove it, and the data are not compared") from None
        return None

    def check_same_start(self, config: Config) -> None:
        """Check that a run begins with the same weights as when its folder was made.

        Raises:
            UserError: the file of ``model.pretrained`` has changed.
        """
        recorded = json.loads(self.environment.read_text()).get(_START) if self.environment.is_file() else None
        if recorded and recorded != _start(config).get(_START):
            raise UserError(
                f"{config.model.pretrained} has changed since {self.path} began with it: choose another --name"
            )

    def create(self, config: Config, data: DataRecord) -> None:
        """Make the folder, and write config.yaml, data.json and environment.json; a resumed run keeps them."""
        make_folder(self.path)
        if not self.config.is_file():
            write_text(self.config, save_config(config))  # first: by this file the folder is known as a run's
            write_json(self.environment, environment() | _start(config))
        if not self.data.is_file():
            write_json(self.data, data.json())
        for folder in (self.checkpoints, self.prune, self.tensorboard):
            make_folder(folder)
        _drop_unfinished_line(self.metrics)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite}, allow_nan=False)
        with open(self.metrics, "a") as file:
            file.write(line + "\n")

    def beat(self, **values: Any) -> None:
        """Rewrite heartbeat.json, so that others can tell a slow run from a dead one."""
        write_json(self.path / "heartbeat.json", {"time": round(time.time(), 3), **values})

    def save_weights(self, state: dict[str, Tensor]) -> None:
        """Write model.safetensors: parameters and buffers by name; its metadata say what data they are for."""
        write_tensors(self.weights, state, self.data_record())

    def load_weights(self) -> dict[str, Tensor]:
        """Read model.safetensors.

        Raises:
            UserError: training has not ended, or the file is damaged.
        """
        if not self.weights.is_file():
            raise UserError(f"{self.path} has no model.safetensors: finish the training with --resume auto")
        try:
            return load_file(self.weights)
        except SafetensorError as error:
            raise UserError(f"{self.weights} cannot be read ({error}): remove it, train with --resume auto") from None

    def resume_command(self, config: Config, world_size: int) -> str:
        """Return the command line that resumes the run on as many ranks."""
        launcher = f"torchrun --nproc-per-node {world_size}" if world_size > 1 else "python"
        # config.yaml holds the engine that the run began with.
        engine = "" if load_config(self.config).engine == config.engine else f" --engine {config.engine}"
        return f"{launcher} -m sfw_dist.train --config {shlex.quote(str(self.config))}{engine} --resume auto"


@contextmanager
def exclusive_lock(run: RunFolder, world: World) -> Iterator[None]:
    """Hold the lock on a run's folder, so that no second process trains in it; collective.

    The lock ends with its process, however that ends.

    Raises:
        UserError: another process holds the lock; on every rank.
    """
    barrier(world)  # every rank has looked at the folder before rank 0 makes it
    taken = False
    with ExitStack() as held:
        if world.main:
            make_folder(run.path)
            try:
                held.enter_context(file_lock(run.lock, wait=False))
            except LockedError:
                taken = True
        if any_rank(taken, world):
            raise UserError(f"{run.path} is being trained by another process: wait for it, or choose another --name")
        yield


def write_tensors(path: Path, tensors: dict[str, Tensor], data: DataRecord | None) -> None:
    """Write a safetensors file, with the data that the network is for in its metadata.

    Each name is in the file with its own values, because safetensors refuses tensors that share memory.
    """
    stored, memory = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        address = whole.untyped_storage().data_ptr()
        stored[name] = whole.clone() if address in memory else whole
        memory.add(address)
    with replacing(path) as file:
        file.write(save(stored, data.metadata() if data else None))


def _start(config: Config) -> dict[str, str]:
    """What identifies the file that a run begins from, for environment.json; empty without one."""
    if not isinstance(config.model.pretrained, str):
        return {}
    with open(config.model.pretrained, "rb") as file:
        return {_START: hashlib.file_digest(file, "sha256").hexdigest()}


def _drop_unfinished_line(path: Path) -> None:
    """Cut off the unfinished last line that a killed process may have left, before more is appended."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


def environment() -> dict[str, Any]:
    """Return what a result depends on in addition to the configuration; no host names, no environment variables."""
    return {
        "command": [*_started_as(), *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor_cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        **_git_state(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _started_as() -> list[str]:
    """``python -m MODULE`` as it was typed, or the script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [Path(sys.argv[0]).name]
    return ["python", "-m", spec.name.removesuffix(".__main__")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """Of the checkout that this file is in; nothing when it is installed somewhere inside another repository."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(__file__).resolve().parents[2]:
        return {"git_commit": None, "git_dirty": None}
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
