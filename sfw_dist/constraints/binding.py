"""Binds a constraint to every parameter of a model, by name.

The published code finds a parameter's radius by its shape, so that BatchNorm's scale and shift share one, and by
re-initialising the model 100 times. Here each parameter has its own, and model and random state stay as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from sfw_dist.constraints.base import Constraint
from sfw_dist.constraints.initial_norm import Draws, InitialNorm, Size, choose_norm, drawn_norms, present_size
from sfw_dist.constraints.unconstrained import Unconstrained
from sfw_dist.distributed.rank_group import RankGroup

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TRAINABLE_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Free = Literal["none", "norm_and_bias"]
NormRule = Literal["auto", "initializer"]
_Owners = list[tuple[nn.Module, str]]
"""The modules that have a parameter, each with its name there."""


@dataclass(frozen=True)
class Binding:
    """What :func:`constrain` makes of one parameter."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    constraint: Constraint | None
    """``None``: it cannot be trained, and is in no group."""
    norm: float | None
    """What ``tau`` was multiplied by; ``None`` where it does not matter."""
    source: str
    """Of the norm: ``initializer``, ``present`` or ``1 for zeros``; or why there is none."""

    @property
    def radius(self) -> float | None:
        """The r of the set's formula."""
        if self.constraint is None or self.constraint.is_unconstrained:
            return None
        return self.constraint.radius(self.parameter.numel())


def constrain(
    model: nn.Module,
    spec: Constraint,
    *,
    unconstrained: Free = "none",
    norm: NormRule = "auto",
    process_group: dist.ProcessGroup | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Param groups for :class:`~sfw_dist.SFW`: one for each constrained parameter, then one with all unconstrained
    ones.

    **The norm that tau refers to** is E‖W‖₂ of the initializer that made the parameter: the mean over up to 100 draws
    of the ``reset_parameters`` of torch's layers, on a copy. Where the present norm is none that these draws allow, by
    more than chance, something else made the weights (the model's own initialisation, a checkpoint, training), and the
    present norm counts; so it does where no layer of torch's sets the parameter. The chance that weights fresh from one
    of torch's initializers are taken for others is below 1e-9; a difference below 1 % is disregarded. Of a parameter
    that several modules share the initializer counts that allows its norm, and if several do, the one with the
    smallest. A parameter of zeros, or of entries below 2e-4, says nothing about its scale and has its initializer's
    norm; if that makes zeros, too, or there is none, it counts as 1, as published.

    So call it when the model has the weights whose norm shall count: before training, or for fine-tuning after the
    checkpoint is loaded. ``norm="initializer"`` gives a model the sets that it had when it was new.

    With several ranks, norms of initializers are the same on all, and present ones are those of a rank's own weights.
    SFW takes the first rank's, whose weights DistributedDataParallel sends to all, and the baselines do at their first
    step; a ``process_group`` gives them here.

    Args:
        model: its parameters, trainable or frozen, shared ones once, with the names that they have in the model inside
            of DistributedDataParallel and ``torch.compile``; it is not changed. Frozen parameters that SFW cannot train
            (integer, float8, complex or sparse ones, quantised ones, ones without entries) are in no group.
        spec: bound to each parameter's size and, with ``tau``, to its norm.
        unconstrained: ``"norm_and_bias"`` leaves out normalisation layers and tensors of at most one dimension, which
            then take momentum-SGD steps; set that last group's ``lr_factor`` (or ``lr``) and ``weight_decay``.
        norm: ``"initializer"``: the present norm counts only where there is no initializer.
        process_group: ranks that all call this, for the first one's present norms (``dist.group.WORLD``: all of them);
            ``None``: nothing is sent, except that DTensors are gathered over their mesh where their norm is needed.
        verbose: print a table of :func:`bindings`, on the first rank.

    Returns:
        Groups with ``params`` as ``[(name, parameter)]`` and ``constraint``.

    Raises:
        ValueError: an option that does not exist; with its name, a trainable parameter that SFW cannot train, one that
            is not initialised (device meta, a lazy module), or one that is not finite; ranks with other parameters.

    Example:
        >>> from sfw_dist import KSparsePolytope
        >>> groups = constrain(nn.Linear(3, 2), KSparsePolytope(k=2, radius=0.5), unconstrained="norm_and_bias")
        >>> [([name for name, _ in group["params"]], group["constraint"]) for group in groups]
        [(['weight'], KSparsePolytope(k=2, radius=0.5)), (['bias'], Unconstrained())]
    """
    bound = bindings(model, spec, unconstrained=unconstrained, norm=norm, process_group=process_group)
    if verbose and RankGroup.of(process_group).rank == 0:
        print(binding_table(bound))
    groups: list[dict[str, Any]] = []
    rest = []
    for one in bound:
        if one.constraint is None:
            continue
        if one.constraint.is_unconstrained:
            rest.append((one.name, one.parameter))
        else:
            groups.append({"params": [(one.name, one.parameter)], "constraint": one.constraint})
    return [*groups, {"params": rest, "constraint": Unconstrained()}] if rest else groups


def bindings(
    model: nn.Module,
    spec: Constraint,
    *,
    unconstrained: Free = "none",
    norm: NormRule = "auto",
    process_group: dist.ProcessGroup | None = None,
) -> list[Binding]:
    """What :func:`constrain` makes of each parameter, and why; arguments and errors are the same.

    Returns:
        One for each parameter, in the model's order, those that are in no group included.

    Example:
        >>> from sfw_dist import LpBall
        >>> for one in bindings(nn.LayerNorm(16), LpBall(2, tau=15.0)):
        ...     print(one.name, one.norm, one.source, one.radius)
        weight 4.0 initializer 60.0
        bias 1.0 1 for zeros 15.0
    """
    if unconstrained not in ("none", "norm_and_bias"):
        raise ValueError(f"unconstrained must be none or norm_and_bias, got {unconstrained!r}")
    if norm not in ("auto", "initializer"):
        raise ValueError(f"norm must be auto or initializer, got {norm!r}")
    found: list[Binding] = []
    constrained: list[tuple[int, _Owners]] = []
    for name, parameter, owners in _owned_parameters(_unwrapped(model)):
        left_out = _check(name, parameter, owners[0][0])
        norm_or_bias = parameter.ndim <= 1 or any(isinstance(module, _NORM_LAYERS) for module, _ in owners)
        if left_out:
            found.append(Binding(name, parameter, None, None, left_out))
        elif spec.is_unconstrained or (unconstrained == "norm_and_bias" and norm_or_bias):
            found.append(Binding(name, parameter, Unconstrained(), None, "unconstrained"))
        elif not spec.needs_initial_norm:
            found.append(Binding(name, parameter, spec.bind(parameter.numel(), 1.0), None, "size given"))
        else:
            constrained.append((len(found), owners))
            found.append(Binding(name, parameter, spec, None, "not bound yet"))
    if constrained:
        norms = _norms([(found[place], owners) for place, owners in constrained], norm)
        if process_group is not None:
            norms = _of_first_rank(norms, found, RankGroup.of(process_group))
        for (place, _), (value, source) in zip(constrained, norms, strict=True):
            name, parameter = found[place].name, found[place].parameter
            found[place] = Binding(name, parameter, spec.bind(parameter.numel(), value), value, source)
    return found


def binding_table(found: Sequence[Binding]) -> str:
    """The table that ``constrain(…, verbose=True)`` prints.

    Example:
        >>> from sfw_dist import LpBall
        >>> print(binding_table(bindings(nn.Linear(2, 3, bias=False), LpBall(2, diameter=1.0))))
        parameter  shape  set     norm  source      radius
        weight     3×2    LpBall  -     size given  0.5
    """
    rows = [("parameter", "shape", "set", "norm", "source", "radius")]
    for one in found:
        shape = "×".join(map(str, one.parameter.shape)) or "scalar"
        kind = "-" if one.constraint is None else type(one.constraint).__name__
        norm, radius = ("-" if x is None else f"{x:.4g}" for x in (one.norm, one.radius))
        rows.append((one.name, shape, kind, norm, one.source, radius))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # of torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, _Owners]]:
    """Every parameter once, with its first name and all modules that have it."""
    owners: dict[nn.Parameter, _Owners] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, leaf))
            names.setdefault(parameter, f"{prefix}.{leaf}" if prefix else leaf)
    return ((names[parameter], parameter, modules) for parameter, modules in owners.items())


def _check(name: str, parameter: nn.Parameter, module: nn.Module) -> str | None:
    """Why a frozen parameter is in no group; raises ``ValueError`` for one that is to be trained, but cannot."""
    if isinstance(parameter, UninitializedParameter):
        kind = type(module).__name__
        raise ValueError(f"{name} is not initialised ({kind}): send one batch through the model before constrain")
    if parameter.is_meta:
        raise ValueError(f"{name} has no memory (device meta): initialise the model before constrain, with to_empty")
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is FullyShardedDataParallel's, which keeps slices of several tensors in one: take "
            "torch.distributed.fsdp.fully_shard"
        )
    reason = cannot_train(parameter)
    if reason is not None and parameter.requires_grad:
        raise ValueError(f"{name} {reason}, which SFW cannot train: freeze it with requires_grad_(False), or {_REMEDY}")
    return reason and f"in no group: {reason}"


_REMEDY = "store it as one dense floating-point tensor"


def cannot_train(parameter: Tensor) -> str | None:
    """Why SFW cannot train a tensor of this kind, as the end of a sentence; ``None``: it can."""
    if parameter.is_nested:
        return "is a nested tensor"
    if parameter.numel() == 0:
        return f"of shape {tuple(parameter.shape)} has no entries"
    if parameter.dtype not in TRAINABLE_TYPES:
        return f"is {str(parameter.dtype).removeprefix('torch.')}"
    if parameter.layout != torch.strided:
        return f"is {str(parameter.layout).removeprefix('torch.')}"
    if not isinstance(parameter, DTensor) and hasattr(parameter, "__tensor_flatten__"):
        return f"is a {type(parameter).__name__}"  # of torchao, say: a quantised tensor that calls itself bfloat16
    return None


def _norms(parameters: Sequence[tuple[Binding, _Owners]], rule: NormRule) -> list[InitialNorm]:
    wanted: dict[nn.Module, list[str]] = {}
    for _, owners in parameters:
        for module, leaf in owners:
            wanted.setdefault(module, []).append(leaf)
    draws: dict[tuple[nn.Module, str], Draws] = {}
    for module, leaves in wanted.items():
        draws |= {(module, leaf): drawn for leaf, drawn in drawn_norms(module, leaves).items()}
    norms = []
    for one, owners in parameters:
        drawn = [draws[owner] for owner in owners if owner in draws]
        norms.append(choose_norm(drawn, one.parameter.numel(), partial(_finite_size, one), rule))
    return norms


def _finite_size(one: Binding) -> Size:
    size = present_size(one.parameter)
    if not math.isfinite(size.norm):
        raise ValueError(f"{one.name} has entries that are not finite: initialise the model before constrain")
    return size


def _of_first_rank(norms: list[InitialNorm], found: Sequence[Binding], ranks: RankGroup) -> list[InitialNorm]:
    """The norms of a group's first rank; collective.

    Raises:
        ValueError: on every rank, with the ranks that differ in more than norms.
    """
    if ranks.size == 1:
        return norms
    described = [(one.name, tuple(one.parameter.shape), repr(one.constraint)) for one in found]
    digest = hashlib.sha256(repr(described).encode()).digest()
    mine = (digest, [tuple(norm) for norm in norms] if ranks.rank == 0 else None)
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, mine, group=ranks.group)
    differing = [rank for rank, (other, _) in enumerate(everyone) if other != everyone[0][0]]
    if differing:
        raise ValueError(
            f"ranks {differing} have other parameters or sets than the first of process_group: "
            "build the same model on every rank, or give the group of those that do"
        )
    return [InitialNorm(*norm) for norm in everyone[0][1]]
