"""The curve of a model on two ranks, replicated and divided, against one process with all the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import sweep
from sfw_dist.errors import UserError
from tests.support.ranks import error_of, run_on_ranks

SPARSITIES = [0.0, 0.5, 0.8]
SIZES = (7, 7, 7, 3)
"""Of all batches. Rank 0 has the first three, rank 1 the last."""
Batches = list[tuple[Tensor, Tensor]]


def _net(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))


def _batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(7, (n,), generator=generator)) for n in SIZES]


def _own(rank: int) -> Batches:
    return _batches()[3:] if rank else _batches()[:3]


def _state(model: nn.Module) -> list[Tensor]:
    return [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in model.state_dict().values()]


def _rows(model: nn.Module, loader: Sequence[Any], **words: Any) -> list[dict[str, Any]]:
    """The curve, once it is sure that the model is as before."""
    before, modes = _state(model), [module.training for module in model.modules()]
    curve = sweep(model, iter(loader), SPARSITIES, **words)
    assert all(x.equal(y) for x, y in zip(_state(model), before, strict=True)), "the model has changed"
    assert [module.training for module in model.modules()] == modes
    return curve.rows


def _correct(output: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"correct": (output.argmax(1) == labels).float().mean()}


def _on_two(rank: int, world_size: int) -> dict[str, Any]:
    own, everything, mesh = _own(rank), _batches(), init_device_mesh("cpu", (world_size,))
    ddp = DistributedDataParallel(_net())
    sharded = _net()
    fully_shard(sharded[3], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parallel = parallelize_module(_net(nn.LayerNorm), mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
    found = {
        "parts": _rows(_net(), own, calibration=iter(own)),
        "ddp": _rows(ddp, own, calibration=own),
        "sync": _rows(_net(nn.SyncBatchNorm), own, calibration=own),
        "same": _rows(_net(), everything, calibration=everything),
        "fsdp": _rows(sharded, own, calibration=own),
        "fsdp same": _rows(sharded, everything, calibration=everything),
        "parallel": _rows(parallel, everything),
        "one has none": _rows(_net(), [] if rank else everything, metric=_correct),
    }
    lone = dist.new_group([rank], use_local_synchronization=True)
    found["lone"] = _rows(_net(), everything, process_group=lone) if rank else []
    for name, model, loader, sparsities, words in (
        ("other", _net(), own, [0.5] if rank else [0.5, 0.6], {}),
        ("none", _net(), [], [0.5], {}),
        ("none of a part", sharded, own if rank else [], [0.5], {}),
        ("names", _net(), own, [0.5], {"metric": lambda output, _: {f"rank {rank}": 1.0}}),
    ):
        before = _state(model)
        found[name] = error_of(UserError, partial(sweep, **words), model, loader, sparsities)
        assert all(x.equal(y) for x, y in zip(_state(model), before, strict=True)), name
    return found


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return run_on_ranks(_on_two, 2, 2)


def _alone(**words: Any) -> list[dict[str, Any]]:
    return _rows(_net(), _batches(), **words)


def _assert_same(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal, but for a loss's last digits, for its sum has another order."""
    for row, expected in zip(mine, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["parts", "ddp", "sync", "fsdp"])
def test_parts_of_the_data_give_the_curve_of_all(on_two: list[dict[str, Any]], name: str) -> None:
    """Fails when a rank with fewer batches waits, counts one twice, or has its own curve or statistics."""
    first, second = on_two
    assert first[name] == second[name]
    _assert_same(first[name], _alone(calibration=_batches()))


@pytest.mark.parametrize("name", ["same", "fsdp same", "parallel"])
def test_the_same_data_on_each_rank_give_the_same_means(on_two: list[dict[str, Any]], name: str) -> None:
    """Fails when data that every rank has count as another curve."""
    first, second = on_two
    assert first[name] == second[name]
    alone = _rows(_net(nn.LayerNorm), _batches()) if name == "parallel" else _alone(calibration=_batches())
    expected = [{**row, "samples": 2 * row["samples"]} for row in alone]
    if name == "same":
        assert first[name] == expected, "to the bit"
    _assert_same(first[name], expected)


def test_a_rank_may_have_no_data_or_measure_alone(on_two: list[dict[str, Any]]) -> None:
    """Fails when a rank without data does not know the metric's names, or one that is alone waits for the others."""
    first, second = on_two
    assert first["one has none"] == second["one has none"] == _alone(metric=_correct)
    assert second["lone"] == _alone()


def test_every_rank_is_told_what_is_wrong(on_two: list[dict[str, Any]]) -> None:
    """Fails when one rank raises and the others wait for it."""
    for found in on_two:
        assert found["other"].startswith("ranks [1] call sweep with other sparsities, options or another model than")
        assert found["none"].startswith("no batch to measure")
        assert found["none of a part"].startswith("ranks [0] have no batch, and a divided model needs one on each")
        assert found["names"].startswith("metric gives other names on some ranks ([('rank 0',), ('rank 1',)])")
