"""Runs a function on several real processes that gloo joins, as torchrun would.

A new process takes 5 s to import torch and what its optimizers import. Here one server does, once, and the ranks are
forked from it: it has a single thread and has computed nothing, which is when a fork of torch is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each of ``world_size`` ranks, by rank.

    Args:
        function: of a module's top level, for each rank imports it; it returns tensors and plain values.
        arguments: plain values.
        timeout: seconds after which the ranks are killed; a guard against a hang, not a measurement.

    Raises:
        RuntimeError: a rank raised, with its number and traceback; of several the first, for it takes the others along.
        torch.multiprocessing.ProcessExitedException: a rank ended by a signal.
        TimeoutError: the ranks were not done in time.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank,
            (function, world_size, folder, timeout, arguments),
            world_size,
            join=False,
            start_method="forkserver",
        )
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__name__} took more than {timeout:.0f} s on {world_size} ranks")
        except mp.ProcessRaisedException as error:
            first = min(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(f"rank {first.stem} of {world_size} raised\n{first.read_text()}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, timeout: float, arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(rank, *arguments), Path(folder, f"{rank}.pt"))
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def error_of(kind: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    """The message of the error that must come."""
    try:
        function(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function.__name__} raised no {kind.__name__}")
