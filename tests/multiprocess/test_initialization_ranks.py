"""SFW-Init on two real ranks: one process's scales, the same bits on both. The ranks start once and do everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import KSparsePolytope, constrain, sfw_init
from sfw_dist.config import InitConfig
from sfw_dist.distributed.world import World
from sfw_dist.train import trainer as training
from tests.support.ranks import run_on_ranks
from tests.support.training import small_config

SPEC = KSparsePolytope(k_frac=0.1, tau=15)


def net(*, normed: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6) if normed else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), norm, nn.Tanh(), nn.Flatten(), nn.Linear(54, 4))


def half_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 16, 1, 5, 5, generator=generator)
    return [(x, torch.randint(4, (16,), generator=generator)) for x in images]


def learned(model: nn.Module, batches: list[tuple[Tensor, Tensor]], of: nn.Module | None = None) -> dict[str, Any]:
    losses: list[float] = []
    groups = constrain(of or model, SPEC, unconstrained="norm_and_bias")
    groups[-1]["lr"] = 0.1
    scales = sfw_init(model, F.cross_entropy, batches, groups, steps=20, progress=lambda _, loss: losses.append(loss))
    tensors = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    return {"scales": scales, "losses": losses, "weights": tensors}


def on_a_rank(rank: int, runs: str, data: str) -> dict[str, Any]:
    model = net(normed=True)
    found: dict[str, Any] = {"equal": learned(DistributedDataParallel(model), half_batches(), model)}
    found["halves"] = learned(net(normed=False), [(x[rank::2], y[rank::2]) for x, y in half_batches()])
    torch.manual_seed(rank)
    try:
        learned(nn.Linear(4, 4), [])
    except RuntimeError as error:
        found["differ"] = str(error)
    world = World(rank, 2, rank, torch.device("cpu"))
    for engine in ("ddp", "fsdp"):
        config = replace(small_config(Path(runs), Path(data), engine, epochs=1), engine=engine)
        config.init = InitConfig(steps=4)
        assert training.train(config, world) == 0
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[dict[str, Any]]:
    runs = tmp_path_factory.mktemp("init") / "runs"
    return [{**found, "runs": runs} for found in run_on_ranks(on_a_rank, 2, str(runs), str(digits))]


def test_from_equal_batches_two_ranks_learn_one_processes_bits(ranks: list[dict[str, Any]]) -> None:
    """Fails when a mean over ranks is missing, or taken twice; through DistributedDataParallel too."""
    alone = learned(net(normed=True), half_batches())
    for rank in ranks:
        assert rank["equal"]["scales"] == alone["scales"] and rank["equal"]["losses"] == alone["losses"]
        assert all(torch.equal(rank["equal"]["weights"][name], w) for name, w in alone["weights"].items())


def test_from_halves_of_the_batches_they_learn_its_scales(ranks: list[dict[str, Any]]) -> None:
    """Fails when a rank's own gradient decides on its vertex or its step, or the ranks end with different bits."""
    alone = learned(net(normed=False), half_batches())
    assert ranks[0]["halves"]["scales"] == ranks[1]["halves"]["scales"]
    assert ranks[0]["halves"]["scales"] == pytest.approx(alone["scales"], rel=1e-5)
    assert ranks[0]["halves"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_ranks_with_other_weights_are_told(ranks: list[dict[str, Any]]) -> None:
    """Fails when one set of scales is learned for different networks."""
    assert all("weight on rank 1" in rank["differ"] for rank in ranks)


def test_a_run_learns_the_same_whatever_divides_the_network_afterwards(ranks: list[dict[str, Any]]) -> None:
    """Fails when an engine has taken the network apart before it is scaled."""
    found = []
    for engine in ("ddp", "fsdp"):
        lines = (ranks[0]["runs"] / engine / "metrics.jsonl").read_text().splitlines()
        found += [e["scales"] for e in map(json.loads, lines) if "scales" in e]
    assert len(found) == 2 and found[0] == found[1] and found[0]["0.weight"] != 1
