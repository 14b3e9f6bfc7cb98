"""Loss and accuracy over a data set, exact at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfw_dist.distributed.world import World, max_over_ranks, sum_over_ranks
from sfw_dist.pruning.measuring.tallies import ClassificationTally


class Batches(Protocol):
    """A loader: pairs of images and labels, and how many there are."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Metrics:
    """Means over ``samples``: top-1 and top-5 accuracy as fractions, cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    samples: int


class Tally(ClassificationTally):
    """Sums of loss and hits, kept on the device in float64; nothing waits for the host until :meth:`total`."""

    def total(self, world: World) -> Metrics:
        """Return the means over all ranks' samples; collective."""
        top1, top5, loss, samples = sum_over_ranks(self.sums.clone(), world).tolist()
        return Metrics(top1 / samples, top5 / samples, loss / samples, int(samples))


def measure(forward: Callable[[Tensor], Tensor], loader: Batches, world: World, *, lockstep: bool = False) -> Metrics:
    """Measure loss and accuracy over a loader; collective at its end.

    Args:
        forward: from uint8 images ``(batch, channels, height, width)`` to logits ``(batch, classes)``.
        loader: this rank's images and labels.
        world: the ranks over which the metrics are taken.
        lockstep: whether each call of ``forward`` is collective. A rank with fewer batches than others then makes
            additional passes that do not count.
    """
    tally = Tally(world.device)
    passes = max_over_ranks(len(loader), world) if lockstep else 0
    filler = torch.empty(0)
    for images, labels in loader:
        images = images.to(world.device, non_blocking=True)
        tally.add(forward(images), labels.to(world.device, non_blocking=True))
        filler = images[:1]
    for _ in range(passes - len(loader)):
        forward(filler)
    return tally.total(world)
