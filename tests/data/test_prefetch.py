"""Batches made ahead: order, errors, stalls, what is left behind, and how many threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from sfw_dist.data.loading.prefetch import loader_threads, prefetch


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads: int) -> None:
    """A fast batch overtakes a slow one."""
    release = [threading.Event() for _ in range(50)]

    def make(job: int) -> int:
        if threads > 1 and job % 2 == 0 and job + 1 < 50:
            assert release[job + 1].wait(30)  # the next one is done first
        release[job].set()
        return job * job

    assert list(prefetch(make, range(50), threads=threads, stall_timeout=60)) == [n * n for n in range(50)]


def test_no_more_is_made_than_a_few_ahead() -> None:
    """The whole epoch is decoded into memory while the first step runs."""
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(1000):
            taken.append(job)
            yield job

    made = prefetch(lambda job: job, jobs(), threads=2, stall_timeout=60)
    with closing(made):
        assert [next(made) for _ in range(10)] == list(range(10))
        assert len(taken) == 13  # the ten, and one a thread and two in stock less the one just used


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_at_its_turn(threads: int) -> None:
    """The training loop waits for ever for a batch whose thread has died, or loses the batches before it."""

    def make(job: int) -> int:
        if job == 5:
            raise KeyError("five")
        return job

    made = prefetch(make, range(10), threads=threads, stall_timeout=60)
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="five"):
        next(made)
    with pytest.raises(StopIteration):
        next(made)


def test_a_timeout_of_the_job_itself_is_no_stall() -> None:
    """A TimeoutError of the file system is reported as a stall, after no wait at all."""

    def make(job: int) -> int:
        raise TimeoutError("the server said so")

    with pytest.raises(TimeoutError, match="the server said so"):
        list(prefetch(make, range(3), threads=2, stall_timeout=60))


def test_a_stall_is_told_with_its_job_and_does_not_wait_for_the_thread() -> None:
    """A file system that hangs: the run waits for ever, and so does the interpreter at its end."""
    hang = threading.Event()
    try:
        made = prefetch(lambda job: hang.wait(), ["first"], threads=1, stall_timeout=0.01)
        with pytest.raises(TimeoutError) as error:
            next(made)
        assert error.value.args == ("first",)
        assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    finally:
        hang.set()


def test_leaving_early_two_hundred_times_leaves_no_thread() -> None:
    """A thread for every epoch left."""
    before = set(threading.enumerate())
    for epoch in range(200):
        made = prefetch(lambda job: job, range(100), threads=3, stall_timeout=60)
        with closing(made):
            for number in made:
                if number == epoch % 20:
                    break
    assert not set(threading.enumerate()) - before


SHARES = [
    ({}, 8),
    ({"LOCAL_WORLD_SIZE": "4"}, 2),
    ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ({"SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 2),
    ({"SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "3", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 6),
    ({"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS": "1"}, 4),
]


@pytest.mark.parametrize(("environment", "share"), SHARES)
def test_threads_are_shared_by_local_ranks(
    environment: dict[str, str], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight ranks on a node each start as many threads as it has cores, or more than Slurm gave the task."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert loader_threads(0, environment) == share
    assert loader_threads(1, environment) == 1
    assert loader_threads(100, environment) == share
