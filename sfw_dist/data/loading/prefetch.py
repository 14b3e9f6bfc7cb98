"""Threads that make the next batches, in order, while the training step runs."""

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
Result = TypeVar("Result")

# Jobs in stock beyond one for each thread, so that a slow job does not leave the other threads idle.
_SPARE = 2


def prefetch(
    make: Callable[[Job], Result], jobs: Iterable[Job], *, threads: int, stall_timeout: float
) -> Generator[Result, None, None]:
    """Yield ``make(job)`` of each job in their order, made by threads that work ahead of the caller.

    What ``make`` raises is raised here when that job's turn comes. Closing the generator ends the threads.

    Args:
        make: called from several threads at once.
        jobs: taken a few at a time, in the caller's thread.
        threads: number of threads; with 0 every job is made in the caller's thread when it is asked for.
        stall_timeout: seconds that the caller waits for one result.

    Raises:
        TimeoutError: a result took longer than ``stall_timeout``. Its argument is the job. The stuck thread is left
            running: it ends with the process.

    Example:
        >>> list(prefetch(lambda job: job * job, range(4), threads=2, stall_timeout=60))
        [0, 1, 4, 9]
    """
    if threads == 0:
        for job in jobs:
            yield make(job)
        return
    submitted: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
    # Daemons, unlike the threads of an executor: a read that hangs must not keep the interpreter from ending.
    workers = [threading.Thread(target=_work, args=(make, submitted), daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    pending: deque[tuple[Job, Future[Result]]] = deque()
    stalled = False
    try:
        remaining = iter(jobs)
        while True:
            for job in islice(remaining, threads + _SPARE - len(pending)):
                pending.append((job, Future()))
                submitted.put(pending[-1])
            if not pending:
                return
            job, future = pending.popleft()
            try:
                result = future.result(stall_timeout)
            except TimeoutError:
                stalled = not future.done()
                if stalled:
                    raise TimeoutError(job) from None
                result = future.result()  # it came at the last moment, or make itself raised TimeoutError
            del future  # else the batch would live until the next one
            yield result
            del result
    finally:
        for _, future in pending:
            future.cancel()
        for _ in workers:
            submitted.put(None)
        if not stalled:
            for worker in workers:
                worker.join()


def _work(make: Callable[[Job], Result], submitted: queue.SimpleQueue[tuple[Job, Future[Result]] | None]) -> None:
    while (item := submitted.get()) is not None:
        job, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make(job))
            except BaseException as error:
                future.set_exception(error)
        del item, job, future


def loader_threads(requested: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of threads for one loader of this rank: at most the rank's share of the cores.

    The cores are those that this process may run on, and under Slurm at most the task's ``--cpus-per-task``. They are
    shared by the ranks of the machine or, under Slurm, of the task.

    Args:
        requested: wanted number of threads; 0 for the whole share.
        environment: variables that torchrun and Slurm set.
    """
    cores = len(os.sched_getaffinity(0))
    sharing = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if "SLURM_CPUS_PER_TASK" in environment:
        cores = min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
        if environment.get("SLURM_NTASKS") == environment.get("WORLD_SIZE"):
            sharing = 1  # each rank is a task of its own
    share = max(cores // sharing, 1)
    return min(requested, share) if requested else share
