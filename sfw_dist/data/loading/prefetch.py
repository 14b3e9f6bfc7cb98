"""Batches made ahead of the training step, by threads, in order."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

Job = TypeVar("Job")
Made = TypeVar("Made")

# Beyond one batch a thread, so that a slow batch does not leave the others idle.
_SPARE = 2


def made_ahead(
    make: Callable[[Job], Made], jobs: Iterable[Job], *, threads: int, stall_timeout: float
) -> Generator[Made, None, None]:
    """``make(job)`` of each job, in their order; ``threads`` of them work ahead while the caller uses the last one.

    What ``make`` raises is raised here, when its turn comes. Closing the generator ends the threads. With 0 threads
    everything happens in the calling thread.

    Raises:
        TimeoutError: a job took longer than ``stall_timeout`` seconds after the caller began to wait for it. Its
            argument is the job. The stuck thread is left behind: it dies with the process.
    """
    if threads == 0:
        for job in jobs:
            yield make(job)
        return
    todo: queue.SimpleQueue[tuple[Job, Future[Made]] | None] = queue.SimpleQueue()
    # Daemons, unlike the threads of an executor: a read that hangs must not keep the interpreter from ending.
    workers = [threading.Thread(target=_work, args=(make, todo), daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    pending: deque[tuple[Job, Future[Made]]] = deque()
    stalled = False
    try:
        remaining = iter(jobs)
        while True:
            for job in islice(remaining, threads + _SPARE - len(pending)):
                pending.append((job, Future()))
                todo.put(pending[-1])
            if not pending:
                return
            job, future = pending.popleft()
            try:
                made = future.result(stall_timeout)
            except TimeoutError:
                stalled = not future.done()
                if stalled:
                    raise TimeoutError(job) from None
                made = future.result()  # it came at the last moment, or make itself raised TimeoutError
            del future  # else the batch would live until the next one
            yield made
            del made
    finally:
        for _, future in pending:
            future.cancel()
        for _ in workers:
            todo.put(None)
        if not stalled:
            for worker in workers:
                worker.join()


def _work(make: Callable[[Job], Made], todo: queue.SimpleQueue[tuple[Job, Future[Made]] | None]) -> None:
    while (item := todo.get()) is not None:
        job, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make(job))
            except BaseException as error:
                future.set_exception(error)
        del item, job, future


def loader_threads(requested: int, environment: Mapping[str, str] = os.environ) -> int:
    """Threads for one loader of this rank: ``requested``, or for 0 the rank's share of the cores; at most the latter's.

    The cores are those this process may run on, and under Slurm at most the task's ``--cpus-per-task``, shared by the
    ranks of the machine or, under Slurm, of the task.
    """
    cores = len(os.sched_getaffinity(0))
    sharing = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if "SLURM_CPUS_PER_TASK" in environment:
        cores = min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
        if environment.get("SLURM_NTASKS") == environment.get("WORLD_SIZE"):
            sharing = 1  # each rank is a task of its own
    share = max(cores // sharing, 1)
    return min(requested, share) if requested else share
