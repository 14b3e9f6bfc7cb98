"""A training step on paper, engine by engine: how long each rank computes and which messages it sends.

Six parts, one after the other; nothing overlaps (:attr:`Step.hidden` tells what perfect overlap would give):

    compute      forward and backward: 3 forward passes' worth of operations
    gradients    their reduction
    parameters   their gathering, where ranks do not hold them
    optimizer    passes over memory: SGD's, or momentum, LMO, step size and update
    selection    messages of LMOs whose tensors lie with several ranks
    vertices     their all-gather
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from benchmarks.scaling.alpha_beta import (
    NOTHING,
    Cluster,
    Cost,
    Group,
    all_gather,
    all_reduce,
    pairwise,
    reduce_scatter,
)
from sfw_dist.optim.sharding.assignment import Assignment, TensorSpec, assign, lay_out

Shape = tuple[int, ...]
K_FRAC, K_MIN = 0.05, 10
BUCKET = 25 * 2**20
"""Bytes of DDP's buckets."""
ZERO_BUCKET = 500_000_000
"""Entries of DeepSpeed's buckets."""
SPLIT = 65_536
ROW = 8192
"""Sums are trees over rows of so many entries, a row a tree over vectors of so many lanes."""
HISTOGRAMS = (12, 12, 7)
"""Bits of a float32 magnitude that each message of a selection counts."""
PRODUCTS = 3
"""Sums of a step: ‖m‖², ‖θ − v‖², ⟨m, θ − v⟩."""


@dataclass(frozen=True)
class Workload:
    """A network and what one rank does with it in a step."""

    name: str
    shapes: tuple[Shape, ...]
    forward: float
    """Floating-point operations of a sample's forward pass, a multiplication and an addition counted as two."""
    batch: int
    """Samples of a rank."""
    blocks: int
    """Which FSDP gathers one at a time; what is left, embeddings and head, it gathers before and frees after them."""
    root: int
    """Entries of what is left."""
    efficiency: float = 1.0
    """Of the device's peak that forward and backward reach."""
    wire: int = 4
    """Bytes of a parameter that FSDP and ZeRO gather: 2 in bf16. Gradients are added in float32."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def entries(self) -> int:
        return sum(self.sizes)

    def compute(self, cluster: Cluster, ranks: int) -> float:
        """Seconds of forward and backward: the backward pass takes two products for each of the forward pass."""
        operations = 3 * self.forward * self.batch
        return cluster.contention(ranks) * operations / (self.efficiency * cluster.device.flops)


@dataclass
class Step:
    """What a rank does in a step, the slowest one's seconds; bytes are those that it sends."""

    costs: dict[str, Cost] = field(default_factory=dict)
    memory: float = 0.0
    """Bytes of parameters, gradients, momentum and gathered vertices on the fullest rank; without activations."""

    def seconds(self, *parts: str) -> float:
        return sum(self.costs[part].seconds for part in parts or self.costs if part in self.costs)

    @property
    def sent(self) -> float:
        return sum(cost.sent for cost in self.costs.values())

    def with_overlap(self, share: float) -> float:
        """Seconds if so much of the shorter of compute and gradients ran behind the longer."""
        return self.seconds() - share * min(self.seconds("compute"), self.seconds("gradients"))

    @property
    def hidden(self) -> float:
        """Seconds if gradients and parameters travelled behind forward and backward wherever there is time."""
        exposed = self.seconds("optimizer", "selection", "vertices")
        return max(self.seconds("compute"), self.seconds("gradients", "parameters")) + exposed


# What vertices and selections send ------------------------------------------------------------------------------------


def slot_bytes(n: int, support: int) -> int:
    """A K-sparse vertex and its statistics: bitmap and signs, or int32 indices; as ``VertexCodec`` has it."""
    mask, signs, indices = -(-n // 8), -(-support // 8), 4 * support
    return 24 + (_aligned(mask) + _aligned(signs) if mask + signs <= indices else _aligned(indices))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def support(n: int) -> int:
    return min(max(K_MIN, int(K_FRAC * n)), n)


@cache
def owners(sizes: tuple[int, ...], ranks: int) -> tuple[Assignment, int]:
    """DDP: who owns what, and the bytes of the gathered vertices. All segments are as long as the longest."""
    items = [TensorSpec(str(i), 9.0 * n, n, "", ROW if n > SPLIT else 0) for i, n in enumerate(sizes)]
    plan = assign(items, ranks)
    nbytes = [slot_bytes(p.stop - p.start, min(support(sizes[p.tensor]), p.stop - p.start)) for p in plan.shards]
    return plan, ranks * lay_out(nbytes, [part.owner for part in plan.shards], ranks).segment


@dataclass(frozen=True)
class Division:
    """How tensors are divided between ranks: for each the edges of its parts, 0 and n included."""

    edges: tuple[tuple[int, ...], ...]
    fullest: int
    """Entries of the rank that has most."""

    @cached_property
    def divided(self) -> list[tuple[int, ...]]:
        return [edges for edges in self.edges if len(edges) > 2]


@cache
def by_rows(shapes: tuple[Shape, ...], ranks: int) -> Division:
    """FSDP2: of each tensor ⌈d/W⌉ of its d rows to a rank; the last ranks may have fewer, or none."""
    edges, fullest = [], 0
    for shape in shapes:
        rows = shape[0] if shape else 1
        chunk, stride = -(-rows // ranks), math.prod(shape[1:])
        edges.append((*(stride * row for row in range(0, rows, chunk)), stride * rows))
        fullest += stride * chunk
    return Division(tuple(edges), fullest)


@cache
def end_to_end(sizes: tuple[int, ...], ranks: int) -> Division:
    """ZeRO-1 and -2: all tensors one after the other, cut into W equal partitions."""
    partition = -(-sum(sizes) // ranks)
    edges, begin = [], 0
    for n in sizes:
        first = -(-(begin + 1) // partition) * partition
        edges.append((0, *(cut - begin for cut in range(first, begin + n, partition)), n))
        begin += n
    return Division(tuple(edges), partition)


def selection_messages(division: Division) -> list[int]:
    """Bytes of each all-reduce of a selection, all tensors together in each; none if no tensor is divided.

    Counts are int32; the last are kept apart by part, so that all ranks know who has how many ties. Sums are float64:
    one a row where every part begins at a row, else one a part; with them goes a count of the parts with a gradient.
    """
    divided = division.divided
    if not divided:
        return []
    parts = max(len(edges) - 1 for edges in divided)
    counts = [4 * len(divided) * 2**bits for bits in HISTOGRAMS]
    counts[-1] *= parts
    return [*counts, 8 * (PRODUCTS + 1) * sum(map(sum_slots, division.edges))]


def sum_slots(edges: tuple[int, ...]) -> int:
    """How many numbers stand for one sum over a tensor with these edges, as ``ops.sharded_sum`` has it."""
    aligned = all(edge % ROW == 0 for edge in edges[:-1])
    return -(-edges[-1] // ROW) if aligned else len(edges) - 1


def owner_messages(plan: Assignment, sizes: Sequence[int]) -> list[int]:
    """DDP: the same for tensors that have several owners, cut between rows, so that each row is one number."""
    edges: dict[int, list[int]] = {}
    for part in plan.shards:
        edges.setdefault(part.tensor, [0]).append(part.stop)
    divided = tuple(tuple(e) for e in edges.values() if len(e) > 2)
    return selection_messages(Division(divided, 0))


# Engines --------------------------------------------------------------------------------------------------------------


def ddp(
    work: Workload,
    cluster: Cluster,
    ranks: int,
    *,
    sfw: bool = True,
    grads: str = "all_reduce",
    bucket: float = BUCKET,
) -> Step:
    """Every rank has all parameters. With SFW an owner has a tensor's momentum, and vertices are gathered."""
    n, group, device = work.entries, cluster.group(ranks), cluster.device
    plan, gathered = owners(work.sizes, ranks)
    width = 2 if grads.endswith("bf16") else 4
    buckets = math.ceil(4 * n / bucket)
    if grads == "all_reduce":
        gradients = all_reduce(cluster, group, 4 * n / buckets) * buckets
    elif cluster.backend == "gloo":
        # All buckets at once, so that only the busiest rank's bytes count.
        gradients = pairwise(cluster, group, (ranks - 1) / ranks * width * n, plan.imbalance)
    else:
        # A reduce to each owner, along the ring: together a reduce-scatter. And the norms of what others own.
        gradients = reduce_scatter(cluster, group, width * n / buckets) * buckets
        gradients += all_reduce(cluster, group, 8 * ranks) * buckets
    step = Step({"compute": Cost(work.compute(cluster, ranks)), "gradients": gradients})
    if not sfw:
        step.costs["optimizer"] = _passes(cluster, ranks, device.sgd_bytes * n)
        step.memory = 12 * n
        return step
    owned = plan.imbalance * n / ranks
    step.costs["optimizer"] = _passes(cluster, ranks, device.answer_bytes * owned + device.move_bytes * n)
    step.costs["selection"] = _messages(cluster, group, owner_messages(plan, work.sizes))
    step.costs["vertices"] = all_gather(cluster, group, gathered)
    step.memory = 8 * n + 4 * owned + (gathered * (1 + 1 / ranks) if ranks > 1 else gathered)
    return step


def fsdp(work: Workload, cluster: Cluster, ranks: int, *, sfw: bool = True, shards: int | None = None) -> Step:
    """FSDP2: parameters gathered for the forward and again for the backward pass, gradients scattered.

    With ``shards`` (HSDP) so many ranks hold one copy, those of a node, and gradients are added up over the copies.
    """
    shards = min(shards or ranks, ranks)
    group = cluster.group(ranks) if shards == ranks else Group(shards, 1)
    division = by_rows(work.shapes, shards)
    root, block = work.root, (work.entries - work.root) / work.blocks
    gradients = reduce_scatter(cluster, group, 4 * root) + reduce_scatter(cluster, group, 4 * block) * work.blocks
    if shards < ranks:
        copies = Group(1, ranks // shards, sharing=shards)
        gradients += all_reduce(cluster, copies, 4 * root / shards)
        gradients += all_reduce(cluster, copies, 4 * block / shards) * work.blocks
    root, block = work.wire * root, work.wire * block
    # The backward pass begins with the root, which is still there from the forward pass.
    parameters = all_gather(cluster, group, root) + all_gather(cluster, group, block) * (2 * work.blocks)
    step = Step({"compute": Cost(work.compute(cluster, ranks)), "gradients": gradients, "parameters": parameters})
    step.costs |= _divided_step(cluster, ranks, group, division, sfw)
    gathered = root + 2 * block if shards > 1 else 0  # one block computes while the next one arrives
    step.memory = 12 * division.fullest + gathered + (_heard(division) if sfw else 0)
    return step


def zero(work: Workload, cluster: Cluster, ranks: int, *, sfw: bool = True, stage: int = 2) -> Step:
    """ZeRO-1 and -2: each rank steps its partition, and all gather the parameters.

    Gradients are all-reduced, as DeepSpeed does unless told (``use_multi_rank_bucket_allreduce``), and kept whole (1)
    or a rank's own (2).
    """
    n, group = work.entries, cluster.group(ranks)
    division = end_to_end(work.sizes, ranks)
    buckets = math.ceil(n / ZERO_BUCKET)
    step = Step(
        {
            "compute": Cost(work.compute(cluster, ranks)),
            "gradients": all_reduce(cluster, group, 4 * n / buckets) * buckets,
            "parameters": all_gather(cluster, group, work.wire * n),
        }
    )
    step.costs |= _divided_step(cluster, ranks, group, division, sfw)
    # The parameters that compute, gradients, a bucket; and in float32 this rank's parameters and momentum.
    kept = n if stage == 1 else division.fullest
    step.memory = work.wire * n + 4 * (kept + min(n, ZERO_BUCKET)) + 8 * division.fullest
    step.memory += _heard(division) if sfw else 0
    return step


def _divided_step(cluster: Cluster, ranks: int, group: Group, division: Division, sfw: bool) -> dict[str, Cost]:
    device = cluster.device
    if not sfw:
        return {"optimizer": _passes(cluster, ranks, device.sgd_bytes * division.fullest)}
    alone = device.answer_bytes + device.move_bytes  # one rank has whole tensors, and the compiled kernels
    passes = device.divided_bytes if group.size > 1 else alone
    return {
        "optimizer": _passes(cluster, ranks, passes * division.fullest),
        "selection": _messages(cluster, group, selection_messages(division)),
    }


def _heard(division: Division) -> int:
    """Bytes of a selection's longest message, and of the int64 copy that is made of counts."""
    return max((3 * counts for counts in selection_messages(division)[:-1]), default=0)


def _passes(cluster: Cluster, ranks: int, nbytes: float) -> Cost:
    return Cost(cluster.contention(ranks) * nbytes / cluster.device.bandwidth)


def _messages(cluster: Cluster, group: Group, sizes: Sequence[int]) -> Cost:
    return sum((all_reduce(cluster, group, nbytes) for nbytes in sizes), NOTHING)


Engine = Callable[[Workload, Cluster, int], Step]
ENGINES: dict[str, Engine] = {
    "DDP + SGD": lambda w, c, r: ddp(w, c, r, sfw=False),
    "DDP + SFW, all_reduce": lambda w, c, r: ddp(w, c, r),
    "DDP + SFW, reduce_to_owner": lambda w, c, r: ddp(w, c, r, grads="reduce_to_owner"),
    "DDP + SFW, reduce_to_owner_bf16": lambda w, c, r: ddp(w, c, r, grads="reduce_to_owner_bf16"),
    "ZeRO-1 + SFW": lambda w, c, r: zero(w, c, r, stage=1),
    "ZeRO-2 + SFW": lambda w, c, r: zero(w, c, r, stage=2),
    "FSDP2 + SGD": lambda w, c, r: fsdp(w, c, r, sfw=False),
    "FSDP2 + SFW": lambda w, c, r: fsdp(w, c, r),
    "HSDP 8 + SFW": lambda w, c, r: fsdp(w, c, r, shards=8),
}


# Networks -------------------------------------------------------------------------------------------------------------


def resnet50(classes: int = 1000) -> list[Shape]:
    """torchvision's, weights of convolutions followed by those of BatchNorm."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]


def resnet18(classes: int = 10) -> list[Shape]:
    """The paper's, for small images."""
    shapes: list[Shape] = [(64, 3, 3, 3), (64,), (64,)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            for source in (inputs, width):
                shapes += [(width, source, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
            inputs = width
    return [*shapes, (classes, inputs), (classes,)]


def vgg16(classes: int = 10) -> list[Shape]:
    """The paper's: thirteen convolutions with bias and BatchNorm, and one linear layer."""
    shapes: list[Shape] = []
    inputs = 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(width, inputs, 3, 3), (width,), (width,), (width,)]
        inputs = width
    return [*shapes, (classes, inputs), (classes,)]


def vit_l_16(classes: int = 1000) -> list[Shape]:
    width, inner = 1024, 4096
    attention: list[Shape] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width,), (width,), (inner, width), (inner,), (width, inner), (width,)]
    layer = attention + feed_forward
    start: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*start, *layer * 24, (width,), (width,), (classes, width), (classes,)]


def transformer_7b() -> list[Shape]:
    """As balance.py's: 32 layers of width 4096, 11,008 in the feed-forward part, 32,000 tokens."""
    width, inner = 4096, 11_008
    layer: list[Shape] = [*[(width, width)] * 4, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(32_000, width), *layer * 32, (width,), (32_000, width)]


TOKENS = 2048
_decoder = transformer_7b()
# An input embedding is looked up; a token attends to half of the others on average, two products in each layer.
_a_token = 2 * (sum(math.prod(s) for s in _decoder) - 32_000 * 4096) + 4 * 32 * 4096 * TOKENS / 2

# Efficiencies are assumptions: convolutions of this size are bound by memory, large matrix products are not.
WORKLOADS = {
    "ResNet-50": Workload(
        "ResNet-50, 32 images of 224×224", tuple(resnet50()), 2 * 4.09e9, 32, 16, 2_058_536, efficiency=0.07
    ),
    "ViT-L/16": Workload(
        "ViT-L/16, 32 images of 224×224", tuple(vit_l_16()), 2 * 61.6e9, 32, 24, 2_017_256, efficiency=0.4
    ),
    "7B": Workload(
        f"7 B transformer, 4 sequences of {TOKENS} tokens",
        tuple(_decoder),
        _a_token * TOKENS,
        4,
        32,
        2 * 32_000 * 4096 + 4096,
        efficiency=0.4,
    ),
}
