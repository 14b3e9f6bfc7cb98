"""Which rank reads which samples: the permutation of an epoch, the ranks' shares, the validation split.

Everything random about data comes from :func:`counter_hash`, a pure function of integers. So a permutation, a split or
an augmentation depends neither on the world size, the backend or the number of threads, nor on earlier random numbers
(a resumed run continues with the same batches), nor on the version of a library's generator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sfw_dist.errors import UserError

Ids = NDArray[np.int64]
"""Sample ids: rows of the prepared training or test arrays."""
Identities = NDArray[np.uint64]
"""What samples are known by, wherever their rows are: hashes of file names or of pixels."""


def identity(content: bytes) -> int:
    """64 bits that stand for a file's name or an image's pixels.

    Example:
        >>> identity(b"cat/1.png") == identity(b"cat/1.png") != identity(b"cat/2.png")
        True
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def counter_hash(*words: int | Ids | Identities) -> NDArray[np.uint64]:
    """Hash non-negative integers to 64 random-looking bits.

    One round of splitmix64 for each word (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014). A round is a bijection of its state, so words do not commute: (1, 0) and (0, 1) give different bits.

    Args:
        words: integers, or arrays of them that broadcast with each other.

    Returns:
        An array of the broadcast shape; ``(1,)`` for integers alone.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        z = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return state


def epoch_permutation(n: int, seed: int, epoch: int) -> Ids:
    """The permutation of ``range(n)`` in which an epoch visits the samples."""
    return np.argsort(counter_hash(seed, epoch, np.arange(n)), kind="stable")


class Sampler(Protocol):
    """The samples that one rank reads."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch of this rank; the last batch of an epoch may be shorter."""

    @property
    def samples(self) -> int:
        """Samples of this rank in an epoch."""

    def ids(self, epoch: int) -> Ids:
        """The sample ids of ``epoch``, in the order in which they are read."""


@dataclass(frozen=True)
class TrainingSampler:
    """Shuffles every epoch and splits every global batch over the ranks; drops a last, partial global batch.

    Global batch b is ``permutation[b·B : (b+1)·B]``, and rank r of W takes every W-th sample of it, starting with the
    r-th: N ranks together read in each step what one rank would.

    Args:
        members: ids of the training samples.
        global_batch_size: samples of one step over all ranks.
        seed: of the permutations.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        UserError: the world size does not divide the global batch size, or there are fewer samples than one batch.

    Example:
        >>> [TrainingSampler(np.arange(9), 4, 0, rank, 2).ids(epoch=0).tolist() for rank in (0, 1)]
        [[0, 6, 5, 2], [1, 3, 4, 8]]
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
                f"{len(self.members)} training samples (without validation): take a smaller batch, as data.batch_size "
                f"{max(len(self.members) // 4 // self.world_size, 1) * self.world_size}, and start at most "
                f"{len(self.members)} ranks"
            )

    @property
    def batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def samples(self) -> int:
        return len(self.members) // self.global_batch_size * self.batch_size

    def ids(self, epoch: int) -> Ids:
        permutation = self.members[epoch_permutation(len(self.members), self.seed, epoch)]
        # W divides B, so the rank's parts of all batches are one strided slice.
        return permutation[self.rank :: self.world_size][: self.samples]


@dataclass(frozen=True)
class EvaluationSampler:
    """Splits the samples over the ranks without padding, so that each is read exactly once.

    The samples keep the order of the data. Ranks may differ by one sample.

    Args:
        members: ids of the samples to evaluate.
        batch_size: samples in a batch of this rank.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        UserError: there are fewer samples than ranks.
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


def split_validation(labels: Ids, fraction: float, seed: int, identities: Identities | None = None) -> tuple[Ids, Ids]:
    """Hold out a stratified part of the training samples.

    Args:
        labels: of all training samples, ``(n,)``.
        fraction: held out of every class, rounded to whole samples; in [0, 1). Above 0, every class of at least two
            samples has one to train on and one held out; of a single sample none is held out.
        seed: of the choice.
        identities: by which samples are chosen, ``(n,)``: samples that are added, removed or reordered move at most
            one other of their class for each. ``None``: by their rows, for a published set, which never changes.

    Returns:
        Ascending ids ``(train, validation)``.
    """
    ids: Ids = np.arange(len(labels))
    bits = counter_hash(seed, ids if identities is None else identities)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(bits[members], kind="stable")]
        count = int(fraction * len(members) + 0.5)
        if fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        held_out[shuffled[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
