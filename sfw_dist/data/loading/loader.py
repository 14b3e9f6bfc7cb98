"""Loaders: what a training loop iterates over; one class serves all backends, splits and world sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Protocol

import torch

from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.loading.backend import Backend, Batch
from sfw_dist.data.loading.prefetch import prefetch
from sfw_dist.data.sampler import Ids, Sampler
from sfw_dist.errors import RankError, UserError

_BLOCK = 1 << 14
"""Samples whose parameters are chosen together."""


class Loader(Protocol):
    """The batches of one rank, epoch by epoch."""

    description: str
    """The backend, for people: its name, the number of threads, and why it was chosen."""
    samples: int
    """Samples that this rank yields in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch; the caller may keep the tensors."""

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which decides order and augmentation."""

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "batch"}``: the epoch, and how many of its batches were yielded."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration continue at a saved place, without decoding the batches before it."""

    def close(self) -> None:
        """Release everything; the loader cannot be used afterwards."""


class ShardedLoader:
    """A :class:`Loader` that fetches the samples of a sampler from a backend.

    Iterating raises :class:`RankError`, which names the sample, for one that cannot be fetched and for a stall.

    Args:
        backend: where samples come from.
        sampler: which samples, and the size of a batch.
        sample_params: from ids and epoch to the parameters of their augmentation.
        name: from an id to what a message calls the sample.
        threads: how many prefetch; 0 for a backend that is not threaded.
        stall_timeout: seconds that the caller waits for one batch.
        pin_for: a GPU for which tensors are yielded in page-locked memory, so that copying does not block the host.
        description: of the backend, for people.
    """

    def __init__(
        self,
        backend: Backend,
        sampler: Sampler,
        *,
        sample_params: Callable[[Ids, int], SampleParams],
        name: Callable[[int], str],
        threads: int = 0,
        stall_timeout: float = 300.0,
        pin_for: torch.device | None = None,
        description: str = "",
    ) -> None:
        self._backend, self._sampler, self._sample_params, self._name = backend, sampler, sample_params, name
        self._threads, self._stall_timeout, self._pin_for = threads, stall_timeout, pin_for
        self.description, self.samples = description, sampler.samples
        self._closed = False
        self._epoch = 0
        self._yielded = 0  # batches of the epoch so far
        self._resume_at = 0  # where the next iteration starts

    def __len__(self) -> int:
        return -(-self.samples // self._sampler.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start = self._resume_at
        self._resume_at, self._yielded = 0, start
        jobs = self._jobs(self._sampler.ids(self._epoch)[start * self._sampler.batch_size :], self._epoch)
        batches = prefetch(self._fetch, jobs, threads=self._threads, stall_timeout=self._stall_timeout)
        with closing(batches):
            while not self._closed:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except TimeoutError as stall:
                    raise RankError(self._stall_error(stall.args[0][0])) from None
                self._yielded += 1
                yield batch
                del batch
        raise RuntimeError("the loader was closed while its epoch was being read")

    def _jobs(self, ids: Ids, epoch: int) -> Iterator[tuple[Ids, SampleParams]]:
        """The batches; parameters of many at once, which is fast, and not of all, which take 64 bytes a sample."""
        size = self._sampler.batch_size
        block = max(1, _BLOCK // size) * size
        for first in range(0, len(ids), block):
            some = ids[first : first + block]
            params = self._sample_params(some, epoch)
            for at in range(0, len(some), size):
                yield some[at : at + size], params[at : at + size]

    def _fetch(self, job: tuple[Ids, SampleParams]) -> Batch:
        ids, params = job
        try:
            images, labels = self._backend.fetch(ids, params)
        except Exception as error:
            raise RankError(self._fetch_error(ids, params, error)) from error
        if self._pin_for is None:
            return images, labels
        with torch.cuda.device(self._pin_for):  # a new thread would make every rank a context on the first GPU
            return images.pin_memory(), labels.pin_memory()

    def _fetch_error(self, ids: Ids, params: SampleParams, error: Exception) -> str:
        """The message for a batch that cannot be fetched: it names the first sample that fails alone."""
        for i in range(len(ids)):
            try:
                self._backend.fetch(ids[i : i + 1], params[i : i + 1])
            except Exception as alone:
                reason = " ".join(f"{type(alone).__name__}: {alone}".split())
                return f"{self._name(int(ids[i]))} cannot be loaded ({reason}): repair it and resume, or prepare again"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"a batch of {len(ids)} from {self._name(int(ids[0]))} on cannot be loaded ({reason}): resume"

    def _stall_error(self, ids: Ids) -> str:
        return (
            f"no batch for {self._stall_timeout:g} s while loading {len(ids)} samples from {self._name(int(ids[0]))} "
            f"on ({self.description}): see whether its file system hangs, or raise data.stall_timeout, and resume"
        )

    def set_epoch(self, epoch: int) -> None:
        """Start another epoch at its first batch; the same epoch keeps the place that ``load_state_dict`` set."""
        if epoch != self._epoch:
            self._epoch, self._yielded, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        epoch, batch = state["epoch"], state["batch"]
        if not 0 <= batch <= len(self):
            raise UserError(
                f"the saved loader stands at batch {batch} but an epoch has {len(self)} batches: "
                "resume with the data set and data.batch_size of the saved run"
            )
        self._epoch, self._yielded, self._resume_at = epoch, batch, batch

    def close(self) -> None:
        """Release everything; an iteration that has begun ends with RuntimeError at its next batch."""
        self._closed = True
        self._backend.close()
