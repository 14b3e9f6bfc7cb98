"""The optimizer's whole state: gathered from the owners, and distributed to the owners of another run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.dtensor import copy_entries
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.optim.param_groups import entries
from sfw_dist.optim.shard import Shard, State
from sfw_dist.optim.sharding.assignment import ShardSpec

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds after which a rank that waits for the others' momenta says so."""
TIMEOUT = timedelta(minutes=5)
"""How long rank 0 waits for ranks that do not call before it names them."""
_REMEDY = "call state_dict() on every rank, or build SFW with replicate_momentum=True to save on one rank alone"
_OWN = ("step", "momentum_buffer")
"""What SFW keeps for a parameter; whatever else is in the state, somebody has put there."""


@contextmanager
def all_ranks_called(ranks: RankGroup) -> Iterator[None]:
    """Around what every rank must call: a script that saves on one rank alone would otherwise stand still in silence.

    Raises:
        RuntimeError: (gloo) ranks that have not called within :data:`TIMEOUT`, and what to do.
    """
    text = (
        f"SFW.state_dict() on rank {ranks.rank} waits for the other ranks, which own a part of the momenta: {_REMEDY}"
    )
    timer = threading.Timer(PATIENCE, logger.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        if dist.get_backend(ranks.group) == "gloo":
            try:
                dist.monitored_barrier(ranks.group, timeout=TIMEOUT, wait_all_ranks=True)
            except RuntimeError as error:
                raise RuntimeError(f"not every rank called SFW.state_dict(): {_REMEDY} ({error})") from error
        yield
    finally:
        timer.cancel()


def gather_state(
    specs: Sequence[ShardSpec], shards: Sequence[Shard], state: State, ranks: RankGroup
) -> dict[int, dict[str, Tensor]]:
    """``step`` and ``momentum_buffer`` of every tensor, by its place among them; collective, the same on every rank."""
    device, group = shards[0].parameter.device, ranks.group
    owned = [state[s.parameter] if spec.owner == ranks.rank else {} for spec, s in zip(specs, shards, strict=True)]
    counts = torch.zeros(len(shards), 2, dtype=torch.float64, device=device)
    for row, shard, own in zip(counts, shards, owned, strict=True):
        # Without the buffer that its group's momentum needs, a tensor's next step is like its first.
        if own and ("momentum_buffer" in own or shard.group["momentum"] == 0):
            row[0] = own["step"]
        row[1] = "momentum_buffer" in own
    dist.all_reduce(counts, group=group)
    gathered: dict[int, dict[str, Tensor]] = {}
    for spec, shard, own, (taken, kept) in zip(specs, shards, owned, counts.tolist(), strict=True):
        tensor = gathered.setdefault(spec.tensor, {"step": torch.tensor(taken, dtype=torch.float32)})
        if shard.group["momentum"] == 0 and not (kept or "momentum_buffer" in tensor):
            continue  # a scheduler may have set the momentum to 0; then there is a buffer
        if "momentum_buffer" not in tensor:
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


def check_shapes(saved: Sequence[Mapping[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ``ValueError`` where a saved momentum has another shape than the groups' parameter."""
    names = {entry.parameter: entry.name for entry in entries(groups)}
    for own, parameter in zip(saved, (p for group in groups for p in group["params"]), strict=True):
        buffer = own.get("momentum_buffer")
        if buffer is not None and buffer.shape != parameter.shape:
            shapes = f"shape {tuple(buffer.shape)}, and the parameter {tuple(parameter.shape)}"
            raise ValueError(f"the saved momentum_buffer of {names[parameter]} has {shapes}: load the same model's")


def steps_of(saved: Mapping[str, Any]) -> float:
    """How many steps the saved state of a parameter tells of."""
    return float(saved.get("step", 0.0))


def without_own(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved state but for what SFW loads by itself."""
    parts = {
        key: {name: value for name, value in own.items() if name not in _OWN} if isinstance(own, dict) else own
        for key, own in state.items()
    }
    return {key: own for key, own in parts.items() if own != {}}


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
    """Copy the saved state of a DTensor, itself a DTensor or whole, into this rank's entries of it."""
    if "step" in saved:
        own["step"].copy_(saved["step"])
    buffer, mine = saved.get("momentum_buffer"), own.get("momentum_buffer")
    if buffer is not None and mine is not None:
        copy_entries(mine, buffer)
    elif mine is not None:
        own["step"].zero_()  # saved before a momentum that a scheduler raised from 0 had started
