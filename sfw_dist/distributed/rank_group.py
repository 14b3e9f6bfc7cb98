"""The ranks that share a step's work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
        """The group's, the default group's, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(group, dist.get_rank(group), dist.get_world_size(group))
        return cls.alone()

    def all_reduce(self, x: Tensor) -> None:
        """Sum a tensor over the ranks, in place; collective."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)


def verify_agreement(digest: bytes, ranks: RankGroup, devices: set[torch.device]) -> None:
    """Check that all ranks build from the same parameters and sets; collective.

    Args:
        digest: a hash of everything that must agree.
        ranks: who compares.
        devices: where the parameters lie.

    Raises:
        ValueError: on every rank, with the ranks that differ.
    """
    if ranks.size == 1:
        return
    if len(devices) > 1:
        raise ValueError(f"the parameters lie on {sorted(map(str, devices))}: with several ranks use one each")
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=next(iter(devices)))
    gathered = mine.new_empty(ranks.size * mine.numel())
    dist.all_gather_into_tensor(gathered, mine, group=ranks.group)
    everyone = gathered.view(ranks.size, -1)
    differing = everyone.ne(everyone[0]).any(1).nonzero().view(-1).tolist()
    if differing:
        raise ValueError(
            f"ranks {differing} have other parameters or constraints than rank 0: "
            "build the same model and param groups, in the same order, on every rank"
        )
