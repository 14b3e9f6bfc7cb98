"""What it brings to select and exchange vertices behind the backward pass: whole training steps between hosts.

    sudo python -m benchmarks.hosts.overlap
    sudo python -m benchmarks.hosts.overlap --hosts 4 --gbit 1 --batch-size 32 --out results/overlap.json

The hosts are network namespaces of this machine (benchmarks/hosts/network.py: root and iproute2), one rank with one
thread each. A step is forward, backward and optimizer on a batch of noise, the slowest rank's time; the contenders
take turns in every round. Overlap changes when things are done and nothing else: the parameters are compared at the
end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.hosts.baselines import K_FRAC, K_MIN, TAU
from benchmarks.hosts.network import FailedRanksError, hosts, run_ranks
from sfw_dist import SFW, KSparsePolytope, constrain, reduce_to_owner
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import write_json
from sfw_dist.models import build_model
from sfw_dist.optim.comm_hooks import all_reduce

HOOKS: dict[str, Any] = {"all_reduce": all_reduce, "reduce_to_owner": reduce_to_owner}
WARM_UP = 3


def contender(model_name: str, hook: str | None, overlap: bool) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """A network and its training step; with no hook DDP + SGD."""
    torch.manual_seed(0)
    model = build_model(model_name, num_classes=10)
    replica = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer
    if hook is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    else:
        groups = constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU))
        optimizer = SFW(groups, lr=0.1, overlap=overlap)
        replica.register_comm_hook(optimizer, HOOKS[hook])

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(replica(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, step


def worker(model_name: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """On every rank: milliseconds of each contender's steps, the slowest rank's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {"DDP + SGD": contender(model_name, None, False)}
    for hook in HOOKS:
        for overlap in (False, True):
            made[f"SFW, {hook}{', overlap' if overlap else ''}"] = contender(model_name, hook, overlap)
    generator = torch.Generator().manual_seed(dist.get_rank())
    times: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(rounds + WARM_UP):
        images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (batch_size,), generator=generator)
        for name, (_, step) in made.items():
            dist.barrier()
            began = time.perf_counter()
            step(images, labels)
            taken = torch.tensor(1e3 * (time.perf_counter() - began))
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if round_ >= WARM_UP:
                times[name].append(float(taken))
    equal = {hook: same(made[f"SFW, {hook}"][0], made[f"SFW, {hook}, overlap"][0]) for hook in HOOKS}
    dist.destroy_process_group()
    return {"milliseconds": times, "bitwise_equal": equal}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def report(result: dict[str, Any]) -> None:
    times = result["milliseconds"]
    base = times["DDP + SGD"]
    print(f"{result['model']}, {result['hosts']} hosts at {result['gbit']} Gbit/s, batch {result['batch_size']} a "
          f"rank, torch {result['torch']}, {result['machine']}, {result['cores']} cores, n = {len(base)}")  # fmt: skip
    print(f"{'step':34} {'median ms':>10} {'min':>8} {'max':>8} {'x SGD':>8}")
    for name, values in times.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(values, base, strict=True))
        print(f"{name:34} {statistics.median(values):10.1f} {min(values):8.1f} {max(values):8.1f} {ratio:8.2f}")
    print(f"parameters bitwise equal with and without overlap: {result['bitwise_equal']}")


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="network (default: resnet18)")
    parser.add_argument("--hosts", type=int, default=4, help="network namespaces, one rank each (default: 4)")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of every link, Gbit/s (default: 1)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a rank (default: 16)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default: 15)")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds until hanging ranks are ended (default: 600)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = worker(arguments.model, arguments.batch_size, arguments.rounds)
        if os.environ["RANK"] == "0":
            print(json.dumps(result))
        return
    options = ["--model", arguments.model, "--batch-size", str(arguments.batch_size), "--rounds", str(arguments.rounds)]
    command = [sys.executable, "-m", "benchmarks.hosts.overlap", "--worker", *options]
    try:
        with hosts(arguments.hosts, arguments.gbit) as found:
            result = json.loads(run_ranks(found, command, arguments.timeout, {"OMP_NUM_THREADS": "1"}))
    except FailedRanksError as error:
        raise UserError(str(error)) from None
    result |= {
        "model": arguments.model,
        "hosts": arguments.hosts,
        "gbit": arguments.gbit,
        "batch_size": arguments.batch_size,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    report(result)
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    sys.exit(main())
