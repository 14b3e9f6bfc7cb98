"""Sets on several ranks: the same radii on all, or an error; never a wait for a rank that does not call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, AdaGradSFW, LpBall, ProjectedSGD, constrain
from sfw_dist.constraints import bindings
from tests.support.ranks import error_of, run_on_ranks

SPEC = LpBall(2, tau=5.0)


class Net(nn.Module):
    """With weights of torch's initializers, and of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, width))
        self.embedding = nn.Embedding(20, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.head = nn.Linear(width, 30)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        return self.head(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


def seeded(seed: int, width: int = 8) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def rows(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[tuple[str, float | None, str]]:
    return [(one.name, one.radius, one.source) for one in bindings(model, SPEC, process_group=group)]


def _cases(rank: int) -> dict[str, Any]:
    whole = dist.group.WORLD
    alike, own = seeded(0), seeded(rank)
    results: dict[str, Any] = {"own": rows(own), "first": rows(own, whole)}
    # Built before DistributedDataParallel sends rank 0's weights.
    early = SFW(constrain(own, SPEC))
    results["early"] = [group["constraint"].radius(1) for group in early.param_groups]
    added = seeded(2 + rank)
    for group in constrain(added, SPEC):
        early.add_param_group({**group, "params": [(f"added.{name}", p) for name, p in group["params"]]})
    early.state_dict()  # the state, or a step, takes in what was added
    results["added"] = [group["constraint"].radius(1) for group in early.param_groups[len(results["early"]) :]]
    late = [ProjectedSGD(constrain(seeded(rank), SPEC), lr=0.1), AdaGradSFW(constrain(seeded(rank), SPEC), lr=0.1)]
    SFW(constrain(own, SPEC, process_group=whole))
    for optimizer in late:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            dist.broadcast(parameter.detach(), 0)  # as DistributedDataParallel does
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    results["late"] = [[group["constraint"].radius(1) for group in optimizer.param_groups] for optimizer in late]
    results["stepped"] = [
        [p.detach().clone() for g in optimizer.param_groups for p in g["params"]] for optimizer in late
    ]
    wrapped = DistributedDataParallel(seeded(rank))
    results["after"] = rows(wrapped)
    SFW(constrain(wrapped, SPEC))
    results["other_models"] = error_of(ValueError, rows, seeded(0, 8 + 2 * rank), whole)
    alone = [dist.new_group([number]) for number in range(2)][rank]
    if rank == 1:  # a stage of a pipeline, or a look at the groups: the other rank calls nothing
        results["alone"] = rows(own), rows(own, alone)
    dist.barrier()
    results["whole"] = rows(alike)
    mesh = init_device_mesh("cpu", (2,))
    results["sharded"] = rows(fully_shard(alike, mesh=mesh))
    return results


def test_radii_on_ranks() -> None:
    """Seeded differently: norms of initializers are equal on all ranks, MultiheadAttention's too; present ones are,
    with a process group or after DDP, rank 0's, and without either the optimizers take rank 0's. Fails when ranks train
    in different sets, when a rank that calls alone waits, or when a wrapper or FSDP changes a name or a radius.
    """
    first, second = run_on_ranks(_cases, 2)
    sources = {name: source for name, _, source in first["own"]}
    present = {"position", "embedding.weight"}
    assert {name for name, source in sources.items() if source == "present"} == present
    for (name, radius, _), (_, other, _) in zip(first["own"], second["own"], strict=True):
        assert (radius == other) == (name not in present)
    for results in (first, second):
        assert results["first"] == results["after"] == results["whole"] == results["sharded"] == first["own"]
        assert "other parameters or sets than the first of process_group" in results["other_models"]
        assert "ranks [1]" in results["other_models"]
        assert results["early"] == [radius for _, radius, _ in first["own"]]
        assert results["added"] == [one.radius for one in bindings(seeded(2), SPEC)]
        assert results["late"] == [results["early"]] * 2
    for one, other in zip(first["stepped"], second["stepped"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert second["alone"] == (second["own"], second["own"])
