"""Reduces the gradients of DDP's buckets, to all ranks or to their owners, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sfw_dist.batch import Ranks
from sfw_dist.reduction import squared_norm, tree_sum
from sfw_dist.step import Slot


@dataclass(frozen=True)
class Received:
    """A bucket of gradients, and the slots they belong to."""

    flat: Tensor
    """The bucket's memory."""
    slots: list[Slot]
    owners: list[int]
    gradients: list[Tensor]
    """One a slot, that of its whole tensor; views of ``flat``."""


def strided_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides that it has there: its parameter's, while DDP shows it as contiguous."""
    if torch.empty_like(parameter).stride() != parameter.stride():  # with gaps or overlaps: DDP takes it contiguous
        return gradient
    return gradient.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())


Reduce = Callable[[Received, Ranks], None]
"""Puts the mean over the ranks into the bucket's memory, in place; collective."""


def all_reduced(received: Received, ranks: Ranks) -> None:
    """The mean gradients on all ranks."""
    received.flat.div_(ranks.size)
    if ranks.size > 1:
        dist.all_reduce(received.flat, group=ranks.group)


def reduced_to_owner(received: Received, ranks: Ranks, wire_type: torch.dtype | None = None) -> None:
    """The mean gradients with their owners; elsewhere 0 and, in one entry, the norm of what the others have.

    Gradients are added in float32 (float64 ones in float64) in a tree of adjacent ranks, so that equal ones have
    themselves for a mean on 2, 4, 8 … ranks.
    """
    if ranks.size == 1:
        return
    order = sorted(range(len(received.slots)), key=lambda i: received.owners[i])  # one owner's after another's
    slots, gradients = [received.slots[i] for i in order], [received.gradients[i] for i in order]
    owned = [received.owners[i] == ranks.rank for i in order]
    lengths = [0] * ranks.size
    for slot, i in zip(slots, order, strict=True):
        lengths[received.owners[i]] += slot.format.n

    sent = torch.empty(sum(lengths), dtype=wire_type or received.flat.dtype, device=received.flat.device)
    for slot, gradient, part in zip(slots, gradients, sent.split([s.format.n for s in slots]), strict=True):
        part.copy_(slot.entries(gradient))
    mean = _sum_at_owner(sent, lengths, ranks, slots[0].dtype) / ranks.size

    received.flat.zero_()
    mine = [(slot, gradient) for slot, gradient, own in zip(slots, gradients, owned, strict=True) if own]
    for (slot, gradient), part in zip(mine, mean.split([slot.format.n for slot, _ in mine]), strict=True):
        _write(slot, gradient, part)
    norms = torch.zeros(ranks.size, dtype=torch.float64, device=sent.device)
    norms[ranks.rank] = squared_norm(mean)
    dist.all_reduce(norms, group=ranks.group)
    norms[ranks.rank] = 0
    elsewhere = next((j for j, own in enumerate(owned) if not own), None)
    if elsewhere is not None:
        slot, gradient = slots[elsewhere], gradients[elsewhere]
        gradient[torch.unravel_index(torch.tensor(slot.start), gradient.shape)] = tree_sum(norms).sqrt().to(gradient)


def _sum_at_owner(sent: Tensor, lengths: list[int], ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """The sum over the ranks of this rank's part of ``sent``, which has ``lengths[r]`` entries for rank r."""
    mine = lengths[ranks.rank]
    if dist.get_backend(ranks.group) == "nccl":
        total = torch.empty(mine, dtype=sent.dtype, device=sent.device)
        dist.reduce_scatter(total, list(sent.split(lengths)), group=ranks.group)
        return total.to(dtype)
    # gloo's own reduce_scatter moves as much as an all_reduce; here every entry crosses the wire once.
    arrived = torch.empty(ranks.size * mine, dtype=sent.dtype, device=sent.device)
    size = sent.element_size()
    dist.all_to_all_single(
        arrived.view(torch.uint8),
        sent.view(torch.uint8),
        [size * mine] * ranks.size,
        [size * length for length in lengths],
        group=ranks.group,
    )
    parts = arrived.view(ranks.size, mine).to(dtype)
    step = 1
    while step < ranks.size:  # the tree of `reduction`, in place
        for i in range(0, ranks.size - step, 2 * step):
            parts[i] += parts[i + step]
        step *= 2
    return parts[0]


def _write(slot: Slot, gradient: Tensor, entries: Tensor) -> None:
    if gradient.is_contiguous():
        slot.entries(gradient).copy_(entries)
    elif slot.whole:
        gradient.copy_(entries.view(gradient.shape))
    else:  # in another memory format a part of the tensor has no memory of its own
        rows = gradient.contiguous()
        slot.entries(rows).copy_(entries)
        gradient.copy_(rows)


class Reducer:
    """Works on bucket after bucket, in a thread and a process group of its own, in the order in which DDP gives them.

    On the script's own group others may send meanwhile, in an order that is not the same on every rank.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        if ranks.size > 1:
            members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
            group = dist.new_group(members, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self.ranks = Ranks(group, ranks.rank, ranks.size)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new thread has as many OpenMP threads as there are cores, whatever the script has set.
        self._thread = ThreadPoolExecutor(1, "sfw-reducer", torch.set_num_threads, (torch.get_num_threads(),))

    def run(
        self, received: Received, reduce: Reduce, then: Callable[[Ranks], None] | None
    ) -> tuple[Future[Tensor], Task[None]]:
        """Reduce a bucket, and go on with what follows from it.

        Returns:
            What DDP waits for, the reduced bucket; and the whole task.
        """
        device = received.flat.device
        reduced: Future[Tensor] = Future(devices=[device] if self._stream else None)
        ready = torch.cuda.current_stream(device).record_event() if self._stream else None

        @torch.no_grad()
        def work() -> None:
            with torch.cuda.stream(self._stream):  # no stream: no effect
                if self._stream and ready:
                    self._stream.wait_event(ready)
                try:
                    reduce(received, self.ranks)
                except Exception as error:
                    reduced.set_exception(error)  # type: ignore[arg-type]  # or DDP would wait for ever
                    raise
                reduced.set_result(received.flat)
                if then is not None:
                    then(self.ranks)

        return reduced, self._thread.submit(work)

    def finish(self, tasks: Sequence[Task[None]]) -> None:
        """Wait for tasks; an error of one is raised."""
        for task in tasks:
            task.result()
        if self._stream:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
