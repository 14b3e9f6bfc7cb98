"""Loaders: what a training loop iterates over, one class for every backend, split and world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Protocol

import torch

from sfw_dist.data.loading.augment import Draws
from sfw_dist.data.loading.backend import Backend, Batch
from sfw_dist.data.loading.prefetch import made_ahead
from sfw_dist.data.sampler import Ids, Order
from sfw_dist.errors import RankError, UserError


class Loader(Protocol):
    """The batches of one rank, epoch by epoch."""

    description: str
    """The backend, for people: its name, its threads, and why it was chosen."""
    samples: int
    """Samples that this rank yields in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch; the caller may keep the tensors."""

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which decides order and augmentation."""

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "batch"}``: the epoch, and how many of its batches have been yielded."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration continues there, without decoding what came before."""

    def close(self) -> None:
        """Release everything; the loader cannot be used afterwards."""


class ShardedLoader:
    """A :class:`Loader`: the ids of an order, drawn for, and fetched by a backend.

    Args:
        backend: where samples come from.
        order: which samples, and the size of a batch.
        draw: from ids and epoch to the augmentation's draws.
        name: from an id to what a message calls the sample.
        threads: how many fetch ahead; 0 for a backend that is not threaded.
        stall_timeout: seconds after which a batch that does not come is an error.
        pin_for: a GPU for which tensors are yielded in page-locked memory, from which it copies without the host.

    Iterating raises :class:`RankError` for a sample that cannot be fetched, by name, and for a stall.
    """

    def __init__(
        self,
        backend: Backend,
        order: Order,
        *,
        draw: Callable[[Ids, int], Draws],
        name: Callable[[int], str],
        threads: int = 0,
        stall_timeout: float = 300.0,
        pin_for: torch.device | None = None,
        description: str = "",
    ) -> None:
        self._backend, self._order, self._draw, self._name = backend, order, draw, name
        self._threads, self._stall_timeout, self._pin_for = threads, stall_timeout, pin_for
        self.description, self.samples = description, order.samples
        self._closed = False
        self._epoch = 0
        self._yielded = 0  # batches of the epoch so far
        self._resume_at = 0  # where the next iteration starts

    def __len__(self) -> int:
        return -(-self.samples // self._order.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size, start = self._order.batch_size, self._resume_at
        self._resume_at, self._yielded = 0, start
        ids = self._order.ids(self._epoch)[start * size :]
        draws = self._draw(ids, self._epoch)
        jobs = ((ids[at : at + size], draws[at : at + size]) for at in range(0, len(ids), size))
        batches = made_ahead(self._fetch, jobs, threads=self._threads, stall_timeout=self._stall_timeout)
        with closing(batches):
            while not self._closed:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except TimeoutError as stall:
                    raise RankError(self._stalled(stall.args[0][0])) from None
                self._yielded += 1
                yield batch
                del batch
        raise RuntimeError("the loader was closed while its epoch was being read")

    def _fetch(self, job: tuple[Ids, Draws]) -> Batch:
        ids, draws = job
        try:
            images, labels = self._backend.fetch(ids, draws)
        except Exception as error:
            raise RankError(self._unfetched(ids, draws, error)) from error
        if self._pin_for is None:
            return images, labels
        with torch.cuda.device(self._pin_for):  # a new thread would make every rank a context on the first GPU
            return images.pin_memory(), labels.pin_memory()

    def _unfetched(self, ids: Ids, draws: Draws, error: Exception) -> str:
        """Name the sample: the first that fails alone."""
        for i in range(len(ids)):
            try:
                self._backend.fetch(ids[i : i + 1], draws[i : i + 1])
            except Exception as alone:
                reason = " ".join(f"{type(alone).__name__}: {alone}".split())
                return f"{self._name(int(ids[i]))} cannot be loaded ({reason}): mend it and resume, or prepare again"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"a batch of {len(ids)} from {self._name(int(ids[0]))} on cannot be loaded ({reason}): resume"

    def _stalled(self, ids: Ids) -> str:
        return (
            f"no batch for {self._stall_timeout:g} s while loading {len(ids)} samples from {self._name(int(ids[0]))} "
            f"on ({self.description}): see whether its file system hangs, or raise data.stall_timeout, and resume"
        )

    def set_epoch(self, epoch: int) -> None:
        """Another epoch starts at its first batch; the same one keeps the place that ``load_state_dict`` set."""
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
        """An iteration under way ends with RuntimeError at its next batch."""
        self._closed = True
        self._backend.close()
