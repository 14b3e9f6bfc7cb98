"""The optimizer's step alone, on gradients of a real training run: SFW against fused SGD and one torch.topk a tensor.

    python -m benchmarks.step
    python -m benchmarks.step --models vgg16 --rounds 20 --threads 1 --out results/step.json

"rank of four" is what one of four ranks computes: the answers of the tensors it owns, and the update of all; the mean
over the four. All take the same gradients and are interleaved in one run; the caches are overwritten before each, as a
backward pass would. Training continues between the rounds, so that thresholds move as they do in training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gradients import K_FRAC, K_MIN, TAU, training_run
from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.files import write_json
from sfw_dist.optim.param_groups import entries
from sfw_dist.optim.sharding.distribution import assign_shards
from sfw_dist.optim.sharding.replicated import ReplicatedDistributor

Step = Callable[[list[Tensor]], None]
RANKS = 4


def copies(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in model.parameters()]


def sgd(model: nn.Module) -> Step:
    parameters = copies(model)
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    return lambda gradients: with_gradients(parameters, gradients, optimizer.step)


def with_gradients(parameters: list[nn.Parameter], gradients: list[Tensor], step: Callable[[], Any]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    step()


def topk_per_tensor(parameters: list[nn.Parameter], radii: list[float], lr: float) -> Step:
    """The step as published: momentum, torch.topk, a dense vertex and the update, tensor by tensor."""
    momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(gradients: list[Tensor]) -> None:
        for p, g, m, radius in zip(parameters, gradients, momenta, radii, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            k = min(max(K_MIN, int(K_FRAC * p.numel())), p.numel())
            chosen = m.abs().flatten().topk(k).indices
            vertex = torch.zeros_like(p).flatten()
            vertex[chosen] = -radius * m.flatten()[chosen].sign()
            vertex = vertex.view_as(p)
            gamma = min(lr * float(m.norm() / (p - vertex).norm()), 1.0)
            p.mul_(1 - gamma).add_(vertex, alpha=gamma)

    return step


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    groups = constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU))
    for group in groups:
        group["params"] = [(name, nn.Parameter(p.detach().clone())) for name, p in group["params"]]
    return groups


def sfw(model: nn.Module) -> Step:
    optimizer = SFW(groups_of(model), lr=1e-3)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return lambda gradients: with_gradients(parameters, gradients, optimizer.step)


def rank_of_four(model: nn.Module, rank: int) -> Step:
    """What a rank computes, without the messages: its vertices are in the gathered buffer, others' are 0.

    Every tensor has one owner here, for the LMO of a divided one waits for messages.
    """
    optimizer = SFW(groups_of(model), lr=1e-3, split=None)
    specs, _, shards = assign_shards(list(entries(optimizer.param_groups)), RANKS, split=None)
    distributor = ReplicatedDistributor(shards, [spec.owner for spec in specs], RankGroup(None, rank, RANKS))
    segment = distributor._segment

    def step(gradients: list[Tensor]) -> None:
        distributor.compute_vertices(optimizer.state, [gradients[spec.tensor] for spec in specs])
        distributor._gathered.view(RANKS, -1)[rank] = segment
        distributor.apply_update()

    return torch.no_grad()(step)


def measure(name: str, rounds: int, batch_size: int, skip: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one of each a round, after three rounds that do not count."""
    run = training_run(name, batch_size, skip)
    model, _ = next(run)
    radii = [group["constraint"].size for group in groups_of(model)]
    steps = {
        "SGD, momentum, fused": sgd(model),
        "SFW": sfw(model),
        "torch.topk per tensor": topk_per_tensor(copies(model), radii, lr=1e-3),
    }
    ranks = [rank_of_four(model, rank) for rank in range(RANKS)]
    times: dict[str, list[float]] = {key: [] for key in [*steps, "SFW, rank of four"]}
    for round_, (_, gradients) in enumerate(islice(run, rounds + 3)):
        taken = {key: timed(step, gradients) for key, step in steps.items()}
        taken["SFW, rank of four"] = statistics.mean(timed(step, gradients) for step in ranks)
        if round_ >= 3:
            for key, value in taken.items():
                times[key].append(value)
    return times


def timed(step: Step, gradients: list[Tensor]) -> float:
    torch.ones(16_000_000).add_(1)  # 64 MB: nothing of the last step is in the cache
    began = time.perf_counter()
    step(gradients)
    return 1e3 * (time.perf_counter() - began)


def first_step(name: str) -> float:
    """Seconds from the end of the imports to the end of the first step, in a new process, its kernels compiled."""
    code = f"""
import time, torch
from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.models import build_model
model = build_model({name!r}, num_classes=10)
groups = constrain(model, KSparsePolytope(k_frac={K_FRAC}, k_min={K_MIN}, tau={TAU}))
for p in model.parameters():
    p.grad = torch.randn_like(p)
began = time.perf_counter()
SFW(groups).step()
print(time.perf_counter() - began)
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"], help="networks (default: both)")
    parser.add_argument("--rounds", type=int, default=30, help="counted rounds (default: 30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the kernels")
    parser.add_argument("--batch-size", type=int, default=128, help="of the training run (default: 128, as published)")
    parser.add_argument("--skip", type=int, default=20, help="training steps before the first round (default: 20)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = []
    for name in arguments.models:
        times = measure(name, arguments.rounds, arguments.batch_size, arguments.skip)
        medians = {key: statistics.median(values) for key, values in times.items()}
        base = times["SGD, momentum, fused"]
        ratios = {
            key: statistics.median(mine / theirs for mine, theirs in zip(values, base, strict=True))
            for key, values in times.items()
        }
        first = first_step(name)
        machine = platform.processor() or platform.machine()
        print(f"{name}, float32, {arguments.threads} threads, torch {torch.__version__}, {machine}, "
              f"n = {arguments.rounds}, first step {first:.2f} s")  # fmt: skip
        print(f"{'step':24} {'median ms':>10} {'min':>8} {'max':>8} {'x SGD':>8}")
        for key, values in times.items():
            print(f"{key:24} {medians[key]:10.2f} {min(values):8.2f} {max(values):8.2f} {ratios[key]:8.2f}")
        results.append(
            {
                "model": name,
                "threads": arguments.threads,
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "milliseconds": times,
                "median_milliseconds": medians,
                "median_ratio_to_sgd": ratios,
                "first_step_seconds": first,
            }
        )
    if arguments.out:
        write_json(arguments.out, results)
    else:
        print(json.dumps({r["model"]: {k: round(v, 2) for k, v in r["median_ratio_to_sgd"].items()} for r in results}))


if __name__ == "__main__":
    main()
