"""The engines on real ranks: the same losses and weights, and checkpoints that any of them takes from any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sfw_dist.config import Config
from sfw_dist.distributed.world import World
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.models import build_model
from sfw_dist.train import checkpoint
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.signals import SignalHandler
from sfw_dist.train.strategies import Strategy, build_strategy
from sfw_dist.train.trainer import train
from tests.support.ranks import run_on_ranks
from tests.support.training import ONE_PROCESS, small_config

ENGINES = ("ddp", "fsdp", "deepspeed")
OPTIMIZERS = {"sfw": 0.3, "sgd": 0.05}
BATCH, STEPS = 24, 3
"""Steps between two interruptions of the chain below."""


class Plain(nn.Module):
    """Without BatchNorm, whose statistics depend on how many ranks share a batch; with a parameter of the root's own.

    Of three ranks that divide it one has no row of ``inner`` and of ``scale``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(360, 10))
        self.inner = nn.Linear(10, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(2, 10)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        logits: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.outer(x)))) * self.scale)
        return logits


def _world() -> World:
    if not dist.is_initialized():
        return ONE_PROCESS
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def _config(engine: str, optimizer: str = "sfw", *, replicas: int = 1, **train_options: Any) -> Config:
    config = small_config(Path("runs"), Path("data"), lr=OPTIMIZERS[optimizer])
    config.optimizer.name = optimizer  # type: ignore[assignment]
    train_config = replace(config.train, **train_options)
    return replace(config, engine=engine, fsdp=replace(config.fsdp, replicas=replicas), train=train_config)


def _open(config: Config, build: Callable[[], nn.Module] | None = None) -> Strategy:
    torch.manual_seed(0)
    model = build() if build else build_model("cnn", num_classes=10, in_channels=1, width=0.0625)
    engine = build_strategy(model, config, _world())
    engine.warm_up((1, 8, 8))
    return engine


def _steps(engine: Strategy, first: int, last: int) -> list[float]:
    """This rank's losses."""
    world, losses = _world(), []
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 1, 8, 8, generator=draw).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (BATCH,), generator=draw)
        losses.append(engine.train_step(images[world.rank :: world.size], labels[world.rank :: world.size]).item())
    return losses


def _whole(engine: Strategy) -> dict[str, Tensor]:
    """All that a checkpoint holds, as whole tensors."""
    tensors = engine.tensors()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def _save(engine: Strategy, folder: str, step: int) -> None:
    checkpoint.save(Path(folder), engine.tensors(), {"options": engine.options()}, _world(), epoch=0, step=step)


def _resume(config: Config, folder: str) -> Strategy:
    engine = _open(config, Plain)
    path = checkpoint.newest(Path(folder))
    assert path is not None
    tensors, state = checkpoint.load(path, lambda stored: engine.allocate(stored, path))
    engine.load(tensors, state["options"], path)
    return engine


def _apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in theirs)


# On two ranks

CASES = [
    {},
    {"optimizer": "sgd"},
    {"precision": "bf16"},
    {"accumulate": 3},
    {"optimizer": "sgd", "accumulate": 2},
]


def _case(engine: str, case: dict[str, Any]) -> str:
    return " ".join([engine, *(f"{key}={value}" for key, value in case.items())])


def on_two_ranks(rank: int, folder: str, digits: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ENGINES:
        for case in CASES:
            engine = _open(_config(name, **case))
            found[_case(name, case)] = {"losses": _steps(engine, 0, 4), "tensors": _whole(engine)}
    owners = _config("ddp", accumulate=3)
    owners.optimizer = replace(owners.optimizer, grads="reduce_to_owner")
    found["owners"] = {"losses": _steps(engine := _open(owners), 0, 4), "tensors": _whole(engine)}
    found["types"] = _types_that_compute(_open(_config("fsdp", precision="bf16")))
    for name in ENGINES:
        engine = _open(_config(name), Plain)
        _steps(engine, 0, STEPS)
        _save(engine, f"{folder}/{name}2", STEPS)
        if name == "ddp":  # and on, as if nothing had happened
            _steps(engine, STEPS, 3 * STEPS)
            found["uninterrupted"] = _whole(engine)
    found["status"] = train(_run_config(folder, digits, "ddp"), _world(), signals=Soon())
    return found


def _types_that_compute(engine: Strategy) -> list[str]:
    """Of the first two modules' weights in a forward pass, and then of the first's gradient."""
    found: list[str] = []
    convolution, norm = list(engine.model.children())[:2]
    for module in (convolution, norm):
        module.register_forward_pre_hook(lambda module, *_: found.append(str(module.weight.dtype)))
    _steps(engine, 0, 1)
    return [*found, str(convolution.weight.grad.dtype)]


class Soon(SignalHandler):
    """Ctrl-C in the fourth step: the training looks before the epoch, and after each step."""

    def __init__(self) -> None:
        self.looks = 0

    @property
    def stop_requested(self) -> bool:
        self.looks += 1
        return self.looks > 4


def _run_config(folder: str, digits: str, engine: str) -> Config:
    config = small_config(Path(folder) / "runs", Path(digits), "moved", epochs=2)
    # Of three ranks one has an eleventh batch of the test set, and a fourth one of the validation set.
    return replace(config, engine=engine, data=replace(config.data, eval_batch_size=15))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def two(folder: str, digits: Path) -> list[dict[str, Any]]:
    return run_on_ranks(on_two_ranks, 2, folder, str(digits))


@pytest.mark.parametrize("case", CASES, ids=lambda case: _case("", case).strip() or "sfw")
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_on_two_ranks_the_engines_agree_to_the_bit(
    two: list[dict[str, Any]], engine: str, case: dict[str, Any]
) -> None:
    """Fails when an engine averages, rounds or steps otherwise than DDP, or leaves BatchNorm's statistics elsewhere.

    Bitwise, for a sum of two numbers has only one order, and halving it is exact. From three ranks on it has several.
    """
    for rank in range(2):
        mine, theirs = two[rank][_case(engine, case)], two[rank][_case("ddp", case)]
        assert mine["losses"] == theirs["losses"]
        assert _apart(mine["tensors"], theirs["tensors"]) == 0


def test_weights_travel_as_autocast_would_round_them(two: list[dict[str, Any]]) -> None:
    """Fails when fsdp gathers float32 for a pass in bf16, twice the bytes, or BatchNorm in less than float32."""
    assert two[0]["types"] == ["torch.bfloat16", "torch.float32", "torch.float32"]


def test_micro_batches_with_gradients_to_owners(two: list[dict[str, Any]]) -> None:
    """Fails when the step begins with the gradients of the first micro-batch, or each is reduced."""
    mine, theirs = two[0]["owners"], two[0][_case("ddp", {"accumulate": 3})]
    assert mine["losses"] == theirs["losses"]
    assert _apart(mine["tensors"], theirs["tensors"]) == 0


def test_micro_batches_add_up_to_the_batch() -> None:
    """Fails when gradients of micro-batches are summed instead of averaged, or the loss is that of the last alone."""
    whole, pieces = (_open(_config("ddp", accumulate=n), Plain) for n in (1, 4))
    assert _steps(pieces, 0, 3) == pytest.approx(_steps(whole, 0, 3), abs=1e-6)
    tensors = _whole(pieces)
    assert tensors["model.seen"] == 12
    assert _apart(tensors | {"model.seen": torch.tensor(3)}, _whole(whole)) < 1e-5


# On three, from what two left


def on_three_ranks(rank: int, folder: str, digits: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for before in ENGINES:
        for name in ENGINES:
            engine = _resume(_config(name), f"{folder}/{before}2")
            _steps(engine, STEPS, 2 * STEPS)
            _save(engine, f"{folder}/{before}2_{name}3", 2 * STEPS)
            shards = [t.to_local().numel() for t in engine.tensors().values() if isinstance(t, DTensor)]
            found[f"{before} {name} empty shards"] = shards.count(0)
    found["status"] = train(_run_config(folder, digits, "fsdp"), _world(), resume=True)
    return found


@pytest.fixture(scope="module")
def three(two: list[dict[str, Any]], folder: str, digits: Path) -> list[dict[str, Any]]:
    return run_on_ranks(on_three_ranks, 3, folder, str(digits))


def test_more_ranks_than_rows_are_met(three: list[dict[str, Any]]) -> None:
    """Fails when the network of these tests no longer has tensors of which a rank has nothing."""
    assert three[2]["ddp fsdp empty shards"] >= 3


@pytest.mark.parametrize("second", ENGINES)
@pytest.mark.parametrize("first", ENGINES)
def test_a_run_goes_on_by_other_engines_on_other_numbers_of_ranks(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: str, first: str, second: str
) -> None:
    """Two ranks, then three, then one: fails when weights, momentum, buffers or rates are lost or put elsewhere.

    Up to the order of sums, which depends on the number of ranks.
    """
    engine = _resume(_config("ddp"), f"{folder}/{first}2_{second}3")
    _steps(engine, 2 * STEPS, 3 * STEPS)
    assert _apart(_whole(engine), two[0]["uninterrupted"]) < 1e-5


def test_a_run_changes_its_engine_and_all_else_stays(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: str, digits: Path
) -> None:
    """Fails when ranks with fewer batches to evaluate leave the others waiting, or their makeshift passes count.

    And when the final weights are not the whole network's: one process measures the same by them.
    """
    assert [found["status"] for found in (*two, *three)] == [130, 130, 0, 0, 0]
    run = RunFolder(Path(folder) / "runs" / "moved")
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] != "train"] == [
        *("start", "interrupted", "resume", "epoch", "epoch", "eval"),
    ]
    assert [e["engine"] for e in events if e["event"] in ("start", "resume")] == ["ddp", "fsdp"]
    assert {e["validation_samples"] for e in events if e["event"] == "epoch"} == {136}
    measured = events[-1]
    alone = sweep_run(run, ONE_PROCESS, sparsities=[0.0])[0]
    assert measured["samples"] == alone["samples"] == 451
    assert measured["top1"] == alone["top1"]
    assert measured["loss"] == pytest.approx(alone["loss"], rel=1e-5)


# On four: two replicas of two shards


def on_four_ranks(rank: int, folder: str) -> dict[str, Any]:
    config = _config("fsdp", replicas=2)
    engine = _resume(config, f"{folder}/ddp2")
    _steps(engine, STEPS, 3 * STEPS)
    engine.verify_replicas()
    tensors, weights = _whole(engine), engine.weights()
    _save(engine, f"{folder}/ddp2_hsdp4", 3 * STEPS)
    if rank == 3:
        next(engine.model.parameters()).data.to_local().view(-1)[0] += 1  # type: ignore[attr-defined]
    try:
        engine.verify_replicas()
        said = ""
    except RuntimeError as error:
        said = str(error)
    return {"tensors": tensors, "weights": weights, "said": said}


@pytest.fixture(scope="module")
def four(two: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    return run_on_ranks(on_four_ranks, 4, folder)


def test_two_replicas_of_two_shards_go_on_alike(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    """Fails when gradients are not averaged over both dimensions of the grid of ranks."""
    for found in four:
        assert _apart(found["tensors"], two[0]["uninterrupted"]) < 1e-5


def test_each_shard_is_written_once(four: list[dict[str, Any]], folder: str) -> None:
    """Fails when a replica's shards are missing in a checkpoint, or lie over the others'."""
    path = checkpoint.newest(Path(folder) / "ddp2_hsdp4")
    assert path is not None
    assert _apart(checkpoint.load(path)[0], four[0]["tensors"]) == 0


def test_whole_weights_are_on_rank_0_alone(four: list[dict[str, Any]]) -> None:
    """Fails when every rank needs memory for the whole network at the end of a run."""
    assert [len(found["weights"]) for found in four] == [len(Plain().state_dict()), 0, 0, 0]
    assert all(torch.equal(t, four[0]["tensors"][f"model.{n}"]) for n, t in four[0]["weights"].items())


def test_replicas_that_differ_are_named_and_all_ranks_stop(four: list[dict[str, Any]]) -> None:
    """Fails when the ranks that hold other shards go on, and wait for ever for those that stopped."""
    assert all("replicas differ" in found["said"] for found in four)
    assert "scale on rank 3" in four[1]["said"] == four[3]["said"]
