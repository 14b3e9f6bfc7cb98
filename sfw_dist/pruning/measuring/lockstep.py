"""Ranks that must call a model equally often, because each call is collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError

T = TypeVar("T")


def is_divided(model: nn.Module) -> bool:
    """Whether ranks hold parts of the model, so that each call of it needs all of them."""
    divided = any(isinstance(module, FSDPModule) for module in model.modules())
    return divided or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def lockstep(
    batches: Iterable[T], model: nn.Module, ranks: RankGroup, device: torch.device
) -> Iterator[tuple[T, bool]]:
    """Each batch, with True. Of a divided model all ranks get as many: a rank that has no more, its last, with False.

    Args:
        batches: of this rank.
        model: the network.
        ranks: all ranks that hold parts of it.
        device: through which the ranks talk.

    Raises:
        UserError: on all ranks of a divided model: some of them have no batch at all, and others have.
    """
    if ranks.size == 1 or not is_divided(model):
        yield from ((batch, True) for batch in batches)
        return
    iterator, last, first = iter(batches), None, True
    while True:
        batch = next(iterator, None)
        missing = _ranks_with(batch is None, ranks, device)
        if len(missing) == ranks.size:
            return
        last = last if batch is None else batch
        if missing and first:
            raise UserError(f"ranks {missing} have no batch, and a divided model needs one on each: use fewer ranks")
        first = False
        assert last is not None
        yield last, batch is not None


def _ranks_with(flag: bool, ranks: RankGroup, device: torch.device) -> list[int]:
    flags = torch.zeros(ranks.size, dtype=torch.int32, device=device)
    flags[ranks.rank] = flag
    ranks.all_reduce(flags)
    return flags.nonzero().flatten().tolist()
