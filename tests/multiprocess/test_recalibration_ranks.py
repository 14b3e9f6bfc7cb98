"""Recalibrated statistics and what follows from them, on one, two and three ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.distributed.world import World
from sfw_dist.evaluate.pruned_models import PrunedModels
from sfw_dist.evaluate.sparsity_search import search_run
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.pruning.recalibration import recalibrated_statistics
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.support.pruning import compute_masks
from tests.support.ranks import run_on_ranks
from tests.support.training import ONE_PROCESS, small_config


def _world(rank: int, world_size: int) -> World:
    return World(rank, world_size, local_rank=rank, device=torch.device("cpu"))


def _statistics(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Of five networks, then of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
    batches = [3 * torch.randn(7, 3, 8, 8) + i for i in range(4)]
    masks = [compute_masks(model, sparsity) for sparsity in (0.0, 0.5, 0.8, 0.9, 0.95)]
    ranks = _world(rank, world_size).ranks
    return [
        found
        for some in (masks, masks[:2])
        for found in recalibrated_statistics(model, some, batches, ranks, same_batches=True)
    ]


def test_every_rank_has_the_bits_of_one_process() -> None:
    """A curve depends on how many ranks drew it. Of two networks the third of three ranks has none to measure."""
    alone = _statistics(0, 1)
    for rank, found in enumerate(run_on_ranks(_statistics, 3, 3)):
        for mine, theirs in zip(found, alone, strict=True):
            assert mine.keys() == theirs.keys(), rank
            assert all(mine[name].equal(tensor) and mine[name].dtype == tensor.dtype for name, tensor in theirs.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunFolder:
    config = small_config(tmp_path_factory.mktemp("runs"), digits, epochs=3)
    assert train(config, ONE_PROCESS) == 0
    return RunFolder(config.run_dir)


def _both_commands(rank: int, world_size: int, folder: str) -> str:
    """What a sweep and a search answer, as JSON."""
    run, world = RunFolder(Path(folder)), _world(rank, world_size)
    sweep = sweep_run(run, world, sparsities=[0.0, 0.5, 0.8])
    return json.dumps({"sweep": sweep, "search": search_run(run, world, 5.0)})


def test_commands_answer_the_same_on_two_ranks(run: RunFolder) -> None:
    """Ranks recalibrate on other batches; or each decides by its own images, and they wait for each other for ever."""
    alone = json.loads(_both_commands(0, 1, str(run.path)))
    assert all(result["top1_recalibrated"] is not None for result in alone["sweep"])
    first, second = map(json.loads, run_on_ranks(_both_commands, 2, 2, str(run.path)))
    assert first == second
    for key in ("sweep", "search"):
        _assert_same(first[key], alone[key])
    assert json.loads((run.prune / "max_drop_5.0.json").read_text()) == first["search"]


def _assert_same(mine: Any, theirs: Any, key: str = "") -> None:
    """Equal, but for the last digits of a loss, which is summed in another order."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            _assert_same(mine[name], theirs[name], name)
    elif isinstance(theirs, list):
        for one, other in zip(mine, theirs, strict=True):
            _assert_same(one, other, key)
    else:
        assert mine == (pytest.approx(theirs, rel=1e-6) if key.startswith("loss") else theirs), key


def test_the_batches_of_a_rank_are_those_of_one_process(run: RunFolder) -> None:
    """A rank's share of the training images would give each network other statistics."""
    alone = PrunedModels(run, ONE_PROCESS)
    second = PrunedModels(run, _world(1, 2))
    assert alone.batches == second.batches == 10
    pairs = zip(alone._training_batches(), second._training_batches(), strict=True)
    assert all(mine.equal(theirs) for mine, theirs in pairs)
    again = zip(alone._training_batches(), alone._training_batches(), strict=True)
    assert all(first.equal(second) for first, second in again)
    alone.close()
    second.close()
