"""What vertices take on the wire, and how fast they are written and read: compiled kernels, torch's operations, a copy.

    python -m benchmarks.vertex_codec
    python -m benchmarks.vertex_codec --entries 2359296 --threads 1 --out results/wire.json

One tensor, K-sparse. "apply" reads a vertex from its bytes and updates θ with it, on every rank in every step; "encode"
and "decode" are what torch's operations take to write the bytes and to make the vertex of them. "copy" moves θ in
memory, 8 bytes an entry as the update does: the limit.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfw_dist import KSparsePolytope
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.files import write_json
from sfw_dist.optim.shard import Shard
from sfw_dist.optim.sharding.replicated import ReplicatedDistributor, State
from sfw_dist.optim.update import apply_update

FRACTIONS = [0.003, 0.01, 0.05, 0.2]


def one_distributor(n: int, k_frac: float) -> tuple[ReplicatedDistributor, Shard, State]:
    """A tensor with its state, as one rank has it."""
    constraint = KSparsePolytope(k_frac=k_frac, radius=0.1)
    parameter = nn.Parameter(0.01 * torch.randn(n))
    group = {"constraint": constraint, "lr": 1e-3, "momentum": 0.9, "rescale": "gradient", "weight_decay": 0.0}
    shard = Shard.of("tensor", parameter, group, constraint, 0, n)
    state: State = {parameter: {"step": torch.zeros(()), "momentum_buffer": torch.zeros(n)}}
    return ReplicatedDistributor([shard], [0], RankGroup(None, 0, 1)), shard, state


def milliseconds(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        torch.ones(16_000_000).add_(1)  # 64 MB: nothing is in the cache
        began = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


@torch.no_grad()
def measure(n: int, k_frac: float, rounds: int) -> dict[str, Any]:
    distributor, shard, state = one_distributor(n, k_frac)
    gradient = torch.randn(n)
    distributor.compute_vertices(state, [gradient])
    written = distributor._read[0]
    header, vertex = shard.codec.decode(written)
    other, target = torch.randn(n), torch.empty(n)
    plain = nn.Parameter(shard.parameter.detach().clone())
    plain_shard = Shard.of("tensor", plain, shard.group, shard.constraint, 0, n)

    def decoded_and_applied() -> None:
        found, decoded = shard.codec.decode(written)
        apply_update(plain_shard, found[0], decoded)

    return {
        "entries": n,
        "k_frac": k_frac,
        "bytes": shard.codec.nbytes,
        "bytes_a_parameter": shard.codec.nbytes / n,
        "written_as": shard.codec.layout,
        "copy_ms": milliseconds(lambda: target.copy_(other), rounds),
        "apply_ms": milliseconds(distributor.apply_update, rounds),
        "compute_ms": milliseconds(lambda: distributor.compute_vertices(state, [gradient]), rounds),
        "torch_encode_ms": milliseconds(lambda: shard.codec.encode(header, vertex, written.clone()), rounds),
        "torch_decode_and_apply_ms": milliseconds(decoded_and_applied, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=11_173_962, help="of the tensor (default: those of ResNet-18)")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(arguments.entries, k_frac, arguments.rounds) for k_frac in FRACTIONS]
    print(f"{arguments.entries:,} entries, float32, {arguments.threads} threads, torch {torch.__version__}, "
          f"{platform.processor() or platform.machine()}, median of {arguments.rounds}, ms")  # fmt: skip
    print(f"{'K/n':>6} {'written as':>10} {'B/param':>8} {'copy':>8} {'apply':>8} {'compute':>8} "
          f"{'encode, torch':>14} {'decode + apply, torch':>21}")  # fmt: skip
    for r in rows:
        print(f"{r['k_frac']:6} {r['written_as']:>10} {r['bytes_a_parameter']:8.4f} {r['copy_ms']:8.2f} "
              f"{r['apply_ms']:8.2f} {r['compute_ms']:8.2f} {r['torch_encode_ms']:14.2f} "
              f"{r['torch_decode_and_apply_ms']:21.2f}")  # fmt: skip
    if arguments.out:
        write_json(arguments.out, {"threads": arguments.threads, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
