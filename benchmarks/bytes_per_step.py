"""What the ranks send in one step, from the plan alone: SFW's vertices beside an all-gather of parameters.

    python benchmarks/bytes_per_step.py
    python benchmarks/bytes_per_step.py --models resnet18 torchvision/vit_l_16 --ranks 2 8 64

Nothing is sent or measured: these are counts. A rank's segment is as long as the fullest rank's, because one
all-gather moves equal parts; "balance" is the mean load of the ranks over the greatest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sfw_dist import KSparsePolytope, constrain
from sfw_dist.files import write_json
from sfw_dist.models import build_model
from sfw_dist.plan import Item, make_plan
from sfw_dist.wire import VertexFormat


def items(model: torch.nn.Module, k_frac: float) -> list[Item]:
    """One item a tensor, of which the cost of selecting is proportional to the entries."""
    found = []
    for group in constrain(model, KSparsePolytope(k_frac=k_frac, k_min=10, radius=1.0)):
        constraint, (name, parameter) = group["constraint"], group["params"][0]
        n = parameter.numel()
        nbytes = VertexFormat(n, constraint.support(n), torch.float32, constraint.radius(n)).nbytes
        found.append(Item(name, float(n), nbytes, ""))
    return found


def row(name: str, found: list[Item], ranks: int) -> dict[str, Any]:
    plan = make_plan(found, ranks)
    loads = [0.0] * ranks
    for item, owner in zip(found, plan.owners, strict=True):
        loads[owner] += item.cost
    parameters = sum(loads)
    return {
        "model": name,
        "parameters": int(parameters),
        "ranks": ranks,
        "vertex_bytes": sum(item.nbytes for item in found),
        "gathered_bytes": plan.segment * ranks,
        "parameter_bytes": int(4 * parameters),
        "bytes_a_parameter": plan.segment * ranks / parameters,
        "balance": parameters / ranks / max(loads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16", "torchvision/resnet50"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--k-frac", type=float, default=0.05)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    rows = []
    print(f"{'model':22} {'parameters':>12} {'ranks':>5} {'vertices MB':>12} {'gathered MB':>12} "
          f"{'params MB':>10} {'B/param':>8} {'balance':>8}")  # fmt: skip
    for name in arguments.models:
        with torch.device("meta"):
            model = build_model(name, num_classes=10)
        found = items(model.to_empty(device="cpu"), arguments.k_frac)
        for ranks in arguments.ranks:
            r = row(name, found, ranks)
            rows.append(r)
            print(f"{name:22} {r['parameters']:12,} {ranks:5} {r['vertex_bytes'] / 1e6:12.2f} "
                  f"{r['gathered_bytes'] / 1e6:12.2f} {r['parameter_bytes'] / 1e6:10.1f} "
                  f"{r['bytes_a_parameter']:8.3f} {r['balance']:8.2f}")  # fmt: skip
    if arguments.out:
        write_json(arguments.out, rows)


if __name__ == "__main__":
    main()
