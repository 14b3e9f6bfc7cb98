"""The engines' common parts, in one process: what is gathered together, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sfw_dist.config import Config, DataConfig, FSDPConfig, TrainConfig
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.train.strategies import build_strategy, check_world
from sfw_dist.train.strategies.fsdp import modules_to_shard
from tests.support.training import ONE_PROCESS


def config(engine: str = "ddp", *, batch: int = 120, replicas: int = 1, accumulate: int = 1) -> Config:
    return Config(
        name="x",
        engine=engine,  # type: ignore[arg-type]
        data=DataConfig(batch_size=batch),
        train=TrainConfig(accumulate=accumulate),
        fsdp=FSDPConfig(replicas=replicas),
    )


# What is gathered together


def entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def at_once(model: nn.Module) -> float:
    """The greatest fraction of the network that is whole on a rank while one part computes, with those around it."""
    alone, total = set(modules_to_shard(model)), entries(model)

    def own(module: nn.Module) -> int:
        below = sum(own(child) for child in module.children() if child not in alone)
        return below + sum(parameter.numel() for parameter in module.parameters(recurse=False))

    def path(module: nn.Module, held: int) -> int:
        held += own(module) if module in alone or module is model else 0
        return max([held, *(path(child, held) for child in module.children())])

    return path(model, 0) / total


@pytest.mark.parametrize(
    ("name", "most"),
    [("resnet18", 0.22), ("vgg16", 0.17), ("torchvision/vit_b_16", 0.09), ("torchvision/resnet50", 0.11)],
)
def test_only_a_part_of_a_network_is_whole_at_a_time(name: str, most: float) -> None:
    """Fails when a large part, such as all of a transformer's layers, is gathered at once: fsdp then saves nothing."""
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    assert at_once(model) <= most
    assert len(modules_to_shard(model)) < 30  # and not each tensor alone


def test_what_is_gathered_is_called() -> None:
    """Fails when attention's projection, whose weights torch takes without calling it, stays in shards."""
    with torch.device("meta"):
        model = nn.ModuleDict({"only": nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 80)])})
    assert [type(part).__name__ for part in modules_to_shard(model)] == ["TransformerEncoderLayer", "Linear"]


def test_what_is_not_called_is_gathered_with_what_reads_it() -> None:
    """Fails when a layer whose weight the module around it reads stays in shards, as Swin's projections."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    called = [module for module in model.modules() if module is not model[0][1]]
    assert modules_to_shard(model, called) == [model[0][0], model[0], model[1]]


def test_inner_parts_come_before_those_around_them() -> None:
    """Fails when torch would give a layer's tensors to what surrounds it."""
    order = modules_to_shard(build_model("resnet18", num_classes=10, width=0.25))
    for number, part in enumerate(order):
        assert not set(part.modules()) & set(order[number + 1 :])


# Opening


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_one_process_trains_by_any_engine(engine: str) -> None:
    """Fails when an engine wants a process group that one process has not."""
    opened = build_strategy(
        build_model("cnn", num_classes=10, in_channels=1, width=0.0625), config(engine), ONE_PROCESS
    )
    opened.warm_up((1, 8, 8))
    loss = opened.train_step(torch.randn(4, 1, 8, 8), torch.arange(4))
    assert loss.isfinite() and not loss.requires_grad
    opened.verify_replicas()
    assert opened.weights().keys() == opened.model.state_dict().keys()


def test_other_engines_are_not_imported() -> None:
    """Fails when every training waits for DeepSpeed's import, or ends where that is broken."""
    others = "m == 'deepspeed' or m.endswith('strategies.fsdp')"
    code = f"import sys, sfw_dist.train.trainer; print([m for m in sys.modules if {others}])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# What is refused


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_pieces_that_do_not_divide_the_batch() -> None:
    """Fails when micro-batches differ in size, and the mean over them is not the batch's."""
    check_world(config(accumulate=4), 2)
    said = refusal(lambda: check_world(config(accumulate=7), 2))
    assert all(part in said for part in ("data.batch_size 120", "train.accumulate 7", "write 112", "divides 60"))
    assert "write 16" in refusal(lambda: check_world(config(batch=12, accumulate=8), 2))


def test_replicas_that_do_not_divide_the_ranks() -> None:
    """Fails when ranks are left over, and torch says so in its own words, on a cluster, after the wait."""
    check_world(config("fsdp", replicas=2), 4)
    check_world(config("ddp", replicas=5), 4)
    said = refusal(lambda: check_world(config("fsdp", replicas=4), 6))
    assert all(part in said for part in ("fsdp.replicas 4", "world size 6", "write 3", "a multiple of 4"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_another_model_or_optimizer_is_named(engine: str) -> None:
    """Fails when shapes that do not fit end in a traceback, or the user is not told which checkpoint it was."""
    cnn = lambda: build_model("cnn", num_classes=10, in_channels=1, width=0.0625)  # noqa: E731
    mine = build_strategy(cnn(), config(engine), ONE_PROCESS)
    tensors, options = mine.tensors(), mine.options()
    stored = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    assert mine.allocate(stored, "here").keys() == stored.keys()

    for name, damaged in (
        ("0.weight", stored | {"model.0.weight": torch.empty(3, device="meta")}),
        ("0.weight", {n: t for n, t in stored.items() if n != "model.0.weight"}),
        ("extra", stored | {"model.extra": torch.empty(3, device="meta")}),
        ("momentum_buffer.0.weight", stored | {"optimizer.momentum_buffer.0.weight": torch.empty(3, device="meta")}),
    ):
        said = refusal(lambda damaged=damaged: mine.allocate(damaged, "here"))
        assert "here is of another model" in said and name in said

    sgd = config(engine)
    sgd = replace(sgd, optimizer=replace(sgd.optimizer, name="sgd"))
    other = build_strategy(cnn(), sgd, ONE_PROCESS)
    assert "here is of another optimizer" in refusal(lambda: other.load(tensors, options, "here"))
