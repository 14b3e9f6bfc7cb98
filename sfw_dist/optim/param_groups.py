"""Param groups: checks before SFW takes one, a feasible start, and merging groups."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from sfw_dist.constraints import Constraint, Unconstrained, constraint_from_spec
from sfw_dist.distributed.dtensor import full_tensor, to_local
from sfw_dist.optim.update import Rescale

logger = logging.getLogger(__name__)


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option outside its domain."""
    if not 0 <= group["lr"] < math.inf:  # 0 is where a warm-up begins
        raise ValueError(f"lr must be at least 0, got {group['lr']}: write 1.0 for SFW, 0.05 for unconstrained groups")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}: write momentum=0.9")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}: write weight_decay=0.0005")
    if "rescale" in group and group["rescale"] not in get_args(Rescale):  # only SFW has one
        raise ValueError(f"rescale must be one of {', '.join(get_args(Rescale))}, got {group['rescale']!r}")
    sets = group["constraint"]
    if not isinstance(sets, Constraint) and not (
        isinstance(sets, tuple) and len(sets) == len(group["params"]) and all(isinstance(s, Constraint) for s in sets)
    ):
        raise ValueError(f"a group's constraint must be a set such as KSparsePolytope, got {sets!r}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"constrained optimizers take real floating-point parameters, got {parameter.dtype}")
        if parameter.is_meta:
            raise ValueError("a parameter has no memory (device meta): initialise the model before the optimizer")


def constraint_of(group: dict[str, Any], index: int) -> Constraint:
    """The set of one parameter: its group's, or its own among the group's."""
    sets = group["constraint"]
    return sets[index] if isinstance(sets, tuple) else sets


def name_of(group: dict[str, Any], number: int, index: int) -> str:
    """A parameter's name; ``number`` is its group's."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else f"group{number}.param{index}"


def names_by_number(groups: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The names of a state dict's parameters, by the numbers that torch gives them; its groups have ``param_names``."""
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in groups)
    return {number: name for group in pairs for number, name in group}


def to_plain(sets: Constraint | tuple[Constraint, ...]) -> dict[str, Any] | list[dict[str, Any]]:
    """A group's ``constraint`` as plain values; :func:`from_plain` is the inverse."""
    return [s.spec() for s in sets] if isinstance(sets, tuple) else sets.spec()


def from_plain(spec: dict[str, Any] | list[dict[str, Any]]) -> Constraint | tuple[Constraint, ...]:
    """The inverse of :func:`to_plain`. Raises ``ValueError`` for a set of unknown name."""
    return tuple(map(constraint_from_spec, spec)) if isinstance(spec, list) else constraint_from_spec(spec)


def merge_param_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge groups that differ in their sets alone; the ``constraint`` of a merged group is a tuple of sets.

    Constrained and unconstrained groups stay apart. For frameworks that step one group after the other.
    """
    joined: dict[str, dict[str, Any]] = {}
    for group in groups:
        free = group["constraint"] == Unconstrained()
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", "constraint")}
        sets = group["constraint"] if free else tuple(constraint_of(group, j) for j in range(len(group["params"])))
        key = repr((free, "param_names" in group, sorted(options.items())))
        if key not in joined:
            joined[key] = {**group, "constraint": sets}
            continue
        into = joined[key]
        into["params"] = [*into["params"], *group["params"]]
        if "param_names" in group:
            into["param_names"] = [*into["param_names"], *group["param_names"]]
        if not free:
            into["constraint"] = into["constraint"] + sets
    return list(joined.values())


@torch.no_grad()
def make_feasible(group: dict[str, Any], *, leave: Sequence[Tensor] = ()) -> None:
    """A feasible start: divide tensors that lie outside their set by their gauge; collective for DTensors.

    Args:
        group: whose sets are bound.
        leave: parameters that are left as they are.

    Raises:
        ValueError: a parameter without entries.
    """
    left = set(leave)
    for index, parameter in enumerate(group["params"]):
        if parameter in left:
            continue
        if parameter.numel() == 0:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no entries: leave it out")
        gauge = constraint_of(group, index).gauge(full_tensor(parameter))
        if gauge > 1:
            here = to_local(parameter)
            here.copy_(here.double() / gauge)
            logger.info("a tensor of shape %s was %.3g times outside its set: scaled", tuple(parameter.shape), gauge)
