"""Ranks with unequally many batches: torch's ``Join`` lets a rank that has run out of data step for the others.

with Join([ddp_model, optimizer]):
    for inputs, targets in loader:
        ...
        optimizer.step()
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.optim.sharding.distribution import Distribution
from sfw_dist.optim.sharding.grad_reducer import GradReducer
from sfw_dist.optim.sharding.gradients import gradient_of

_RECEIVED = ("lr", "momentum", "weight_decay")
"""Options that schedulers change, which do not run on a rank without data."""


class StepsForJoined(Joinable):
    """The part of an optimizer that :class:`torch.distributed.algorithms.join.Join` talks to."""

    param_groups: list[dict[str, Any]]
    _distribution: Distribution
    _grad_reducer: GradReducer | None

    @abstractmethod
    def _take_step(self, *, joined: bool = False) -> None:
        """A step; ``joined``: for other ranks' sake, of a rank that has run out of data."""

    def join_hook(self, **_: Any) -> JoinHook:
        """For ``Join``: a rank that runs out of data steps for the others.

        What it owns is stepped with the gradients and options of the ranks that go on. Groups and sets must not change
        meanwhile.

        Raises:
            UserError: tensors that are divided between ranks, or gradients that are reduced to their owners.
        """
        if len(self._distribution.shards) > len(self._distribution.replicated_shards) or self._distribution.is_flat:
            raise UserError("Join needs tensors that every rank has whole: give all ranks equally many batches")
        if self._grad_reducer is not None:
            raise UserError("Join needs all gradients on every rank: take DDP without reduce_to_owner")
        return _StepForOthers(self)

    @property
    def join_device(self) -> torch.device:
        """For ``Join``: where the parameters lie."""
        return self._distribution.replicated_shards[0].parameter.device

    @property
    def join_process_group(self) -> Any:
        """For ``Join``: the ranks that share the work."""
        return self._distribution.ranks.group or dist.group.WORLD

    def _receive_for_joined(self, *, joined: bool) -> Mapping[Tensor, Tensor | None]:
        """On a rank without data, the gradients of what it owns; nothing elsewhere, and outside of ``Join``."""
        if not self._join_config.enable:
            return {}
        return gradients_for_joined(
            self.param_groups, self._distribution.needed_by(), self._distribution.ranks, joined=joined
        )


class _StepForOthers(JoinHook):
    def __init__(self, optimizer: StepsForJoined) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """One step of the ranks that still have data."""
        self._optimizer._take_step(joined=True)


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
