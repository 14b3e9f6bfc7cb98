"""Pruning of DTensors on two and three ranks, against one process that has the whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.pruning import (
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
from tests.docs.pages import ROOT, blocks
from tests.support.ranks import error_of, run_on_ranks

SPARSITIES = (0.0, 0.31, 0.77)
FEW_WORDS: tuple[dict[str, str], ...] = (
    {"scope": "all"},
    {"ranking": "layerwise"},
    {"granularity": "2:4"},
    {"granularity": "filter"},
)
WORDS = (
    *FEW_WORDS,
    {},
    {"ranking": "layerwise", "scope": "all"},
    {"granularity": "filter", "ranking": "layerwise", "scope": "all"},
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
    """The same network, divided along one dimension in several ways."""
    mesh = init_device_mesh("cpu", (world_size,))
    fsdp = _net()
    for layer in (fsdp[0], fsdp[2], fsdp):
        fully_shard(layer, mesh=mesh)
    half = fully_shard(_net(torch.bfloat16), mesh=mesh)
    double = fully_shard(_net(torch.float64), mesh=mesh)
    columns: dict[str, list[Placement]] = {"2.weight": [Shard(1)], "4.weight": [Shard(1)], "0.weight": [Shard(0)]}
    mixed = _placed(_net(), mesh, {**columns, "4.bias": [Replicate()]})  # other parameters are whole tensors
    return {"fsdp": fsdp, "bfloat16": half, "float64": double, "mixed": mixed}


def _on_four(rank: int, world_size: int) -> dict[str, bool]:
    """Two by two ranks: replicas of shards, tensors cut along two dimensions, and several meshes in one model."""
    grid, line = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), init_device_mesh("cpu", (4,))
    hsdp = fully_shard(_net(), mesh=grid)
    places: dict[str, list[Placement]] = {
        "0.weight": [Replicate(), Shard(0)],
        "2.weight": [Shard(0), Shard(1)],
        "4.weight": [Shard(0), Replicate()],
    }
    both = _placed(_placed(_net(), grid, places), line, {"5.weight": [Shard(1)], "1.weight": [Shard(0)]})
    # Tensor parallelism under FSDP2: 8 rows are cut in 2 and again in 2; of 2 rows, two ranks have none.
    rows: dict[str, list[Placement]] = {f"{i}.weight": [Shard(0)] for i in (0, 4, 5)}
    parallel = _placed(_net(), grid["tp"], {**rows, "2.weight": [Shard(1)]})
    fully_shard(parallel, mesh=grid["dp"])
    models = {"hsdp": hsdp, "both": both, "parallel": parallel}
    return {name: _same(model, _net(), name, few=True) for name, model in models.items()}


def _same(model: nn.Module, whole: nn.Module, label: str, few: bool = False) -> bool:
    """Whether prunings are those of the whole tensors, to the bit; raises where they are not."""
    for words in FEW_WORDS if few else WORDS:
        options = PruningOptions(**words)  # type: ignore[arg-type]
        divided, alone = Pruner(model, options), Pruner(whole, options)
        for sparsity in (0.5,) if few or words.get("granularity") == "2:4" else SPARSITIES:
            _compare(divided.at(sparsity), alone.at(sparsity), model, whole, f"{label} {words} {sparsity}")
    for dtype, ranking in ((torch.float32, "global"), (torch.float64, "layerwise"), (torch.int8, "global")):
        options = PruningOptions(ranking=ranking)  # type: ignore[arg-type]
        given = _scores(whole, dtype)
        expected = Pruner(whole, options, scores=given).at(0.6)
        # Whole tensors, and a DTensor that lies otherwise than its parameter.
        place = model.get_parameter("2.weight")
        assert isinstance(place, DTensor)
        replicas = [Replicate()] * place.device_mesh.ndim
        given = {**given, "2.weight": distribute_tensor(given["2.weight"], place.device_mesh, replicas)}
        _compare(Pruner(model, options, scores=given).at(0.6), expected, model, whole, f"{label} {dtype} {ranking}")
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


def test_prunings_of_dtensors_are_those_of_whole_tensors() -> None:
    """Fails when a rank ranks its shard alone, ties are kept in the order of ranks, or DTensors are a traceback."""
    for found in run_on_ranks(_prunings, 3, 3):
        assert found == {"fsdp": True, "bfloat16": True, "float64": True, "mixed": True}


def test_two_dimensional_meshes_prune_as_one_process() -> None:
    """Fails when replicas are counted twice, or the ties of tensors cut along two dimensions are not in their order."""
    for found in run_on_ranks(_on_four, 4, 4):
        assert found == {"hsdp": True, "both": True, "parallel": True}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors, as copies."""
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.detach().clone()
        for name, x in model.state_dict().items()
    }


def _equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(x.equal(theirs[name]) for name, x in mine.items())


def _one_model(rank: int, world_size: int) -> dict[str, Any]:
    """FSDP2 from a forward pass over pruning and recalibration to the numbers in a report; and what is refused."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 5, 5) + i, torch.zeros(6)) for i in range(3)]
    model, whole = _net(), _net()
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh)
    found: dict[str, Any] = {}
    flops = count_flops(model, batches[0][0])
    found["counted"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        model(batches[0][0])  # leaves the root's parameters whole
        whole(batches[0][0])
    found["counted"] &= not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with CommDebugMode() as traffic:
        masks, alone = prune(model, 0.5), prune(whole, 0.5)
        Pruner(model, PruningOptions(granularity="filter")).at(0.5)
        Pruner(model, PruningOptions(granularity="2:4")).at(0.5)
    found["masks"] = all(isinstance(mask, DTensor) for mask in masks.values())
    found["traffic"] = sorted(str(operation) for operation in traffic.get_comm_counts())
    found["flops"] = (flops, kept_flops(flops, masks)) == (count_flops(whole, batches[0][0]), kept_flops(flops, alone))
    found["pruned"] = _equal(_state(model), _state(whole)) and not any(
        isinstance(p, DTensor) is False for p in model.parameters()
    )
    before = _state(model)
    found["failed"] = error_of(RuntimeError, recalibrate, model, [*batches, torch.zeros(2, 5, 5, 5)])
    found["restored"] = _equal(_state(model), before)
    assert recalibrate(model, batches) == recalibrate(whole, batches) == 3
    found["recalibrated"] = _equal(_state(model), _state(whole))
    found["sharded"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    norms = batch_norms(model)
    assert len(norms) == 1

    found["page"] = _page(rank, world_size)
    world = World(rank, world_size, local_rank=rank, device=torch.device("cpu"))
    found["many"] = error_of(UserError, recalibrated_statistics, model, [masks], batches, world)
    before = _state(model)
    scores = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    if rank == world_size - 1:
        scores["2.weight"][-1] = torch.nan  # in the shard of the last rank alone
    found["scores"] = error_of(UserError, lambda: prune(model, 0.5, scores=scores))
    found["negative"] = error_of(
        UserError,
        lambda: prune(model, 0.5, granularity="filter", scores={n: -s.nan_to_num(1) for n, s in scores.items()}),
    )
    found["unchanged"] = _equal(_state(model), before)
    with torch.no_grad():
        local = model.get_parameter("4.weight").to_local()
        if rank == 0:
            local[0, 0] = torch.inf
    found["infinite"] = error_of(UserError, lambda: prune(model, 0.5, granularity="rank"))
    if rank == 0:
        local[0, 0] = torch.nan
    found["nan"] = error_of(UserError, lambda: prune(model, 0.5))

    copies, last = _net(), torch.zeros(2, 5, 5, 5)
    replicated = DistributedDataParallel(copies)
    # After DDP has made the buffers equal: a forward pass through it would do so again.
    copies.register_buffer("own", torch.tensor(float(rank)))
    copies[1].running_mean.fill_(float(rank))
    before = {name: buffer.clone() for name, buffer in copies.named_buffers()}
    error_of(RuntimeError, recalibrate, replicated, [*batches, last])
    found["ddp restored"] = all(buffer.equal(before[name]) for name, buffer in copies.named_buffers())
    expected = copy.deepcopy(copies)
    recalibrate(expected, batches[rank:])
    recalibrate(replicated, batches[rank:])  # other batches on each rank
    found["ddp own"] = all(buffer.equal(expected.get_buffer(name)) for name, buffer in copies.named_buffers())

    unsummed = nn.Linear(4, 2)
    unsummed.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Partial()]))
    found["partial"] = error_of(UserError, lambda: prune(unsummed, 0.5))
    whole = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    on_cpu = torch.device("cpu")
    for keep_names in (True, False):
        flat = FullyShardedDataParallel(copy.deepcopy(whole), use_orig_params=keep_names, device_id=on_cpu)
        lines = [error_of(UserError, partial(prune, scope=scope), flat, 0.5) for scope in ("weights", "all")]
        found[f"fsdp1 {keep_names}"] = all("keeps it flat (FSDP1, ZeRO 3)" in line for line in lines)
        with FullyShardedDataParallel.summon_full_params(flat):
            found[f"summoned {keep_names}"] = prune(flat, 0.5).kept
    return found


def _page(rank: int, world_size: int) -> dict[str, Any]:
    """The block of the manual, with a network and a loader of the reader's."""
    page = ROOT / "docs/how-to/prune-and-evaluate.md"
    (block,) = [block for block in blocks(page) if "fully_shard" in block.text]
    torch.manual_seed(0)
    names: dict[str, Any] = {"net": _net(), "loader": [(torch.randn(4, 3, 5, 5), torch.zeros(4)) for _ in range(2)]}
    exec(block.text, names)
    masks = names["masks"]
    return {"counts": [masks.kept, masks.total], "norm": int(names["net"][1].num_batches_tracked)}


def test_fsdp2_prune_and_recalibrate_as_one_process() -> None:
    """Fails when whole copies that a forward pass left are pruned, and lost; or when ranks disagree on an error."""
    first, second = run_on_ranks(_one_model, 2, 2)
    assert first["page"] == {"counts": [158, 1584], "norm": 2}
    assert first == second
    for key in (
        "flops",
        "counted",
        "masks",
        "pruned",
        "fsdp1 True",
        "fsdp1 False",
        "ddp restored",
        "ddp own",
        "restored",
        "recalibrated",
        "sharded",
        "unchanged",
    ):
        assert first[key] is True, key
    assert first["traffic"] and all("allreduce" in operation for operation in first["traffic"]), first["traffic"]
    assert "channels" in first["failed"]
    assert first["many"].startswith("0.weight is a DTensor with placements (Shard(dim=0),)")
    assert first["scores"].startswith("scores['2.weight'] is not finite")
    assert first["negative"].startswith("scores['0.weight'] has negative entries")
    assert first["infinite"].startswith("4.weight is not finite")
    assert first["nan"].startswith("4.weight holds NaN")
    assert first["partial"].startswith("weight is a DTensor with placements (Partial(sum),): redistribute")
    assert [first[f"summoned {keep_names}"] for keep_names in (True, False)] == [9, 9]
    assert not any("\n" in first[key] for key in ("many", "scores", "negative", "infinite", "nan", "partial"))
