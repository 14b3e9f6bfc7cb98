"""The optimizer's step alone: SFW against fused SGD and against one torch.topk a tensor, on one rank.

    python benchmarks/step.py
    python benchmarks/step.py --model vgg16 --rounds 20 --out results/step.json

The three are interleaved in one run, so that a machine whose speed drifts slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.files import write_json
from sfw_dist.models import build_model

K_FRAC, K_MIN, TAU = 0.05, 10, 15.0


def topk_per_tensor(parameters: list[nn.Parameter], radii: list[float]) -> Callable[[], None]:
    """The step as published: momentum, torch.topk, a dense vertex and the update, tensor by tensor."""
    momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step() -> None:
        for p, m, radius in zip(parameters, momenta, radii, strict=True):
            assert p.grad is not None
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            k = min(max(K_MIN, int(K_FRAC * p.numel())), p.numel())
            chosen = m.abs().flatten().topk(k).indices
            vertex = torch.zeros_like(p).flatten()
            vertex[chosen] = -radius * m.flatten()[chosen].sign()
            vertex = vertex.view_as(p)
            gamma = min(float(m.norm() / (p - vertex).norm()), 1.0)
            p.mul_(1 - gamma).add_(vertex, alpha=gamma)

    return step


def copies(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters, with gradients of the size that training has."""
    parameters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    return parameters


def contenders(model: nn.Module) -> dict[str, Callable[[], Any]]:
    groups = constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU))
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    radii = [group["constraint"].radius(group["params"][0][1].numel()) for group in groups]
    return {
        "SGD, momentum, fused": torch.optim.SGD(copies(model), lr=1e-3, momentum=0.9, fused=True).step,
        "SFW": SFW(groups, lr=1e-3).step,
        "torch.topk per tensor": topk_per_tensor(copies(model), radii),
    }


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one of each a round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="network whose shapes are used (default: resnet18)")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default: 10)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = build_model(arguments.model, num_classes=10)
    times = measure(contenders(model), arguments.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["SGD, momentum, fused"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.model}, {parameters:,} parameters, float32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {platform.processor() or platform.machine()}, n = {arguments.rounds}")  # fmt: skip
    print(f"{'step':24} {'median ms':>10} {'min':>8} {'max':>8} {'x SGD':>8}")
    for name, values in times.items():
        print(f"{name:24} {medians[name]:10.1f} {min(values):8.1f} {max(values):8.1f} {medians[name] / base:8.1f}")
    result = {
        "model": arguments.model,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "milliseconds": times,
        "median_milliseconds": medians,
    }
    if arguments.out:
        write_json(arguments.out, result)
    else:
        print(json.dumps({"median_milliseconds": {k: round(v, 2) for k, v in medians.items()}}))


if __name__ == "__main__":
    main()
