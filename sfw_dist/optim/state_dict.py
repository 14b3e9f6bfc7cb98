"""The optimizer's state as a whole: gathered from the owners, and taken by the owners of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.dtensor import copy_entries
from sfw_dist.distributed.rank_group import Ranks
from sfw_dist.optim.shard import Slot
from sfw_dist.optim.sharding.assignment import Part

# How long rank 0 waits for ranks that do not call before it says who is missing.
TIMEOUT = timedelta(minutes=5)

State = Mapping[Tensor, dict[str, Any]]


def gather_state(
    parts: Sequence[Part], slots: Sequence[Slot], state: State, ranks: Ranks
) -> dict[int, dict[str, Tensor]]:
    """``step`` and ``momentum_buffer`` of every tensor, by its number; collective, the same on every rank."""
    device, group = slots[0].parameter.device, ranks.group
    if dist.get_backend(group) == "gloo":
        dist.monitored_barrier(group, timeout=TIMEOUT, wait_all_ranks=True)
    own = [state[slot.parameter] if part.owner == ranks.rank else {} for part, slot in zip(parts, slots, strict=True)]
    steps = torch.zeros(len(slots), dtype=torch.float64, device=device)
    for i, (slot, mine) in enumerate(zip(slots, own, strict=True)):
        # Without the buffer that its group's momentum wants, a tensor's next step is as its first.
        if mine and ("momentum_buffer" in mine or slot.group["momentum"] == 0):
            steps[i] = mine["step"]
    dist.all_reduce(steps, group=group)
    gathered: dict[int, dict[str, Tensor]] = {}
    for part, slot, mine, taken in zip(parts, slots, own, steps.tolist(), strict=True):
        whole = gathered.setdefault(part.item, {"step": torch.tensor(taken, dtype=torch.float32)})
        if slot.group["momentum"] == 0:
            continue
        if part.start == 0:
            whole["momentum_buffer"] = torch.zeros(slot.parameter.shape, dtype=slot.dtype, device=device)
        entries = slot.entries(whole["momentum_buffer"])
        if "momentum_buffer" in mine:
            entries.copy_(mine["momentum_buffer"].view(-1))
        dist.broadcast(entries, group=group, group_src=part.owner)
    return gathered


def by_place(
    state: Mapping[Any, dict[str, Tensor]], groups: Sequence[dict[str, Any]], parameters: int
) -> list[dict[str, Tensor]]:
    """What is saved of each parameter, in the order of the groups, by which torch tells parameters in a state dict.

    It numbers them; ``torch.distributed.checkpoint`` puts names in the place of numbers.
    """
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != parameters:
        raise ValueError(f"the state is of {len(keys)} parameters, this optimizer has {parameters}: load its own")
    return [state.get(key, {}) for key in keys]


def check_shapes(saved: Mapping[int, dict[str, Tensor]], parts: Sequence[Part], slots: Sequence[Slot]) -> None:
    """Raises ``ValueError`` where a saved momentum has another shape than its parameter."""
    for part, slot in zip(parts, slots, strict=True):
        buffer = saved.get(part.item, {}).get("momentum_buffer")
        if buffer is not None and buffer.shape != slot.parameter.shape:
            shape = f"momentum_buffer of shape {tuple(buffer.shape)}"
            raise ValueError(f"the state of {slot.name} has {shape}: load the state of the same model")


def take_state(
    saved: Mapping[int, dict[str, Tensor]], parts: Sequence[Part], slots: Sequence[Slot], state: State, rank: int | None
) -> None:
    """Copy what is saved of each tensor into what this rank has of it; ``None``: every rank has all."""
    for part, slot in zip(parts, slots, strict=True):
        if rank is not None and part.owner != rank:
            continue
        mine, whole = state[slot.parameter], saved.get(part.item, {})
        if "step" in whole:
            mine["step"].copy_(whole["step"])
        if "momentum_buffer" in mine and "momentum_buffer" in whole:
            mine["momentum_buffer"].view(-1).copy_(slot.entries(whole["momentum_buffer"]))
        elif "momentum_buffer" in mine:
            mine["step"].zero_()  # saved before a momentum that a scheduler raised from 0 had started


def take_shared(saved: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Copy what is saved of a DTensor, as one or whole, into what this rank has of it.

    Raises ``ValueError`` where a saved momentum has another shape.
    """
    if "step" in saved:
        state["step"].copy_(saved["step"])
    buffer, mine = saved.get("momentum_buffer"), state.get("momentum_buffer")
    if buffer is not None and mine is not None:
        if buffer.shape != mine.shape:
            shapes = f"shape {tuple(buffer.shape)}, and the parameter {tuple(mine.shape)}"
            raise ValueError(f"a saved momentum has {shapes}: load the state of the same model")
        copy_entries(mine, buffer)
    elif mine is not None:
        state["step"].zero_()  # saved before a momentum that a scheduler raised from 0 had started
