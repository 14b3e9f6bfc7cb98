"""The gradients that a step takes: checked, and received for a rank that has run out of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.optim.param_groups import entries
from sfw_dist.optim.sharding.interface import Distributor

_RECEIVED = ("lr", "momentum", "weight_decay")
"""Options that schedulers change, which do not run on a rank without data."""


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient that a step takes; of a frozen parameter none, though an old one may still be there."""
    return parameter.grad if parameter.requires_grad else None


def check_gradients(
    groups: Sequence[dict[str, Any]], distributors: Iterable[Distributor], is_member: Callable[[Tensor], bool]
) -> None:
    """Raise :class:`UserError` for gradients that no step can take."""
    for shard in (shard for distributor in distributors for shard in distributor.shards):
        gradient = gradient_of(shard.parameter)
        if gradient is None:
            continue
        if gradient.shape != shard.parameter.shape:
            shapes = f"{tuple(gradient.shape)}, and the parameter {tuple(shard.parameter.shape)}"
            raise UserError(f"the gradient of {shard.name} has shape {shapes}: call zero_grad after resizing it")
        if gradient.is_sparse:
            raise UserError(f"{shard.name} has a sparse gradient: SFW needs dense ones (nn.Embedding(sparse=False))")
    frozen = [p for group in groups for p in group["params"] if not (p.requires_grad or is_member(p))]
    if any(parameter.grad is not None for parameter in frozen):
        name = next(e.name for e in entries(groups) if e.parameter.grad is not None and not is_member(e.parameter))
        raise UserError(
            f"{name} has a gradient and requires_grad=False: set requires_grad to train it, or grad to None"
        )


def check_join(*, is_whole: bool, gradients_are_reduced: bool) -> None:
    """Raise :class:`UserError` where a rank without data could not step for the others."""
    if not is_whole:
        raise UserError("Join needs tensors that every rank has whole: give all ranks equally many batches")
    if not gradients_are_reduced:
        raise UserError("Join needs all gradients on every rank: take DDP without reduce_to_owner")


def gradients_for_joined(
    groups: Sequence[dict[str, Any]], parameters: Mapping[Tensor, set[int]], ranks: RankGroup, *, joined: bool
) -> dict[Tensor, Tensor | None]:
    """Send ranks that have run out of data the gradients of what they own, and the groups' options; collective.

    Args:
        groups: the optimizer's; on a ``joined`` rank they get the options of the others.
        parameters: each with the ranks that need its gradient, in the same order on every rank.
        ranks: who takes part.
        joined: whether this rank has run out of data.

    Returns:
        The gradients, on a ``joined`` rank; else nothing.
    """
    device = next(iter(parameters)).device
    flags = torch.zeros(ranks.size, device=device)
    flags[ranks.rank] = float(joined)
    ranks.all_reduce(flags)
    without_data = {rank for rank, flag in enumerate(flags.tolist()) if flag}
    wanted = [parameter for parameter, needed_by in parameters.items() if needed_by & without_data]
    if not wanted:
        return {}
    source = min(set(range(ranks.size)) - without_data)
    options = [float(group[name]) for group in groups for name in _RECEIVED]
    present = [float(gradient_of(parameter) is not None) for parameter in wanted]
    table = torch.tensor([*options, *present], dtype=torch.float64, device=device)
    dist.broadcast(table, group=ranks.group, group_src=source)
    numbers = table.tolist()
    received: dict[Tensor, Tensor | None] = dict.fromkeys(wanted)
    for parameter, there in zip(wanted, numbers[len(options) :], strict=True):
        if not there:
            continue
        own = None if joined else gradient_of(parameter)
        gradient = torch.empty(parameter.shape, dtype=parameter.dtype, device=device) if own is None else own
        received[parameter] = flat = gradient.to(parameter.dtype).contiguous()
        dist.broadcast(flat, group=ranks.group, group_src=source)
    if not joined:
        return {}
    _set_options(groups, numbers[: len(options)])
    return received


def _set_options(groups: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
    places = [(group, name) for group in groups for name in _RECEIVED]
    for (group, name), value in zip(places, values, strict=True):
        if isinstance(group[name], Tensor):
            group[name].fill_(value)
        else:
            group[name] = value
