"""Binds a constraint to every parameter of a model, by name.

The published code finds a parameter's radius by its shape, so that BatchNorm's scale and shift share one, and by
re-initialising the model 100 times. Here each parameter has its own, and model and random state stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfw_dist.constraints.base import Constraint
from sfw_dist.constraints.unconstrained import Unconstrained
from sfw_dist.distributed.dtensor import full_tensor

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SEED = 0
_MOST_DRAWS = 100  # as many as published
_ENTRIES_WANTED = 100_000


def constrain(
    model: nn.Module, spec: Constraint, *, unconstrained: Literal["none", "norm_and_bias"] = "none"
) -> list[dict[str, Any]]:
    """Param groups for :class:`~sfw_dist.SFW`: one for each constrained parameter, then one with all unconstrained
    ones.

    Args:
        model: its parameters, trainable or frozen, shared ones once; it is not changed.
        spec: bound to each parameter's size and, with ``tau``, to its layer's initializer.
        unconstrained: ``"norm_and_bias"`` leaves out normalisation layers and tensors of at most one dimension, which
            then take momentum-SGD steps; set that last group's ``lr`` and ``weight_decay``.

    Returns:
        Groups with ``params`` as ``[(name, parameter)]`` and ``constraint``.

    Raises:
        ValueError: an ``unconstrained`` that is neither of the two, or a parameter without entries.

    Example:
        >>> from sfw_dist import KSparsePolytope
        >>> groups = constrain(nn.Linear(3, 2), KSparsePolytope(k=2, radius=0.5), unconstrained="norm_and_bias")
        >>> [([name for name, _ in group["params"]], group["constraint"]) for group in groups]
        [(['weight'], KSparsePolytope(k=2, radius=0.5)), (['bias'], Unconstrained())]
    """
    if unconstrained not in ("none", "norm_and_bias"):
        raise ValueError(f"unconstrained must be none or norm_and_bias, got {unconstrained!r}")
    free = spec.is_unconstrained
    groups, rest, seen = [], [], set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter.numel() == 0:
                raise ValueError(f"{name} of shape {tuple(parameter.shape)} has no entries: remove it from the model")
            norm_or_bias = isinstance(module, _NORM_LAYERS) or parameter.ndim <= 1
            if free or (unconstrained == "norm_and_bias" and norm_or_bias):
                rest.append((name, parameter))
                continue
            bound = spec.bind(parameter.numel(), expected_initial_norm(module, leaf))
            groups.append({"params": [(name, parameter)], "constraint": bound})
    return [*groups, {"params": rest, "constraint": Unconstrained()}] if rest else groups


def expected_initial_norm(module: nn.Module, parameter: str) -> float:
    """``E‖W‖₂`` of a module's own initializer for one of its parameters, estimated on a copy.

    The mean over up to 100 draws of ``reset_parameters`` under a generator of its own, the same on every rank; large
    tensors, whose norm hardly varies (its relative deviation is about ``0.45/√n``), take fewer. A module without
    ``reset_parameters`` counts with its present norm. An initializer of zeros (a bias, say) counts as 1, as published:
    a set of radius 0 would freeze the tensor.
    """
    original: Tensor = getattr(module, parameter)
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        norm = _norm(full_tensor(original))
    else:
        # On the CPU, where the draws are the same on every machine and one generator is all there is to restore.
        clone = _clone(module)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            draws = min(_MOST_DRAWS, math.ceil(_ENTRIES_WANTED / original.numel()))
            norm = sum(_draw(clone, parameter) for _ in range(draws)) / draws
    return norm or 1.0


def _clone(module: nn.Module) -> nn.Module:
    """The module and its children, on the CPU, with parameters and buffers of their own.

    They are whole ones where the module's are divided between ranks; ``copy.deepcopy`` refuses such modules.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    empty = {name: p if p is None else torch.empty(p.shape, dtype=p.dtype) for name, p in module._parameters.items()}
    clone._parameters = {name: p if p is None else nn.Parameter(p, p.is_floating_point()) for name, p in empty.items()}
    clone._buffers = {name: b if b is None else full_tensor(b).cpu().clone() for name, b in module._buffers.items()}
    clone._modules = {name: child if child is None else _clone(child) for name, child in module._modules.items()}
    return clone


def _draw(module: nn.Module, parameter: str) -> float:
    module.reset_parameters()  # type: ignore[operator]
    return _norm(getattr(module, parameter))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))
