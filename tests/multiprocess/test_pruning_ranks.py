"""Pruning of DTensors on two to four ranks, against one process that has the whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from sfw_dist.distributed.rank_group import RankGroup
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
from sfw_dist.pruning.recalibration import recalibrated_statistics
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


def _batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(6, 3, 5, 5) + i, torch.zeros(6)) for i in range(3)]


def _divided(model: nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def _fsdp2(mesh: DeviceMesh) -> dict[str, Any]:
    """From a forward pass over pruning and recalibration to the numbers in a report."""
    batches, model, whole = _batches(), _net(), _net()
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh)
    found: dict[str, Any] = {}
    flops = count_flops(model, batches[0][0])
    found["counted"] = _divided(model)
    with torch.no_grad():
        model(batches[0][0])
        whole(batches[0][0])
    assert not _divided(model), "a forward pass leaves the root's parameters whole"
    with CommDebugMode() as traffic:
        masks, alone = prune(model, 0.5), prune(whole, 0.5)
        Pruner(model, PruningOptions(granularity="filter")).at(0.5)
        Pruner(model, PruningOptions(granularity="2:4")).at(0.5)
    found["masks"] = all(isinstance(mask, DTensor) for mask in masks.values())
    found["traffic"] = sorted(str(operation) for operation in traffic.get_comm_counts())
    found["flops"] = (flops, kept_flops(flops, masks)) == (count_flops(whole, batches[0][0]), kept_flops(flops, alone))
    found["pruned"] = _equal(_state(model), _state(whole)) and _divided(model)
    before = _state(model)
    found["failed"] = error_of(RuntimeError, recalibrate, model, [*batches, torch.zeros(2, 5, 5, 5)])
    found["restored"] = _equal(_state(model), before)
    assert recalibrate(model, batches) == recalibrate(whole, batches) == 3
    found["recalibrated"] = _equal(_state(model), _state(whole)) and _divided(model)
    many = recalibrated_statistics(model, [masks, masks], batches, RankGroup.of(None), same_batches=True)
    single = recalibrated_statistics(whole, [alone, alone], batches, RankGroup.alone())
    counts = [statistics.pop("1.num_batches_tracked") for statistics in (*many, *single)]
    found["many"] = all(_equal(*pair) for pair in zip(many, single, strict=True)) and _divided(model)
    found["counts"] = [int(count) for count in counts]
    return found


def _faults_in_one_shard(mesh: DeviceMesh) -> dict[str, Any]:
    """What each rank is told where the shard of one of them alone cannot be pruned."""
    model, found = fully_shard(_net(), mesh=mesh), {}
    before = _state(model)
    scores = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    signed = {name: score.clone() for name, score in scores.items()}
    if mesh.get_rank() == mesh.size() - 1:
        scores["2.weight"][-1] = torch.nan
        signed["2.weight"][-1] = -1.0
    found["scores"] = error_of(UserError, partial(prune, scores=scores), model, 0.5)
    found["negative"] = error_of(UserError, partial(prune, scores=signed, granularity="filter"), model, 0.5)
    found["unchanged"] = _equal(_state(model), before)
    with torch.no_grad():
        local = model.get_parameter("4.weight").to_local()
    for value, key, words in ((torch.inf, "infinite", {"granularity": "rank"}), (torch.nan, "nan", {})):
        if mesh.get_rank() == 0:
            local[0, 0] = value
        found[key] = error_of(UserError, partial(prune, **words), model, 0.5)
    unsummed = nn.Linear(4, 2)
    unsummed.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Partial()]))
    found["partial"] = error_of(UserError, prune, unsummed, 0.5)
    return found


def _other_wrappers(mesh: DeviceMesh) -> dict[str, bool]:
    """DDP, BatchNorm whose buffers are DTensors, tensor parallelism, and FSDP1."""
    batches, copies = _batches(), _net()
    replicated = DistributedDataParallel(copies)
    # After DDP has made the buffers equal: a forward pass through it would do so again.
    copies.register_buffer("own", torch.tensor(float(mesh.get_rank())))
    copies[1].running_mean.fill_(float(mesh.get_rank()))  # type: ignore[union-attr, operator]
    alone, before = copy.deepcopy(copies), _state(copies)
    error_of(RuntimeError, recalibrate, replicated, [*batches, torch.zeros(2, 5, 5, 5)])
    found = {"ddp restored": _equal(_state(copies), before)}
    for model in (alone, replicated):
        recalibrate(model, batches[mesh.get_rank() :])  # other batches on each rank
    found["ddp own"] = _equal(_state(copies), _state(alone))

    norms = distribute_module(_net(), mesh)
    recalibrate(norms, [distribute_tensor(x, mesh, [Replicate()]) for x, _ in batches])
    recalibrate(whole := _net(), batches)
    found["buffers"] = _equal(_state(norms), _state(whole)) and isinstance(norms[1].running_mean, DTensor)

    parallel = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    flops = count_flops(parallel, torch.zeros(1, 8))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found["parallel flops"] = count_flops(parallel, torch.zeros(1, 8)) == flops

    for keep_names in (True, False):
        whole = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        flat = FullyShardedDataParallel(whole, use_orig_params=keep_names, device_id=torch.device("cpu"))
        lines = [error_of(UserError, partial(prune, scope=scope), flat, 0.5) for scope in ("weights", "all")]
        found[f"fsdp1 {keep_names}"] = all("keeps it flat (FSDP1, ZeRO 3)" in line for line in lines)
        with FullyShardedDataParallel.summon_full_params(flat):
            found[f"summoned {keep_names}"] = prune(flat, 0.5).kept == 9
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


def _on_two(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        "fsdp2": _fsdp2(mesh),
        "faults": _faults_in_one_shard(mesh),
        "wrappers": _other_wrappers(mesh),
        "page": _page(rank, world_size),
    }


@pytest.fixture(scope="module")
def on_two() -> dict[str, dict[str, Any]]:
    first, second = run_on_ranks(_on_two, 2, 2)
    assert first == second
    return first  # type: ignore[no-any-return]


def test_fsdp2_prunes_and_recalibrates_as_one_process(on_two: dict[str, dict[str, Any]]) -> None:
    """Fails when whole copies that a forward pass left are pruned, and lost; or when a weight is gathered."""
    found = on_two["fsdp2"]
    for key in ("counted", "masks", "flops", "pruned", "restored", "recalibrated", "many"):
        assert found[key] is True, key
    assert found["traffic"] and all("allreduce" in operation for operation in found["traffic"]), found["traffic"]
    assert "channels" in found["failed"]
    assert found["counts"] == [6, 6, 3, 3], "the batches of both ranks"


def test_ranks_agree_on_what_is_wrong_in_one_shard(on_two: dict[str, dict[str, Any]]) -> None:
    """Fails when one rank raises and the others wait for it, or an error is a traceback out of torch."""
    found = on_two["faults"]
    assert found["unchanged"] is True
    assert found["scores"].startswith("scores['2.weight'] is not finite")
    assert found["negative"].startswith("scores['2.weight'] has negative entries")
    assert found["infinite"].startswith("4.weight is not finite")
    assert found["nan"].startswith("4.weight holds NaN")
    assert found["partial"].startswith("weight is a DTensor with placements (Partial(sum),): redistribute")
    assert not any("\n" in str(line) for line in found.values())


def test_other_wrappers_are_served_or_refused(on_two: dict[str, dict[str, Any]]) -> None:
    """Fails when DDP sends buffers meanwhile, DTensors of BatchNorm are left out, or FSDP1's flat one is pruned."""
    assert all(on_two["wrappers"].values()), on_two["wrappers"]


def test_the_manuals_block_runs_on_two_ranks(on_two: dict[str, dict[str, Any]]) -> None:
    """Fails when the manual's lines for FSDP2 do not prune, or count a rank's shard alone."""
    assert on_two["page"] == {"counts": [158, 1584], "norm": 2}
