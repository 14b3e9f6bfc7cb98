"""The optimizer's whole state: gathered from the owners, and distributed to the owners of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.dtensor import copy_entries
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.optim.shard import Shard, State
from sfw_dist.optim.sharding.assignment import ShardSpec

TIMEOUT = timedelta(minutes=5)
"""How long rank 0 waits for ranks that do not call before it names them."""


def gather_state(
    specs: Sequence[ShardSpec], shards: Sequence[Shard], state: State, ranks: RankGroup
) -> dict[int, dict[str, Tensor]]:
    """``step`` and ``momentum_buffer`` of every tensor, by its number; collective, the same on every rank."""
    device, group = shards[0].parameter.device, ranks.group
    if dist.get_backend(group) == "gloo":
        dist.monitored_barrier(group, timeout=TIMEOUT, wait_all_ranks=True)
    owned = [state[s.parameter] if spec.owner == ranks.rank else {} for spec, s in zip(specs, shards, strict=True)]
    steps = torch.zeros(len(shards), dtype=torch.float64, device=device)
    for i, (shard, own) in enumerate(zip(shards, owned, strict=True)):
        # Without the buffer that its group's momentum needs, a tensor's next step is like its first.
        if own and ("momentum_buffer" in own or shard.group["momentum"] == 0):
            steps[i] = own["step"]
    dist.all_reduce(steps, group=group)
    gathered: dict[int, dict[str, Tensor]] = {}
    for spec, shard, own, taken in zip(specs, shards, owned, steps.tolist(), strict=True):
        tensor = gathered.setdefault(spec.tensor, {"step": torch.tensor(taken, dtype=torch.float32)})
        if shard.group["momentum"] == 0:
            continue
        if spec.start == 0:
            tensor["momentum_buffer"] = torch.zeros(shard.parameter.shape, dtype=shard.dtype, device=device)
        entries = shard.entries(tensor["momentum_buffer"])
        if "momentum_buffer" in own:
            entries.copy_(own["momentum_buffer"].view(-1))
        dist.broadcast(entries, group=group, group_src=spec.owner)
    return gathered


def by_place(
    state: Mapping[Any, dict[str, Tensor]], groups: Sequence[dict[str, Any]], parameters: int
) -> list[dict[str, Tensor]]:
    """The saved state of each parameter, in the order of the groups.

    A state dict of torch's identifies parameters by that order: it numbers them, and ``torch.distributed.checkpoint``
    replaces the numbers by names.

    Raises:
        ValueError: the state has another number of parameters.
    """
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != parameters:
        raise ValueError(f"the state is of {len(keys)} parameters, this optimizer has {parameters}: load its own")
    return [state.get(key, {}) for key in keys]


def check_shapes(saved: Mapping[int, dict[str, Tensor]], specs: Sequence[ShardSpec], shards: Sequence[Shard]) -> None:
    """Raise ``ValueError`` where a saved momentum has another shape than its parameter."""
    for spec, shard in zip(specs, shards, strict=True):
        buffer = saved.get(spec.tensor, {}).get("momentum_buffer")
        if buffer is not None and buffer.shape != shard.parameter.shape:
            shape = f"momentum_buffer of shape {tuple(buffer.shape)}"
            raise ValueError(f"the state of {shard.name} has {shape}: load the state of the same model")


def load_owned(
    saved: Mapping[int, dict[str, Tensor]],
    specs: Sequence[ShardSpec],
    shards: Sequence[Shard],
    state: State,
    rank: int | None,
) -> None:
    """Copy the saved state of each tensor into what ``rank`` owns of it; ``None``: into all."""
    for spec, shard in zip(specs, shards, strict=True):
        if rank is not None and spec.owner != rank:
            continue
        own, tensor = state[shard.parameter], saved.get(spec.tensor, {})
        if "step" in tensor:
            own["step"].copy_(tensor["step"])
        if "momentum_buffer" in own and "momentum_buffer" in tensor:
            own["momentum_buffer"].view(-1).copy_(shard.entries(tensor["momentum_buffer"]))
        elif "momentum_buffer" in own:
            own["step"].zero_()  # saved before a momentum that a scheduler raised from 0 had started


def load_dtensor(saved: Mapping[str, Tensor], own: dict[str, Any]) -> None:
    """Copy the saved state of a DTensor, itself a DTensor or whole, into this rank's entries of it.

    Raises:
        ValueError: the saved momentum has another shape.
    """
    if "step" in saved:
        own["step"].copy_(saved["step"])
    buffer, mine = saved.get("momentum_buffer"), own.get("momentum_buffer")
    if buffer is not None and mine is not None:
        if buffer.shape != mine.shape:
            shapes = f"shape {tuple(buffer.shape)}, and the parameter {tuple(mine.shape)}"
            raise ValueError(f"a saved momentum has {shapes}: load the state of the same model")
        copy_entries(mine, buffer)
    elif mine is not None:
        own["step"].zero_()  # saved before a momentum that a scheduler raised from 0 had started
