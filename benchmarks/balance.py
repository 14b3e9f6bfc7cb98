"""How evenly the ranks share the work and what they send in a step, from the plan alone: nothing is sent or measured.

    python -m benchmarks.balance
    python -m benchmarks.balance --models resnet18 torchvision/vit_l_16 --ranks 2 8 64 --k-frac 0.05

"max/mean" is the greatest load of a rank over the mean, "undivided" what it would be if every tensor had one owner;
"divided" counts tensors that have several. Bytes are those of the gathered vertices; one all-gather moves equal
segments, so each is as long as the longest.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sfw_dist.constraints import KSparsePolytope
from sfw_dist.files import write_json
from sfw_dist.models import build_model
from sfw_dist.ops.pairwise_sum import ROW
from sfw_dist.optim.shard import step_cost
from sfw_dist.optim.sharding.assignment import Assignment, TensorSpec, assign, lay_out
from sfw_dist.optim.vertex_codec import VertexCodec

Shapes = list[tuple[int, ...]]


def transformer_7b() -> Shapes:
    """The tensors of a LLaMA-like decoder: 32 layers of width 4096, 11,008 in the feed-forward part, 32,000 tokens."""
    width, inner = 4096, 11_008
    layer = [(width, width)] * 4 + [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(32_000, width), *(layer * 32), (width,), (32_000, width)]


def shapes_of(name: str) -> Shapes:
    if name == "transformer_7b":
        return transformer_7b()
    with torch.device("meta"):
        return [tuple(p.shape) for p in build_model(name, num_classes=10).parameters()]


def items_of(shapes: Shapes, spec: KSparsePolytope, split: int) -> list[TensorSpec]:
    sizes = [math.prod(shape) for shape in shapes]
    return [
        TensorSpec(str(i), step_cost(torch.Size([n]), spec), n, "", ROW if n > split else 0)
        for i, n in enumerate(sizes)
    ]


def gathered_bytes(items: list[TensorSpec], plan: Assignment, spec: KSparsePolytope, ranks: int) -> int:
    nbytes = []
    for part in plan.shards:
        n = part.stop - part.start
        nbytes.append(VertexCodec(n, min(spec.support(items[part.tensor].entries), n), torch.float32, 1.0).nbytes)
    return ranks * lay_out(nbytes, [part.owner for part in plan.shards], ranks).segment


def row(name: str, items: list[TensorSpec], ranks: int, spec: KSparsePolytope) -> dict[str, Any]:
    plan = assign(items, ranks)
    entries = sum(item.entries for item in items)
    gathered = gathered_bytes(items, plan, spec, ranks)
    owners = Counter(part.tensor for part in plan.shards)
    whole = assign([TensorSpec(i.name, i.cost, i.entries, "") for i in items], ranks)
    return {
        "model": name,
        "parameters": entries,
        "ranks": ranks,
        "max_over_mean": plan.imbalance,
        "max_over_mean_undivided": whole.imbalance,
        "divided": sum(number > 1 for number in owners.values()),
        "gathered_bytes": gathered,
        "bytes_a_parameter": gathered / entries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["resnet18", "torchvision/resnet50", "vgg16", "torchvision/vit_l_16", "transformer_7b"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2**e for e in range(1, 13)])
    parser.add_argument("--k-frac", type=float, default=0.05)
    parser.add_argument("--split", type=int, default=65_536, help="entries above which a tensor may be divided")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    spec = KSparsePolytope(k_frac=arguments.k_frac, k_min=10, radius=1.0)
    rows = []
    print(
        f"{'model':22} {'parameters':>13} {'ranks':>5} {'max/mean':>8} {'undivided':>10} {'divided':>8} {'B/param':>8}"
    )
    for name in arguments.models:
        items = items_of(shapes_of(name), spec, arguments.split)
        for ranks in arguments.ranks:
            r = row(name, items, ranks, spec)
            rows.append(r)
            print(f"{name:21} {r['parameters']:13,} {ranks:5} {r['max_over_mean']:8.2f} "
                  f"{r['max_over_mean_undivided']:10.2f} {r['divided']:8} {r['bytes_a_parameter']:8.3f}")  # fmt: skip
    if arguments.out:
        write_json(arguments.out, rows)


if __name__ == "__main__":
    main()
