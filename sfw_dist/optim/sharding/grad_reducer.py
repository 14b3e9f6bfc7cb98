"""Reduces the gradients of DDP's buckets to their owners, while the backward pass is running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import ROW, tree_sum
from sfw_dist.optim.shard import Shard

_BUCKETS_AT_ONCE = 8

Allocate = Callable[[str, int, torch.dtype], Tensor]
"""A buffer by name, entries and type: the same one in every step."""


@dataclass(frozen=True)
class BucketGradients:
    """A bucket of DDP's, and the shards to which its gradients belong."""

    flat: Tensor
    """The bucket's memory."""
    shards: list[Shard]
    owners: list[int]
    gradients: list[Tensor]
    """One a shard, that of its whole tensor; views of ``flat``."""
    number: int
    """Of the bucket in the backward pass."""

    @classmethod
    def of(cls, bucket: dist.GradBucket, shards: Sequence[Shard], owners: Sequence[int]) -> BucketGradients:
        """The gradients of a bucket.

        Raises:
            UserError: a parameter to which none of the shards belongs.
        """
        gradients = {p: strided_as(p, g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        inside = [(shard, owner) for shard, owner in zip(shards, owners, strict=True) if shard.parameter in gradients]
        if len({shard.parameter for shard, _ in inside}) < len(gradients):
            raise UserError(
                "DDP reduces parameters that SFW does not have, or that were frozen at its last step: give it all of "
                "them, and after unfreezing call zero_grad() and step() before the next backward pass; or take no hook"
            )
        own, their_owners = [shard for shard, _ in inside], [owner for _, owner in inside]
        return cls(bucket.buffer(), own, their_owners, [gradients[shard.parameter] for shard in own], bucket.index())


def strided_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides it really has, its parameter's, while DDP presents it as contiguous."""
    if torch.empty_like(parameter).stride() != parameter.stride():  # with gaps or overlaps: DDP makes it contiguous
        return gradient
    return gradient.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())


def reduce_to_owners(
    bucket: BucketGradients, ranks: RankGroup, communication_dtype: torch.dtype | None, allocate: Allocate
) -> None:
    """Turn a bucket into the mean gradients of what this rank owns; collective.

    Elsewhere it becomes 0 but for one entry, the norm of what the other ranks have. Gradients are added in float32
    (float64 ones in float64) in a tree of adjacent ranks, so that equal ones have themselves for a mean on 2, 4, 8 …
    ranks.
    """
    if ranks.size == 1:
        return
    order = sorted(range(len(bucket.shards)), key=lambda i: bucket.owners[i])  # one owner's after another's
    shards, gradients = [bucket.shards[i] for i in order], [bucket.gradients[i] for i in order]
    owned = [bucket.owners[i] == ranks.rank for i in order]
    lengths = [0] * ranks.size
    for shard, i in zip(shards, order, strict=True):
        lengths[bucket.owners[i]] += shard.numel

    sent = allocate("sent", sum(lengths), communication_dtype or bucket.flat.dtype)
    for shard, gradient, part in zip(shards, gradients, sent.split([s.numel for s in shards]), strict=True):
        part.copy_(shard.entries(gradient))
    mean = _sum_at_owner(sent, lengths, ranks, shards[0].dtype, bucket.number, allocate).div_(ranks.size)

    bucket.flat.zero_()
    mine = [(shard, gradient) for shard, gradient, own in zip(shards, gradients, owned, strict=True) if own]
    for (shard, gradient), part in zip(mine, mean.split([shard.numel for shard, _ in mine]), strict=True):
        _write(shard, gradient, part)
    norms = _exchange_scalars(_squared_norm(mean), ranks, bucket.number)
    elsewhere = next((j for j, own in enumerate(owned) if not own), None)
    if elsewhere is not None:
        shard, gradient = shards[elsewhere], gradients[elsewhere]
        gradient[torch.unravel_index(torch.tensor(shard.start), gradient.shape)] = tree_sum(norms).sqrt().to(gradient)


def _squared_norm(x: Tensor) -> Tensor:
    """By rows, which no number of threads divides, added in their own order; float64."""
    whole = x.numel() // ROW * ROW
    rows = [x[:whole].view(-1, ROW), x[whole:].view(1, -1)]
    return tree_sum(torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square() for part in rows]))


def _sum_at_owner(
    sent: Tensor, lengths: list[int], ranks: RankGroup, dtype: torch.dtype, tag: int, allocate: Allocate
) -> Tensor:
    """The sum over the ranks of this rank's part of ``sent``, which has ``lengths[r]`` entries for rank r."""
    mine = lengths[ranks.rank]
    if dist.get_backend(ranks.group) == "nccl":
        total = allocate("total", mine, sent.dtype)
        dist.reduce_scatter(total, list(sent.split(lengths)), group=ranks.group)
        return total.to(dtype)
    # gloo's own reduce_scatter moves as much as an all_reduce. Here every entry crosses the network once; and in each
    # round every rank sends to a different one, because three that send to one at once take half as long again.
    parts = sent.split(lengths)
    arrived = allocate("arrived", ranks.size * mine, sent.dtype).view(ranks.size, mine)
    arrived[ranks.rank] = parts[ranks.rank]
    for distance in range(1, ranks.size):
        to, source = (ranks.rank + distance) % ranks.size, (ranks.rank - distance) % ranks.size
        _exchange(parts[to], to, arrived[source], source, ranks, 2 * tag)
    sums = arrived.to(dtype)
    step = 1
    while step < ranks.size:  # the tree of ops.pairwise_sum, in place
        for i in range(0, ranks.size - step, 2 * step):
            sums[i] += sums[i + step]
        step *= 2
    return sums[0]


def _exchange(sent: Tensor, to: int, received: Tensor, source: int, ranks: RankGroup, tag: int) -> None:
    """Send to one rank and receive from another; both sides know the lengths, and length 0 needs no message."""
    works = []
    if received.numel():
        works.append(dist.irecv(received.view(torch.uint8), group=ranks.group, group_src=source, tag=tag))
    if sent.numel():
        works.append(dist.isend(sent.view(torch.uint8), group=ranks.group, group_dst=to, tag=tag))
    for work in works:
        assert work is not None
        work.wait()


def _exchange_scalars(x: Tensor, ranks: RankGroup, tag: int) -> Tensor:
    """The other ranks' float64 scalars, by rank; 0 in this rank's place."""
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


def _write(shard: Shard, gradient: Tensor, entries: Tensor) -> None:
    if gradient.is_contiguous():
        shard.entries(gradient).copy_(entries)
    elif shard.is_whole:
        gradient.copy_(entries.view(gradient.shape))
    else:  # in another memory format a part of the tensor has no memory of its own
        rows = gradient.contiguous()
        shard.entries(rows).copy_(entries)
        gradient.copy_(rows)


class GradReducer:
    """Reduces buckets in threads and a process group of its own.

    Collectives run one after the other, in the order in which DDP gives the buckets, the same on every rank. With gloo
    the reduction is messages between pairs of ranks, and each bucket has a thread: a bucket whose tensors all belong to
    one rank leaves the other links to the next.
    """

    def __init__(self, ranks: RankGroup, device: torch.device) -> None:
        self._ranks = _own_group(ranks)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pairwise = ranks.size > 1 and dist.get_backend(ranks.group) == "gloo"
        # A new thread has as many OpenMP threads as there are cores, whatever the script has set.
        threads: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
        self._pool = ThreadPoolExecutor(_BUCKETS_AT_ONCE if pairwise else 1, "sfw-reduce", **threads)
        self._buffers: dict[tuple[int, str, torch.dtype], Tensor] = {}

    def reduce(self, bucket: BucketGradients, communication_dtype: torch.dtype | None) -> Future[Tensor]:
        """Start reducing a bucket; what DDP waits for is the reduced bucket."""
        device = bucket.flat.device
        reduced: Future[Tensor] = Future(devices=[device] if self._stream else None)
        ready = torch.cuda.current_stream(device).record_event() if self._stream else None

        @torch.no_grad()
        def run() -> None:
            with torch.cuda.stream(self._stream):  # without a stream this has no effect
                if self._stream and ready:
                    self._stream.wait_event(ready)
                try:
                    reduce_to_owners(bucket, self._ranks, communication_dtype, self._allocator(bucket))
                except Exception as error:
                    reduced.set_exception(error)  # type: ignore[arg-type]  # or DDP would wait for ever
                    raise
                reduced.set_result(bucket.flat)

        self._pool.submit(run)
        return reduced

    def _allocator(self, bucket: BucketGradients) -> Allocate:
        """Memory for a bucket, made once: new pages in every step would take as long as the sums."""

        def allocate(name: str, entries: int, dtype: torch.dtype) -> Tensor:
            key = (bucket.number, name, dtype)
            if key not in self._buffers or self._buffers[key].numel() != entries:
                self._buffers[key] = torch.empty(entries, dtype=dtype, device=bucket.flat.device)
            return self._buffers[key]

        return allocate


def _own_group(ranks: RankGroup) -> RankGroup:
    """On the script's own group others may send at the same time, in an order that differs between ranks."""
    if ranks.size == 1:
        return ranks
    members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
    group = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return RankGroup(group, ranks.rank, ranks.size)
