"""Param groups: checks before an optimizer takes one, the tensors in them, a feasible start, and merging groups."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from sfw_dist.constraints import Constraint, Unconstrained, constraint_from_spec
from sfw_dist.constraints.binding import TRAINABLE_TYPES, cannot_train
from sfw_dist.distributed.dtensor import full_tensor, to_local
from sfw_dist.distributed.rank_group import RankGroup, disagreement
from sfw_dist.errors import UserError
from sfw_dist.optim.update import RULES

logger = logging.getLogger(__name__)


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option outside its domain, or a trainable parameter that cannot be stepped."""
    check_options(group)
    check_parameters(group)


def check_options(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option outside its domain."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}: write one number")
    if not 0 <= lr < math.inf:  # 0 is where a warm-up begins
        raise ValueError(f"lr must be at least 0, got {lr}: write 1.0 for SFW, 0.05 for unconstrained groups")
    if not 0 <= group.get("lr_factor", 1.0) < math.inf:
        raise ValueError(f"lr_factor must be at least 0, got {group['lr_factor']}: write 0.05, or leave it out")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}: write momentum=0.9")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}: write weight_decay=0.0005")
    if "rescale" in group and group["rescale"] not in RULES:  # only SFW has one
        raise ValueError(f"rescale must be one of {', '.join(RULES)}, got {group['rescale']!r}")
    sets = group["constraint"]
    if not isinstance(sets, Constraint) and not (
        isinstance(sets, tuple) and len(sets) == len(group["params"]) and all(isinstance(s, Constraint) for s in sets)
    ):
        raise ValueError(f"a group's constraint must be a set such as KSparsePolytope, got {sets!r}")


def check_parameters(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a trainable parameter that cannot be stepped."""
    for parameter in group["params"]:
        if getattr(parameter, "_fsdp_flattened", False):
            raise UserError(
                "a parameter is FullyShardedDataParallel's, which keeps slices of several tensors in one: "
                "take torch.distributed.fsdp.fully_shard, and build SFW on the model that it returns"
            )
        if not parameter.requires_grad:
            continue  # it takes no step
        if isinstance(parameter, UninitializedParameter):
            raise ValueError("a parameter is a lazy module's: send one batch through the model before the optimizer")
        if not parameter.is_nested and parameter.dtype not in TRAINABLE_TYPES:
            raise ValueError(f"constrained optimizers take real floating-point parameters, got {parameter.dtype}")
        if parameter.is_meta:
            raise ValueError("a parameter has no memory (device meta): initialise the model before the optimizer")
        reason = cannot_train(parameter)
        if reason is not None:
            raise ValueError(f"a parameter {reason}: leave it out, or store it as one dense floating-point tensor")


def refuse_flattened(group: dict[str, Any], before: Mapping[Tensor, torch.Size]) -> None:
    """Raise :class:`UserError` where one flat tensor has taken the place of a group's, which had other shapes.

    Args:
        group: as it is now.
        before: the shapes of the parameters that it had.
    """
    replaced = len(group["params"]) == 1 and group["params"][0] not in before and group["params"][0].ndim == 1
    if replaced and any(len(shape) > 1 for shape in before.values()):
        raise UserError(
            f"a framework has replaced {len(before)} parameters by one of {group['params'][0].numel()} entries in a "
            "row, in which SFW cannot tell the tensors apart: under DeepSpeed call "
            "sfw_dist.optim.deepspeed.initialize, or its adopt(engine) before the first step"
        )


def constraint_of(group: dict[str, Any], index: int) -> Constraint:
    """The set of one parameter: its group's, or its own among the group's."""
    sets = group["constraint"]
    return sets[index] if isinstance(sets, tuple) else sets


@dataclass(frozen=True)
class Entry:
    """One tensor of the param groups."""

    name: str
    """No other tensor of the groups has it."""
    parameter: Tensor
    group: dict[str, Any]
    constraint: Constraint


def entries(groups: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """The tensors of the groups, in their order, each once.

    Names are the groups' ``param_names``. Those that several tensors have, because they belong to several models, and
    those of tensors without a name, say where the tensor stands.

    Example:
        >>> a, b, c = torch.ones(3)
        >>> groups = [{"params": [a, b], "param_names": ["weight", "bias"]}, {"params": [c], "param_names": ["weight"]}]
        >>> [entry.name for entry in entries([{**group, "constraint": Unconstrained()} for group in groups])]
        ['weight(group0.param0)', 'bias', 'weight(group1.param0)']
    """
    found = [(number, j, group) for number, group in enumerate(groups) for j in range(len(group["params"]))]
    count = Counter(name for group in groups for name in group.get("param_names", ()))
    seen: set[Tensor] = set()
    for number, j, group in found:
        parameter, names, place = group["params"][j], group.get("param_names", ()), f"group{number}.param{j}"
        if parameter in seen:
            continue
        seen.add(parameter)
        name = place if j >= len(names) else names[j] if count[names[j]] == 1 else f"{names[j]}({place})"
        yield Entry(name, parameter, group, constraint_of(group, j))


def names_by_number(groups: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The names of a state dict's parameters, by the numbers that torch gives them; its groups have ``param_names``."""
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in groups)
    return {number: name for group in pairs for number, name in group}


def to_plain(sets: Constraint | tuple[Constraint, ...]) -> dict[str, Any] | list[dict[str, Any]]:
    """A group's ``constraint`` as plain values; :func:`from_plain` is the inverse."""
    return [s.spec() for s in sets] if isinstance(sets, tuple) else sets.spec()


def from_plain(spec: Any) -> Constraint | tuple[Constraint, ...]:
    """The inverse of :func:`to_plain`; sets are taken as they are. Raises ``ValueError`` for a set of unknown name."""
    if isinstance(spec, list | tuple):
        return tuple(one if isinstance(one, Constraint) else constraint_from_spec(one) for one in spec)
    return spec if isinstance(spec, Constraint) else constraint_from_spec(spec)


def take_first_ranks_radii(joining: Sequence[Entry], ranks: RankGroup) -> None:
    """Give the sets of tensors that join the first rank's radii, where the ranks' differ in nothing else; collective.

    Radii may come from the norms of weights that each rank has drawn for itself, before DistributedDataParallel gives
    all of them the first rank's.

    Args:
        joining: tensors that every rank has whole; their groups' ``constraint`` may change.
        ranks: who shares them.
    """
    devices = {entry.parameter.device for entry in joining}
    if not joining or not disagreement([repr(entry.constraint) for entry in joining], ranks, devices):
        return
    groups = list({id(entry.group): entry.group for entry in joining}.values())
    mine = [to_plain(group["constraint"]) for group in groups]
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, mine, group=ranks.group)
    if any(_without_radii(sets) != _without_radii(everyone[0]) for sets in everyone):
        return  # the ranks' agreement is checked next, which says what differs
    for group, sets, own in zip(groups, everyone[0], mine, strict=True):
        if sets != own:
            group["constraint"] = from_plain(sets)


def _without_radii(sets: Any) -> Any:
    if isinstance(sets, list):
        return [_without_radii(one) for one in sets]
    return {name: value for name, value in sets.items() if name != "radius"}


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


_ROUNDING = 1e-3
"""How far float32 steps may take a tensor out of its set, as a part of its gauge; they take it less far."""


@dataclass(frozen=True)
class Moved:
    """A tensor that lay outside its set, and was brought in."""

    name: str
    parameter: Tensor
    gauge: float
    """How many times outside it was."""
    before: Tensor
    """This rank's entries before, and ..."""
    after: Tensor
    """... after."""

    @torch.no_grad()
    def undo(self) -> None:
        """Give the tensor its entries of before, if nothing has changed them since."""
        here = to_local(self.parameter)
        if here.shape == self.after.shape and here.dtype == self.after.dtype and torch.equal(here, self.after):
            here.copy_(self.before)


@torch.no_grad()
def make_feasible(
    group: dict[str, Any], *, only: Collection[Tensor] | None = None, rounded: bool = False
) -> list[Moved]:
    """A feasible start: divide trainable tensors that lie outside their set by their gauge; collective for DTensors.

    Args:
        group: whose sets are bound.
        only: parameters that are looked at; ``None``: all.
        rounded: whether tensors are left as they are if they are no farther outside than steps of their type take them.

    Returns:
        Those that were outside.
    """
    looked_at = set(group["params"] if only is None else only)
    outside: list[Moved] = []
    for index, parameter in enumerate(group["params"]):
        if not parameter.requires_grad or parameter not in looked_at:
            continue
        allowance = max(_ROUNDING, 16 * torch.finfo(parameter.dtype).eps) if rounded else 0.0
        gauge = float(constraint_of(group, index).gauge(full_tensor(parameter)))
        if gauge > 1 + allowance:
            here = to_local(parameter)
            before = here.clone()
            here.copy_(here.double() / gauge)
            names = group.get("param_names", ())
            name = names[index] if index < len(names) else f"a tensor of shape {tuple(parameter.shape)}"
            logger.info("%s was %.4g times outside its set: scaled", name, gauge)
            outside.append(Moved(name, parameter, gauge, before, here.clone()))
    return outside


def bring_in_loaded(groups: Sequence[dict[str, Any]], arrived: Collection[Tensor]) -> None:
    """Have tensors that take their first step in their sets, and warn of those that were not.

    They were when they were added to the optimizer, so something has changed them since.
    """
    outside = [moved for group in groups for moved in make_feasible(group, only=arrived, rounded=True)]
    if outside:
        farthest = max(outside, key=lambda moved: moved.gauge)
        logger.warning(
            "outside of their sets at their first step, and scaled: %d of the tensors, %s the farthest (%.4g times); "
            "load weights before you build the optimizer",
            len(outside),
            farthest.name,
            farthest.gauge,
        )
