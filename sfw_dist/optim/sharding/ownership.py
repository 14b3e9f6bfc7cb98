"""From param groups to who owns which of their tensors, where every rank has all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor

from sfw_dist.constraints import KSparsePolytope, Unconstrained
from sfw_dist.ops.pairwise_sum import ROW
from sfw_dist.optim.param_groups import constraint_of, name_of
from sfw_dist.optim.shard import Slot, cost
from sfw_dist.optim.sharding.assignment import Item, Part, Plan, make_plan


def plan_owners(
    groups: Sequence[dict[str, Any]], world_size: int, split: int | None, kept: Sequence[Part] = ()
) -> tuple[Plan, list[Slot]]:
    """The plan of the groups' tensors, DTensors left out, and a slot for each of its parts.

    Args:
        groups: an SFW's.
        world_size: ranks.
        split: tensors of more entries may be divided; ``None``: none.
        kept: parts that stay with their owners.

    Raises:
        ValueError: a set that is not bound, or one that needs a tensor whole which ``kept`` divides.
    """
    tensors = [
        (group, number, j)
        for number, group in enumerate(groups)
        for j, parameter in enumerate(group["params"])
        if not isinstance(parameter, DTensor)
    ]
    items = [_item(*tensor, split) for tensor in tensors]
    for part in kept:
        if part.stop - part.start < items[part.item].entries and items[part.item].unit == 0:
            raise ValueError(
                f"{items[part.item].name} is divided between ranks, and its new set needs it whole: "
                "build the optimizer with split=None"
            )
    plan = make_plan(items, world_size, kept)
    slots = []
    for part in plan.parts:
        group, _, j = tensors[part.item]
        constraint = constraint_of(group, j)
        slots.append(Slot.of(items[part.item].name, group["params"][j], group, constraint, part.start, part.stop))
    return plan, slots


def _item(group: dict[str, Any], number: int, index: int, split: int | None) -> Item:
    parameter, constraint = group["params"][index], constraint_of(group, index)
    n = parameter.numel()
    divisible = isinstance(constraint, KSparsePolytope | Unconstrained)
    unit = ROW if split is not None and n > split and divisible else 0
    description = f"{tuple(parameter.shape)} {parameter.dtype} {constraint!r}"
    return Item(name_of(group, number, index), cost(parameter.shape, constraint), n, description, unit)
