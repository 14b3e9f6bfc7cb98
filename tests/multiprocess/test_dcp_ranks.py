"""The checks that PyTorch runs on optimizers' states in ``torch.distributed.checkpoint``, on SFW.

They are those of PyTorch's ``test/distributed/checkpoint/test_state_dict.py``, written anew for one and two ranks:
whatever the options, a state that is taken and set again continues to the bit. Each number of ranks starts once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.distributed.dtensor import full_tensor
from tests.support.ranks import run_on_ranks

FROZEN = ("0.bias", "2.weight", "2.bias")
OPTIONS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "default": ({}, {}),
    "cpu_offload": ({"cpu_offload": True}, {}),
    "flatten": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "full": ({"full_state_dict": True}, {"full_state_dict": True}),
    "full, from rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
    # torch sets no state, of Adam neither, with both.
    "full, flatten": (
        {"full_state_dict": True, "flatten_optimizer_state_dict": True},
        {"flatten_optimizer_state_dict": True},
    ),
}
"""Of taking a state, and of setting it."""
LAYOUTS = ("ddp", "fsdp")


class Run:
    """A network of which some parameters are frozen, trained on the same numbers by all ranks."""

    def __init__(self, layout: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))
        for name in FROZEN:
            net.get_parameter(name).requires_grad_(False)
        self.net: nn.Module = net
        if layout == "fsdp":
            fully_shard(net)
        groups = constrain(net, KSparsePolytope(k_frac=0.2, k_min=2, tau=5.0), unconstrained="norm_and_bias")
        self.optimizer = SFW(groups, lr=0.1)
        self.model = DistributedDataParallel(net) if layout == "ddp" else net

    def train(self, steps: int) -> None:
        x = torch.linspace(-1, 1, 48).reshape(8, 6).sin()
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(x) - 1).square().mean().backward()
            self.optimizer.step()

    def whole(self) -> dict[str, Tensor]:
        return {name: full_tensor(p.detach()).clone() for name, p in self.net.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def taken_and_set(layout: str, taking: dict[str, bool], setting: dict[str, bool]) -> dict[str, Any]:
    """One run goes on; another, with other weights, takes its state in between."""
    first, second = Run(layout), Run(layout, seed=1)
    frozen = {name: tensor for name, tensor in first.whole().items() if name in FROZEN}
    first.train(3)
    model = get_model_state_dict(first.model, options=StateDictOptions(full_state_dict=True))
    state = get_optimizer_state_dict(first.model, first.optimizer, options=StateDictOptions(**taking))
    keys = sorted(state.get("state", state))
    set_model_state_dict(second.model, model, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(second.model, second.optimizer, state, options=StateDictOptions(**setting))
    same_now = equal(first.whole(), second.whole())
    first.train(2)
    second.train(2)
    after = second.whole()
    return {
        "keys": keys,
        "continues": same_now and equal(first.whole(), after),
        "moved": not equal(Run(layout).whole(), after),
        "frozen": all(torch.equal(after[name], tensor) for name, tensor in frozen.items()),
    }


def saved_and_loaded(layout: str, folder: Path, flatten: bool) -> bool:
    """The same by way of files, which a fresh run fills its tensors from."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    first, second = Run(layout), Run(layout, seed=1)
    first.train(3)
    model, optimizer = get_state_dict(first.model, first.optimizer, options=options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    model, optimizer = get_state_dict(second.model, second.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        second.model,
        second.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    first.train(2)
    second.train(2)
    return equal(first.whole(), second.whole())


def one_tensor() -> bool:
    """Of a single tensor one rank alone has the momentum; torch steps optimizers that have no state yet."""
    net = nn.Linear(4, 3, bias=False)
    before = net.weight.detach().clone()
    optimizer = SFW(constrain(net, KSparsePolytope(k=2, tau=5.0)), lr=0.1)
    state = get_optimizer_state_dict(net, optimizer)
    return list(state["state"]) == ["weight"] and torch.equal(net.weight.detach(), before)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def everything(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        for name, (taking, setting) in OPTIONS.items():
            found[f"{layout}, {name}"] = attempt(taken_and_set, layout, taking, setting)
        for flatten in (False, True):
            where = Path(folder, f"{layout}{flatten}")
            found[f"{layout}, files, {flatten}"] = attempt(saved_and_loaded, layout, where, flatten)
    dist.barrier()
    found["one tensor"] = attempt(one_tensor)
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(everything, request.param, folder)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_is_set_again_continues_bitwise(found: list[dict[str, Any]], layout: str, options: str) -> None:
    """Fails when an option of StateDictOptions loses momentum or a group's options, or moves a frozen parameter."""
    for rank, of_rank in enumerate(found):
        result = of_rank[f"{layout}, {options}"]
        assert isinstance(result, dict), result
        assert result["continues"]
        assert result["moved"]
        assert result["frozen"]
        if options == "full, from rank 0" and rank > 0:
            assert result["keys"] == []
        elif "flatten" in options:
            assert "state.0.weight.momentum_buffer" in result["keys"]
            assert "param_groups.0.weight.lr" in result["keys"]
        else:
            assert set(result["keys"]) >= {"0.weight", "4.weight"}


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_is_loaded_from_files_continues_bitwise(
    found: list[dict[str, Any]], layout: str, flatten: bool
) -> None:
    """Fails when a distributed checkpoint of some frozen parameters lacks what loading asks for."""
    for of_rank in found:
        assert of_rank[f"{layout}, files, {flatten}"] is True


def test_a_rank_that_owns_no_tensor_takes_part(found: list[dict[str, Any]]) -> None:
    """Fails when torch takes a rank without momentum for one that has never stepped, and steps it alone."""
    for of_rank in found:
        assert of_rank["one tensor"] is True
