"""Pruning of DTensors on two and three ranks, against one process that has the whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    LowRank,
    Masks,
    Pruner,
    Pruning,
    PruningOptions,
    count_flops,
    dead_layers,
    kept_flops,
    layer_table,
    prune,
    recalibrate,
)
from sfw_dist.pruning.recalibration import batch_norms, recalibrated_statistics
from tests.support.ranks import error_of, run_on_ranks

SPARSITIES = (0.0, 0.31, 0.5, 0.77, 0.99)
WORDS: tuple[dict[str, str], ...] = (
    {},
    {"scope": "all"},
    {"ranking": "layerwise"},
    {"ranking": "layerwise", "scope": "all"},
    {"granularity": "2:4"},
    {"granularity": "filter"},
    {"granularity": "filter", "ranking": "layerwise", "scope": "all"},
    {"granularity": "rank"},
    {"granularity": "rank", "scope": "all"},
)


def _net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Few different values, many zeros of both signs: most entries tie. For inputs ``(n, 3, 5, 5)``.

    On three ranks, the last layer's weight of two rows leaves one without entries, and no convolution divides evenly.
    """
    torch.manual_seed(5)
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten()]
    net = nn.Sequential(*convolutions, nn.Linear(16, 12), nn.Linear(12, 2)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape) / 2)
            parameter.mul_(torch.where(torch.rand(parameter.shape) < 0.5, 1.0, -1.0))
    return net


def _scores(net: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of both signs, with ties."""
    torch.manual_seed(6)
    return {name: torch.randint(-4, 5, p.shape).to(dtype) / 4 for name, p in net.named_parameters()}


def _placed(net: nn.Module, mesh: DeviceMesh, places: Mapping[str, list[Placement]]) -> nn.Module:
    """The named parameters as DTensors; the others stay whole."""
    for name, placements in places.items():
        owner, _, key = name.rpartition(".")
        whole = net.get_parameter(name)
        placed = nn.Parameter(distribute_tensor(whole.detach(), mesh, placements))
        net.get_submodule(owner).register_parameter(key, placed)
    return net


def _models(world_size: int) -> dict[str, nn.Module]:
    """The same network, divided in the ways that there are."""
    mesh = init_device_mesh("cpu", (world_size,))
    fsdp = _net()
    for layer in (fsdp[0], fsdp[2], fsdp):
        fully_shard(layer, mesh=mesh)
    half = _net(torch.bfloat16)
    fully_shard(half, mesh=mesh)
    double = _net(torch.float64)
    fully_shard(double, mesh=mesh)
    columns: dict[str, list[Placement]] = {"2.weight": [Shard(1)], "4.weight": [Shard(1)], "0.weight": [Shard(0)]}
    mixed = _placed(_net(), mesh, {**columns, "4.bias": [Replicate()]})  # other parameters are whole tensors
    models = {"fsdp": fsdp, "bfloat16": half, "float64": double, "mixed": mixed}
    if world_size == 2:
        hsdp = _net()
        fully_shard(hsdp, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
        square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        both = _placed(_net(), square, {"2.weight": [Shard(0), Shard(1)], "4.weight": [Shard(1), Shard(0)]})
        # Another mesh, of the same ranks.
        models |= {"hsdp": hsdp, "meshes": _placed(both, mesh, {"0.weight": [Shard(0)], "5.weight": [Shard(1)]})}
    return models


def _on_four(rank: int, world_size: int) -> dict[str, bool]:
    """Two by two ranks: replicas of shards, and tensors cut along two dimensions."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    hsdp = _net()
    fully_shard(hsdp, mesh=grid)
    places: dict[str, list[Placement]] = {
        "0.weight": [Replicate(), Shard(0)],
        "2.weight": [Shard(0), Shard(1)],
        "4.weight": [Shard(0), Replicate()],
        "5.weight": [Shard(1), Shard(1)],
    }
    both = _placed(_net(), grid, places)
    return {name: _same(model, _net(), name, few=True) for name, model in {"hsdp": hsdp, "both": both}.items()}


def _same(model: nn.Module, whole: nn.Module, label: str, few: bool = False) -> bool:
    """Whether prunings are those of the whole tensors, to the bit; raises where they are not."""
    for words in WORDS:
        options = PruningOptions(**words)  # type: ignore[arg-type]
        divided, alone = Pruner(model, options), Pruner(whole, options)
        sparsities = (0.5,) if few or words.get("granularity") == "2:4" else SPARSITIES
        for sparsity in sparsities:
            _compare(divided.at(sparsity), alone.at(sparsity), model, whole, f"{label} {words} {sparsity}")
    for dtype in (torch.float32, torch.float64, torch.int8):
        given = _scores(whole, dtype)
        # Whole tensors and DTensors, the latter placed in another way than the parameters.
        name = "2.weight"
        place = model.get_parameter(name)
        if isinstance(place, DTensor):
            other = distribute_tensor(given[name], place.device_mesh, [Replicate()] * place.device_mesh.ndim)
            mine = {**given, name: other}
        for ranking in ("global", "layerwise"):
            options = PruningOptions(ranking=ranking)  # type: ignore[arg-type]
            found = Pruner(model, options, scores=mine).at(0.6)
            _compare(found, Pruner(whole, options, scores=given).at(0.6), model, whole, f"{label} {dtype} {ranking}")
    return True


def _compare(found: Pruning, alone: Pruning, model: nn.Module, whole: nn.Module, label: str) -> None:
    assert dict(found.counts) == dict(alone.counts), label
    assert (found.kept, found.total, found.sparsity) == (alone.kept, alone.total, alone.sparsity), label
    assert (found.skipped, found.ranks) == (alone.skipped, alone.ranks), label
    assert layer_table(model, found) == layer_table(whole, alone) and dead_layers(found) == dead_layers(alone), label
    if isinstance(found, Masks):
        assert isinstance(alone, Masks)
        for name, mask in found.items():
            parameter = model.get_parameter(name)
            assert isinstance(mask, DTensor) == isinstance(parameter, DTensor), label
            if isinstance(mask, DTensor) and isinstance(parameter, DTensor):
                assert mask.placements == parameter.placements and mask.shape == parameter.shape, label
                mask = mask.full_tensor()
            assert mask.equal(alone[name]), f"{label} {name}"
    pruned, expected = found.pruned_parameters(model), alone.pruned_parameters(whole)
    assert pruned.keys() == expected.keys(), label
    for name, parameter in pruned.items():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert full.equal(expected[name]) and full.dtype == expected[name].dtype, f"{label} {name}"


def _prunings(rank: int, world_size: int) -> dict[str, bool]:
    return {
        name: _same(model, _net(next(model.parameters()).dtype), name, few=name not in ("fsdp", "mixed"))
        for name, model in _models(world_size).items()
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_prunings_of_dtensors_are_those_of_whole_tensors(world_size: int) -> None:
    """Fails when a rank ranks its shard alone, ties are kept in the order of ranks, or DTensors are a traceback."""
    for found in run_on_ranks(_prunings, world_size, world_size):
        assert all(found.values()) and found


def test_two_dimensional_meshes_prune_as_one_process() -> None:
    """Fails when replicas are counted twice, or the ties of tensors cut along two dimensions are not in their order."""
    for found in run_on_ranks(_on_four, 4, 4):
        assert found == {"hsdp": True, "both": True}
