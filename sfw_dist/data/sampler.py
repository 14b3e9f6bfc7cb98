"""Which sample goes where: the order of an epoch, the shares of the ranks, the validation split.

Everything random about data comes from :func:`counter_hash`, a pure function of integers. So an order, a split or an
augmentation depends neither on the world size, the backend or the number of threads, nor on what was drawn before
(a resumed run continues with the same batches), nor on the version of a library's generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sfw_dist.errors import UserError

Ids = NDArray[np.int64]
"""Sample ids: rows of the prepared training or test arrays."""


def counter_hash(*words: int | Ids) -> NDArray[np.uint64]:
    """64 random-looking bits from non-negative integers; arrays among the ``words`` broadcast.

    One round of splitmix64 a word (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    A round is a bijection of its state, so words do not commute: (1, 0) and (0, 1) give different bits.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        z = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return state


def epoch_order(n: int, seed: int, epoch: int) -> Ids:
    """The permutation of ``range(n)`` in which epoch ``epoch`` visits the samples."""
    return np.argsort(counter_hash(seed, epoch, np.arange(n)), kind="stable")


class Order(Protocol):
    """What one rank visits."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch of this rank; the last batch of an epoch may be shorter."""

    @property
    def samples(self) -> int:
        """Samples of this rank in an epoch."""

    def ids(self, epoch: int) -> Ids:
        """The sample ids of ``epoch``, in order."""


@dataclass(frozen=True)
class TrainingOrder:
    """Shuffled anew each epoch, cut into global batches, the last partial one dropped.

    Global batch b is ``permutation[b·B : (b+1)·B]``, and rank r of W takes every W-th of it from r on: N ranks together
    see in each step what one rank would. Raises :class:`UserError` when W does not divide B or the data has no
    whole batch.
    """

    members: Ids
    global_batch_size: int
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size:
            nearest = max(self.global_batch_size // self.world_size, 1) * self.world_size
            raise UserError(
                f"data.batch_size {self.global_batch_size} cannot be split over world size {self.world_size}: "
                f"write {nearest}, or start a number of ranks that divides {self.global_batch_size}"
            )
        if len(self.members) < self.global_batch_size:
            raise UserError(
                f"data.batch_size {self.global_batch_size} over world size {self.world_size} needs more than the "
                f"{len(self.members)} training samples: take a smaller batch and at most that many ranks"
            )

    @property
    def batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def samples(self) -> int:
        return len(self.members) // self.global_batch_size * self.batch_size

    def ids(self, epoch: int) -> Ids:
        permutation = self.members[epoch_order(len(self.members), self.seed, epoch)]
        # W divides B, so the rank's parts of the batches lie end to end in one slice.
        return permutation[self.rank :: self.world_size][: self.samples]


@dataclass(frozen=True)
class EvaluationOrder:
    """Over all ranks each sample exactly once, in the data's order and unpadded: ranks may differ by one sample.

    Raises :class:`UserError` when a rank would have nothing.
    """

    members: Ids
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if len(self.members) < self.world_size:
            raise UserError(
                f"world size {self.world_size} is larger than the {len(self.members)} samples to evaluate: "
                "start fewer ranks"
            )

    @property
    def samples(self) -> int:
        return len(self.ids(0))

    def ids(self, epoch: int) -> Ids:
        return self.members[self.rank :: self.world_size]


def split_validation(labels: Ids, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """Ascending ids ``(train, validation)``: of every class, ``fraction`` (rounded) of its samples are held out."""
    draw = counter_hash(seed, np.arange(len(labels)))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(draw[members], kind="stable")]
        held_out[shuffled[: int(fraction * len(members) + 0.5)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
