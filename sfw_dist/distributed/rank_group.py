"""The ranks that share a step's work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.errors import UserError


@dataclass(frozen=True)
class RankGroup:
    """The ranks that share a step's work, and this process's place among them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def alone(cls) -> RankGroup:
        """This process and no other."""
        return cls(None, 0, 1)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> RankGroup:
        """The group's, the default group's, or this process alone.

        Raises:
            UserError: this rank is not in the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        rank = dist.get_rank(group)
        if rank < 0:
            raise UserError(f"rank {dist.get_rank()} is not in process_group: call this on its ranks alone")
        return cls(group, rank, dist.get_world_size(group))

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroup:
        """The same ranks, for a copy of an optimizer."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise UserError("an optimizer with process_group= cannot be pickled: save its state_dict()")
        return RankGroup, (None, self.rank, self.size)

    def all_reduce(self, x: Tensor) -> None:
        """Sum a tensor over the ranks, in place; collective."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)


def disagreement(described: Sequence[str], ranks: RankGroup, devices: set[torch.device]) -> list[int]:
    """The ranks that build from other parameters or sets than the first one; collective, the same on every rank.

    Args:
        described: all that must agree, a line for each tensor.
        ranks: who compares.
        devices: where the parameters lie.

    Raises:
        UserError: the parameters lie on several devices.
    """
    if ranks.size == 1:
        return []
    if len(devices) > 1:
        raise UserError(f"the parameters lie on {sorted(map(str, devices))}: with several ranks use one each")
    digest = hashlib.sha256(json.dumps(list(described)).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=next(iter(devices)))
    gathered = mine.new_empty(ranks.size * mine.numel())
    dist.all_gather_into_tensor(gathered, mine, group=ranks.group)
    everyone = gathered.view(ranks.size, -1)
    return everyone.ne(everyone[0]).any(1).nonzero().view(-1).tolist()


def verify_agreement(described: Sequence[str], ranks: RankGroup, devices: set[torch.device]) -> None:
    """Check that all ranks build from the same parameters and sets; collective, arguments as for :func:`disagreement`.

    Raises:
        UserError: on every rank, with the ranks that differ and the first tensor that does.
    """
    differing = disagreement(described, ranks, devices)
    if not differing:
        return
    lists: list[Any] = [None] * ranks.size
    dist.all_gather_object(lists, list(described), group=ranks.group)
    here, first = lists[differing[0]], lists[0]
    pairs = zip_longest(here, first, fillvalue="no such tensor")
    one, other = next((a, b) for a, b in pairs if a != b)
    raise UserError(
        f"ranks {differing} have other parameters or constraints than rank 0 (rank {differing[0]}: {one}; rank 0: "
        f"{other}): build the same model and param groups, in the same order, on every rank; with a model of its own "
        "on each rank give the optimizer the ranks that share one as process_group="
    )
