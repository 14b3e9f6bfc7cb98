"""Reduces the gradients of DDP's buckets, to all ranks or to their owners, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sfw_dist.distributed.rank_group import Ranks
from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import ROW, tree_sum
from sfw_dist.optim.shard import Slot

_BUCKETS_AT_ONCE = 8

Room = Callable[[str, int, torch.dtype], Tensor]
"""A buffer by name, entries and type: the same one in every step."""


@dataclass(frozen=True)
class Received:
    """A bucket of gradients, and the slots they belong to."""

    flat: Tensor
    """The bucket's memory."""
    slots: list[Slot]
    owners: list[int]
    gradients: list[Tensor]
    """One a slot, that of its whole tensor; views of ``flat``."""
    number: int
    """Of the bucket in the backward pass."""

    @classmethod
    def of(
        cls, bucket: dist.GradBucket, slots: Sequence[Slot], owners: Sequence[int]
    ) -> tuple[tuple[int, ...], Received]:
        """A bucket of DDP's, and which of all slots are in it. Raises ``UserError`` where a parameter has none."""
        gradients = {p: strided_as(p, g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        indices = tuple(i for i, slot in enumerate(slots) if slot.parameter in gradients)
        if len({slots[i].parameter for i in indices}) < len(gradients):
            raise UserError("DDP reduces parameters that SFW does not have: give it all of them, or take no hook")
        own = [slots[i] for i in indices]
        views = [gradients[slot.parameter] for slot in own]
        return indices, cls(bucket.buffer(), own, [owners[i] for i in indices], views, bucket.index())


def strided_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides that it has there: its parameter's, while DDP shows it as contiguous."""
    if torch.empty_like(parameter).stride() != parameter.stride():  # with gaps or overlaps: DDP takes it contiguous
        return gradient
    return gradient.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())


@dataclass(frozen=True)
class Reduction:
    """How a bucket's gradients become means over the ranks, in the bucket's memory; collective."""

    to_owners: bool
    wire_type: torch.dtype | None = None

    def __call__(self, received: Received, ranks: Ranks, room: Room) -> None:
        if self.to_owners:
            _reduce_to_owners(received, ranks, self.wire_type, room)
        else:
            received.flat.div_(ranks.size)
            if ranks.size > 1:
                dist.all_reduce(received.flat, group=ranks.group)


def _reduce_to_owners(received: Received, ranks: Ranks, wire_type: torch.dtype | None, room: Room) -> None:
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

    sent = room("sent", sum(lengths), wire_type or received.flat.dtype)
    for slot, gradient, part in zip(slots, gradients, sent.split([s.format.n for s in slots]), strict=True):
        part.copy_(slot.entries(gradient))
    mean = _sum_at_owner(sent, lengths, ranks, slots[0].dtype, received.number, room).div_(ranks.size)

    received.flat.zero_()
    mine = [(slot, gradient) for slot, gradient, own in zip(slots, gradients, owned, strict=True) if own]
    for (slot, gradient), part in zip(mine, mean.split([slot.format.n for slot, _ in mine]), strict=True):
        _write(slot, gradient, part)
    norms = _tell_others(_squared_norm(mean), ranks, received.number)
    elsewhere = next((j for j, own in enumerate(owned) if not own), None)
    if elsewhere is not None:
        slot, gradient = slots[elsewhere], gradients[elsewhere]
        gradient[torch.unravel_index(torch.tensor(slot.start), gradient.shape)] = tree_sum(norms).sqrt().to(gradient)


def _squared_norm(x: Tensor) -> Tensor:
    """By rows, which no number of threads divides, and in their own order; float64."""
    whole = x.numel() // ROW * ROW
    rows = [x[:whole].view(-1, ROW), x[whole:].view(1, -1)]
    return tree_sum(torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square() for part in rows]))


def _sum_at_owner(sent: Tensor, lengths: list[int], ranks: Ranks, dtype: torch.dtype, tag: int, room: Room) -> Tensor:
    """The sum over the ranks of this rank's part of ``sent``, which has ``lengths[r]`` entries for rank r."""
    mine = lengths[ranks.rank]
    if dist.get_backend(ranks.group) == "nccl":
        total = room("total", mine, sent.dtype)
        dist.reduce_scatter(total, list(sent.split(lengths)), group=ranks.group)
        return total.to(dtype)
    # gloo's own reduce_scatter moves as much as an all_reduce. Here every entry crosses the wire once; and in a round
    # every rank sends to another one, for three that send to one at once take half as long again.
    parts = sent.split(lengths)
    arrived = room("arrived", ranks.size * mine, sent.dtype).view(ranks.size, mine)
    arrived[ranks.rank] = parts[ranks.rank]
    for distance in range(1, ranks.size):
        to, source = (ranks.rank + distance) % ranks.size, (ranks.rank - distance) % ranks.size
        _exchange(parts[to], to, arrived[source], source, ranks, 2 * tag)
    sums = arrived.to(dtype)
    step = 1
    while step < ranks.size:  # the tree of `reduction`, in place
        for i in range(0, ranks.size - step, 2 * step):
            sums[i] += sums[i + step]
        step *= 2
    return sums[0]


def _exchange(sent: Tensor, to: int, received: Tensor, source: int, ranks: Ranks, tag: int) -> None:
    """Send to one rank and receive from another; both sides know the lengths, and of length 0 there is no message."""
    works = []
    if received.numel():
        works.append(dist.irecv(received.view(torch.uint8), group=ranks.group, group_src=source, tag=tag))
    if sent.numel():
        works.append(dist.isend(sent.view(torch.uint8), group=ranks.group, group_dst=to, tag=tag))
    for work in works:
        assert work is not None
        work.wait()


def _tell_others(x: Tensor, ranks: Ranks, tag: int) -> Tensor:
    """The other ranks' float64 scalars, by rank; 0 at this one's place."""
    everyone = torch.zeros(ranks.size, dtype=torch.float64, device=x.device)
    if dist.get_backend(ranks.group) == "nccl":
        everyone[ranks.rank] = x
        dist.all_reduce(everyone, group=ranks.group)
        everyone[ranks.rank] = 0
        return everyone
    for distance in range(1, ranks.size):
        to, source = (ranks.rank + distance) % ranks.size, (ranks.rank - distance) % ranks.size
        _exchange(x.view(1), to, everyone[source : source + 1], source, ranks, 2 * tag + 1)
    return everyone


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
    """Reduces buckets, and does what follows from them, in threads and process groups of its own.

    What follows is done bucket after bucket, in the order in which DDP gives them, the same on every rank; so are
    reductions by collectives. Those to owners by gloo are messages between pairs of ranks, of which each bucket has a
    thread: one whose tensors all belong to one rank leaves the other links to the next.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._for_gradients, self.ranks = self._own_group(ranks), self._own_group(ranks)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pairwise = ranks.size > 1 and dist.get_backend(ranks.group) == "gloo"
        # A new thread has as many OpenMP threads as there are cores, whatever the script has set.
        threads: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
        self._one_by_one = ThreadPoolExecutor(1, "sfw-reduce", **threads)
        self._at_once = ThreadPoolExecutor(_BUCKETS_AT_ONCE, "sfw-exchange", **threads)
        self._buffers: dict[tuple[int, str, torch.dtype], Tensor] = {}
        self._following = ThreadPoolExecutor(1, "sfw-follow", **threads)

    @staticmethod
    def _own_group(ranks: Ranks) -> Ranks:
        """On the script's own group others may send meanwhile, in an order that is not the same on every rank."""
        if ranks.size == 1:
            return ranks
        members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
        group = dist.new_group(members, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return Ranks(group, ranks.rank, ranks.size)

    def run(
        self, received: Received, reduction: Reduction, then: Callable[[], None] | None
    ) -> tuple[Future[Tensor], Task[None]]:
        """Reduce a bucket, and go on with what follows from it.

        Returns:
            What DDP waits for, the reduced bucket; and the whole task.
        """
        device = received.flat.device
        reduced: Future[Tensor] = Future(devices=[device] if self._stream else None)
        ready = torch.cuda.current_stream(device).record_event() if self._stream else None

        @torch.no_grad()
        def reduce() -> None:
            with torch.cuda.stream(self._stream):  # no stream: no effect
                if self._stream and ready:
                    self._stream.wait_event(ready)
                try:
                    reduction(received, self._for_gradients, self._room_of(received))
                except Exception as error:
                    reduced.set_exception(error)  # type: ignore[arg-type]  # or DDP would wait for ever
                    raise
                reduced.set_result(received.flat)

        pool = self._at_once if self._pairwise and reduction.to_owners else self._one_by_one
        task = pool.submit(reduce)
        return reduced, task if then is None else self._following.submit(self._follow, task, then)

    def _room_of(self, received: Received) -> Room:
        """Memory for a bucket, made once: new pages in every step would take as long as the sums."""

        def room(name: str, entries: int, dtype: torch.dtype) -> Tensor:
            key = (received.number, name, dtype)
            if key not in self._buffers or self._buffers[key].numel() != entries:
                self._buffers[key] = torch.empty(entries, dtype=dtype, device=received.flat.device)
            return self._buffers[key]

        return room

    @torch.no_grad()
    def _follow(self, reduced: Task[None], then: Callable[[], None]) -> None:
        reduced.result()
        with torch.cuda.stream(self._stream):
            then()

    def finish(self, tasks: Sequence[Task[None]]) -> None:
        """Wait for tasks; an error of one is raised."""
        for task in tasks:
            task.result()
        if self._stream:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
