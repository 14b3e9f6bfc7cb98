"""Saving, copying and leaving: hooks, rank 0 alone, copies, pickles and groups that are gone."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import torch
import torch.distributed as dist

from sfw_dist import SFW
from sfw_dist.optim.sharding import state_dict as whole_state
from tests.support.changing_groups import SHAPES, Run
from tests.support.ranks import error_of, run_on_ranks

NAMES = "abcd"


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """Parameters by name, as frameworks that divide a model otherwise need them."""
    names = {number: name for group in state["param_groups"] for number, name in _numbered(group)}
    groups = [{**group, "params": list(group["param_names"])} for group in state["param_groups"]]
    return {"state": {names[number]: own for number, own in state["state"].items()}, "param_groups": groups}


def _numbered(group: dict[str, Any]) -> list[tuple[int, str]]:
    return list(zip(group["params"], group["param_names"], strict=True))


def with_hooks(rank: int) -> dict[str, Any]:
    """Every hook of torch.optim.Optimizer on the way out and in again."""
    run, order = Run(NAMES), []
    for number in range(3):
        run.step(number)
    seen: dict[str, Any] = {}

    def saved(optimizer: SFW, state: dict[str, Any]) -> dict[str, Any]:
        seen["saved"] = {number: sorted(own) for number, own in state["state"].items()}
        seen["sets"] = [group["constraint"] for group in state["param_groups"]]
        return renamed(state)

    def loaded(optimizer: SFW, state: dict[str, Any]) -> None:
        seen["loaded"] = sorted(state["state"])
        state["param_groups"] = [{**group, "lr": 0.25} for group in state["param_groups"]]

    run.optimizer.register_state_dict_pre_hook(lambda optimizer: order.append("pre"))
    run.optimizer.register_state_dict_post_hook(saved)
    run.optimizer.register_state_dict_post_hook(lambda optimizer, state: order.append("post"))
    state = run.optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)

    again = Run(NAMES)
    again.optimizer.register_load_state_dict_pre_hook(loaded)
    again.optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: order.append("load pre"))
    again.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: order.append(f"load post {len(optimizer.state)}")
    )
    again.optimizer.load_state_dict(torch.load(file, weights_only=True))
    momenta = {name: own["momentum_buffer"] for name, own in state["state"].items()}
    rates = [group["lr"] for group in again.optimizer.param_groups]
    return {
        "seen": seen,
        "order": order,
        "momenta": momenta,
        "rates": rates,
        "again": renamed(again.optimizer.state_dict()),
    }


def test_hooks_see_the_whole_state() -> None:
    """Fails when a hook sees one rank's part of the state, or sets as objects, or is called twice or not at all."""
    torch.set_num_threads(1)
    alone = with_hooks(0)
    assert alone["seen"]["saved"] == {number: ["momentum_buffer", "step"] for number in range(4)}
    assert all(spec["kind"] == "k_sparse" for spec in alone["seen"]["sets"])
    assert alone["seen"]["loaded"] == list(NAMES)
    assert alone["order"] == ["pre", "post", "load pre", "load post 4"]
    assert alone["rates"] == [0.25] * 4
    for rank in run_on_ranks(with_hooks, 3):
        assert {key: rank[key] for key in ("seen", "order", "rates")} == {
            key: alone[key] for key in ("seen", "order", "rates")
        }
        for name in NAMES:
            assert rank["momenta"][name].shape == SHAPES[name]
            assert torch.equal(rank["momenta"][name], alone["momenta"][name])
            assert torch.equal(rank["again"]["state"][name]["momentum_buffer"], alone["momenta"][name])


def life(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    said["waiting"] = saved_late(rank)

    said["no momentum"], said["unfrozen"] = without_momentum(), saved_while_unfrozen(rank)

    group = dist.new_group([0, 1])
    run = Run(NAMES, process_group=group)
    run.step(0)
    other = copy.deepcopy(run.optimizer)
    copies = [p for g in other.param_groups for p in g["params"]]
    for p, (name, original) in zip(copies, run.tensors.items(), strict=True):
        assert p is not original, name
        p.grad = original.grad
    run.optimizer.step(), other.step()
    said["copied"] = all(torch.equal(p, q) for p, q in zip(copies, run.tensors.values(), strict=True))
    said["pickled"] = error_of(ValueError, pickle.dumps, run.optimizer)

    default = Run(NAMES)
    default.step(0)
    dist.destroy_process_group()
    said["step"] = error_of(ValueError, default.step, 1)
    said["state"] = error_of(ValueError, default.optimizer.state_dict)
    return said


def without_momentum() -> list[tuple[int, ...]]:
    """The momenta that are saved after a scheduler has set the momentum to 0; "a" is divided between the ranks."""
    run = Run(NAMES, split=8192)
    run.step(0)
    for group in run.optimizer.param_groups:
        group["momentum"] = 0.0
    run.step(1)
    state = run.optimizer.state_dict()
    Run(NAMES, split=8192).optimizer.load_state_dict(state)
    return [tuple(own["momentum_buffer"].shape) for own in state["state"].values()]


def saved_while_unfrozen(rank: int) -> int:
    """Rank 0 alone saves when a tensor has just been unfrozen, and before it has taken a step."""
    run = Run(NAMES, frozen="b", replicate_momentum=True)
    run.step(0)
    run.tensors["b"].requires_grad_(True)
    saved = len(run.optimizer.state_dict()["state"]) if rank == 0 else len(NAMES) - 1
    run.step(1)
    return saved


def saved_late(rank: int) -> str:
    """Rank 0 asks for the state; rank 1 follows when rank 0 has said that it waits."""
    run, store, texts = Run(NAMES), dist.distributed_c10d._get_default_store(), []
    run.step(0)

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())
            store.set("told", "yes")

    handler = Told()
    logging.getLogger(whole_state.__name__).addHandler(handler)
    whole_state.PATIENCE = 0.01 if rank == 0 else 600.0
    if rank == 1:
        store.wait(["told"])
    run.optimizer.state_dict()
    logging.getLogger(whole_state.__name__).removeHandler(handler)
    return texts[0] if texts else ""


def test_an_optimizer_is_saved_copied_and_outlived() -> None:
    """Fails when rank 0 waits in silence, a copy loses its group, or an optimizer whose ranks have gone steps alone."""
    zero, one = run_on_ranks(life, 2)
    assert zero["waiting"].startswith("SFW.state_dict() on rank 0 waits for the other ranks")
    assert "replicate_momentum=True" in zero["waiting"]
    assert one["waiting"] == ""
    for rank, said in enumerate((zero, one)):
        assert said["no momentum"] == [SHAPES[name] for name in NAMES]
        assert said["unfrozen"] == len(NAMES) - 1
        assert said["copied"]
        assert said["pickled"] == "an optimizer with process_group= cannot be pickled: save its state_dict()"
        for message in (said["step"], said["state"]):
            assert message.startswith(f"the optimizer was built as rank {rank} of 2 and is now rank 0 of 1"), message
