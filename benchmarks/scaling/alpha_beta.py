"""What messages between ranks cost on paper: α seconds a message and β seconds a byte, for each kind of link.

    node 0  GPU ═ GPU ═ … ═ GPU          ═  inside: a link between two GPUs of a node
                │ between                │  between: a node's links to the network, all of them together
    node 1  GPU ═ GPU ═ … ═ GPU

A collective over W ranks with n bytes (of the whole tensor, as every rank has it before or after):

    ring all-gather, reduce-scatter     (W−1)·α +   (W−1)/W·n·β     each rank passes on all but its own part, once
    ring all-reduce                   2·(W−1)·α + 2·(W−1)/W·n·β     a reduce-scatter and an all-gather
    tree all-reduce                 2·⌈log2 W⌉·α + 2·(W−1)/W·n·β    up to a root and down again; two trees, in which a
                                                                    rank is a leaf in one and an inner node in the
                                                                    other, take half each: no link carries more

NCCL takes a ring for large tensors and the tree for small ones: here the cheaper of the two, for all-reduces only. gloo
has rings. A ring goes through a node's GPUs before it goes to the next node, so of W hops in a circle as many leave a
node as there are nodes, and the others stay inside; bytes flow through all links at once, the slowest sets the pace. A
tree first goes along the GPUs of a node, then between nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FRAMES = 1514 / 1448
"""Bytes on an Ethernet link for one of a TCP stream: headers of 66 bytes for each 1,448 in a frame."""


@dataclass(frozen=True)
class Link:
    """Seconds a message and seconds a byte; a link that was idle lets ``burst`` bytes pass at once."""

    alpha: float
    beta: float
    burst: float = 0.0

    @classmethod
    def of_gbit(cls, alpha: float, gbit: float, burst: float = 0.0, overhead: float = 1.0) -> Link:
        return cls(alpha, 8 * overhead / (1e9 * gbit), burst)


@dataclass(frozen=True)
class Device:
    """What a rank computes with."""

    flops: float
    """Floating-point operations a second, at best."""
    bandwidth: float
    """Bytes of memory a second that the optimizer's passes reach."""
    answer_bytes: float
    """Memory traffic of a constrained entry for momentum, LMO and step size, with its owner."""
    divided_bytes: float
    """The same and the update, of tensors that lie with several ranks: torch's operations, one after the other."""
    move_bytes: float = 8.14
    """θ in and out, bitmap and signs in."""
    sgd_bytes: float = 20.0
    """Momentum SGD: g in, m and θ in and out."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices and the links that join them."""

    name: str
    per_node: int
    inside: Link
    between: Link
    device: Device
    backend: str = "nccl"
    """Which algorithms: ``nccl``, or ``gloo``, whose reduce-scatter moves what an all-reduce moves."""
    launch: float = 0.0
    """Seconds to start a collective."""
    copy: float = 0.0
    """Seconds a byte that gloo takes to copy what an all-gather or reduce-scatter sends; its all-reduce copies while it
    sends."""
    two_way: float = 1.0
    """How many times as long two ranks of gloo take that send each other much at once, over one connection."""
    cores: float = math.inf
    """Shared by all ranks: with more ranks than cores (the measured network) each takes as much longer."""

    def group(self, ranks: int) -> Group:
        """All ``ranks``, on as few nodes as hold them."""
        local = min(ranks, self.per_node)
        return Group(local, -(-ranks // local))

    def contention(self, ranks: int) -> float:
        """How many times as long a rank's computing takes while the other ranks compute, too."""
        return max(1.0, ranks / self.cores)


@dataclass(frozen=True)
class Group:
    """Ranks that exchange messages: ``local`` of them on each of ``nodes`` nodes."""

    local: int
    nodes: int
    sharing: int = 1
    """So many such groups send at once over a node's links."""

    @property
    def size(self) -> int:
        return self.local * self.nodes


@dataclass(frozen=True)
class Cost:
    """Seconds until the last rank is done, and bytes that a rank sends."""

    seconds: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.sent + other.sent)

    def __mul__(self, times: float) -> Cost:
        return Cost(times * self.seconds, times * self.sent)


NOTHING = Cost()


def all_gather(cluster: Cluster, group: Group, nbytes: float) -> Cost:
    """``nbytes`` of the gathered tensor."""
    ring = _ring(cluster, group, nbytes, rounds=1)
    slower = cluster.two_way if group.size == 2 else 1.0
    seconds = ring.seconds + (slower - 1) * _transfer(cluster, group, ring.sent) + cluster.copy * ring.sent
    return Cost(seconds, ring.sent)


def reduce_scatter(cluster: Cluster, group: Group, nbytes: float) -> Cost:
    """``nbytes`` of the tensor before it is scattered."""
    ring = _ring(cluster, group, nbytes, rounds=2 if cluster.backend == "gloo" else 1)
    return Cost(ring.seconds + cluster.copy * ring.sent, ring.sent)


def all_reduce(cluster: Cluster, group: Group, nbytes: float) -> Cost:
    """``nbytes`` of the tensor that every rank has."""
    ring = _ring(cluster, group, nbytes, rounds=2)
    if cluster.backend == "gloo" or group.size == 1:
        return ring
    hops = 2 * (group.local - 1), 2 * math.ceil(math.log2(group.nodes))
    latency = hops[0] * cluster.inside.alpha + hops[1] * cluster.between.alpha
    tree = Cost(cluster.launch + latency + _transfer(cluster, group, ring.sent), ring.sent)
    return min(ring, tree, key=lambda cost: cost.seconds)


def pairwise(cluster: Cluster, group: Group, nbytes: float, imbalance: float) -> Cost:
    """Each rank sends ``nbytes`` in all to the others, one after the other: gloo's exchange of gradients.

    The busiest link has ``imbalance`` times as many.
    """
    if group.size == 1:
        return NOTHING
    busiest = _transfer(cluster, group, imbalance * nbytes)
    return Cost(cluster.two_way * busiest + (group.size - 1) * _hop(cluster, group), nbytes)


def _ring(cluster: Cluster, group: Group, nbytes: float, rounds: int) -> Cost:
    if group.size == 1:
        return NOTHING
    sent = rounds * (group.size - 1) / group.size * nbytes
    latency = rounds * (group.size - 1) * _hop(cluster, group)
    return Cost(cluster.launch + latency + _transfer(cluster, group, sent), sent)


def _hop(cluster: Cluster, group: Group) -> float:
    """Mean latency of the hops in a ring. On too few cores a rank is not running when its message comes."""
    leaving = group.nodes if group.nodes > 1 else 0
    mean = (leaving * cluster.between.alpha + (group.size - leaving) * cluster.inside.alpha) / group.size
    return cluster.contention(group.size) * mean


def _transfer(cluster: Cluster, group: Group, sent: float) -> float:
    """Seconds to pass on ``sent`` bytes of each rank. In a ring a node sends as much as one of its ranks."""
    inside = sent * cluster.inside.beta if group.local > 1 else 0.0
    through = max(0.0, group.sharing * sent - cluster.between.burst) * cluster.between.beta if group.nodes > 1 else 0.0
    return max(inside, through)
