"""Checkpoints: tensors by name through torch.distributed.checkpoint, the rest as JSON; each complete or absent.

    checkpoints/epoch_0007.step_000123/   *.distcp, .metadata   tensors, written by all ranks
                                          state.json            epoch, step, schedule, …
                latest  best              text files that hold a checkpoint's name

A checkpoint is written under a name that begins with a dot and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from sfw_dist.distributed.world import World, barrier
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder, write_json, write_text

_NAME = re.compile(r"epoch_\d{4,}\.step_\d{6,}")
_STATE = "state.json"


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    world: World,
    *,
    epoch: int,
    step: int,
    best: bool = False,
) -> Path:
    """Write one checkpoint and point ``latest`` at it; collective.

    Args:
        folder: the run's ``checkpoints``.
        tensors: by name; those that several ranks hold are written once.
        state: plain values for JSON, taken from rank 0.
        epoch: epochs trained.
        step: steps taken.
        best: whether to point ``best`` at it, too.

    Returns:
        The checkpoint's folder.
    """
    path = folder / f"epoch_{epoch:04d}.step_{step:06d}"
    writing = folder / f".{path.name}"
    if world.main:
        for leftover in (*folder.glob(".epoch_*"), path):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(writing)
    barrier(world)
    with _one_process_is_fine():
        dcp.save({name: t.detach() for name, t in tensors.items()}, storage_writer=dcp.FileSystemWriter(writing))
    if world.main:
        write_json(writing / _STATE, state)
        writing.rename(path)
        _sync(folder)
        if best:
            point(folder, "best", path)
        point(folder, "latest", path)
    barrier(world)
    return path


def point(folder: Path, pointer: str, target: Path) -> None:
    """Let ``latest`` or ``best`` name a checkpoint."""
    write_text(folder / pointer, target.name + "\n")


def keep_newest(folder: Path, count: int) -> None:
    """Remove all checkpoints but the ``count`` newest and the best one."""
    best = pointed(folder, "best")
    for path in _complete(folder)[:-count]:
        if path != best:
            shutil.rmtree(path)


def pointed(folder: Path, pointer: str) -> Path | None:
    """Return the complete checkpoint that ``latest`` or ``best`` names, if there is one."""
    file = folder / pointer
    path = folder / file.read_text().strip() if file.is_file() else None
    return path if path in _complete(folder) else None


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, whether or not ``latest`` names it already."""
    return next(reversed(_complete(folder)), None)


def _complete(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    found = [path for path in folder.glob("epoch_*") if _NAME.fullmatch(path.name) and (path / _STATE).is_file()]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def allocate_on_cpu(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Allocate whole tensors in this process's memory."""
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in stored.items()}


def load(
    path: Path, allocate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = allocate_on_cpu
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: the checkpoint.
        allocate: from the stored shapes and types, as tensors on the meta device, to the tensors that are read into:
            whole ones, or DTensors, of which each rank reads only its shard. It may raise :class:`UserError`.

    Returns:
        The tensors by name, and the state that :func:`save` was given.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    reader = _Reader(path)
    try:
        state = json.loads((path / _STATE).read_text())
        stored = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        tensors = allocate(stored)
        with _one_process_is_fine():
            # No planning between ranks: each knows which tensors it needs, and reads those.
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except UserError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged pickle raises almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "remove it to resume from an older one"
        raise UserError(f"the checkpoint {path} cannot be read ({reason}): {remedy}") from None
    return tensors, state


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence torch's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _Reader(dcp.FileSystemReader):
    """Reads metadata with an unpickler that knows the checkpoint's own classes only: a pickle may name any code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint of sfw_dist does")


def _enum_member(owner: object, name: str) -> Enum:
    """A getattr for members of enums only: Python 3.11.2, Debian's, pickles them by getattr."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError("it refers to builtins.getattr, which no checkpoint of sfw_dist does")
    return owner[name]


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
