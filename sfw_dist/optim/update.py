"""One step of one shard: momentum, vertex, step size, update; in torch operations, for any set and type.

:mod:`sfw_dist.optim.reference` states the same step in ten lines of float64. The compiled kernels of
:mod:`sfw_dist.optim.kernels` compute it for all tensors at once: on a CPU with the same bits, on a GPU up to the last
bits of step sizes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sfw_dist.constraints import Vertex
from sfw_dist.ops.pairwise_sum import Products, frank_wolfe_products, square_root, tree_sum
from sfw_dist.optim.shard import Shard, new_momentum
from sfw_dist.optim.vertex_codec import STATS

Rescale = Literal["gradient", "fast_gradient", "diameter", "none"]
RULES = get_args(Rescale)
Number = float | Tensor


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """The group's ``lr`` times its ``lr_factor``; a tensor has no dimension.

    Example:
        >>> learning_rate({"lr": 0.5, "lr_factor": 0.25})
        0.125
    """
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    factor: float = group.get("lr_factor", 1.0)
    return lr if factor == 1 else lr * factor


def compute_vertex(shard: Shard, state: dict[str, Any], gradient: Tensor | None) -> tuple[Tensor, Vertex]:
    """The owner's part of a step.

    Args:
        shard: a whole tensor; the LMO of a part is that of a tensor of its size.
        state: ``step`` and ``momentum_buffer`` of the shard's parameter; updated.
        gradient: of the parameter; ``None``: the tensor stays as it is.

    Returns:
        The step's statistics (see :func:`step_stats`), and the vertex. For an unconstrained tensor the "vertex" is its
        momentum, and the step size its learning rate. A step size that is not finite tells of such a gradient.
    """
    m = update_momentum(shard, state, gradient)
    if m is None:
        return no_update(shard)
    if shard.constraint.is_unconstrained:
        lr = torch.zeros((), dtype=torch.float64, device=m.device) + learning_rate(shard.group)
        poison = torch.where(m.isfinite().all(), 0.0, torch.nan).to(lr)
        return torch.stack([lr + poison, poison, lr]), Vertex(None, m)
    # Some sets look at rows and singular values, so a whole tensor has its shape.
    vertex = shard.constraint.lmo_vertex(m.view(shard.parameter.shape) if shard.is_whole else m)
    sums = Products(*(tree_sum(rows) for rows in frank_wolfe_products(m, shard.theta(), *vertex)))
    diameter = shard.constraint.diameter(shard.global_numel)
    return step_stats(sums, learning_rate(shard.group), shard.group["rescale"], diameter), vertex


def no_update(shard: Shard) -> tuple[Tensor, Vertex]:
    """Statistics and vertex of a parameter without gradient, which any rank can decode and which change nothing."""
    stats = torch.zeros(STATS, dtype=torch.float64, device=shard.parameter.device)
    # Added to -0, or taken from it, the other zero would make it 0.
    zero = 0.0 if shard.constraint.is_unconstrained else -0.0
    return stats, Vertex(None, torch.full((shard.numel,), zero, dtype=shard.dtype, device=shard.parameter.device))


def apply_update(shard: Shard, gamma: Tensor, vertex: Vertex) -> None:
    """Every rank's part of a step: ``θ ← (1 − γ)·θ + γ·v``, or ``θ − lr·m``, in place."""
    updated = updated_entries(shard, gamma, vertex)
    if shard.is_whole:
        shard.parameter.copy_(updated.view(shard.parameter.shape))
        return
    # In another memory format entries() is a copy, so the part is written into a row-major copy of the tensor.
    rows = shard.parameter.detach().contiguous()
    shard.entries(rows).copy_(updated)
    if rows.data_ptr() != shard.parameter.data_ptr():
        shard.parameter.copy_(rows)


def updated_entries(shard: Shard, gamma: Tensor, vertex: Vertex) -> Tensor:
    """The shard's entries after the step, ``(numel,)`` in its type, in memory of their own."""
    theta = shard.theta()
    shift = vertex.values * gamma.to(shard.dtype)
    if shard.constraint.is_unconstrained:
        return theta - shift
    updated = theta * (1 - gamma).to(shard.dtype)
    return updated.add_(shift) if vertex.indices is None else updated.index_add_(0, vertex.indices, shift)


def update_momentum(shard: Shard, state: dict[str, Any], gradient: Tensor | None) -> Tensor | None:
    """``m ← g`` on a tensor's first step, ``m ← ρ·m + (1 − ρ)·g`` afterwards (unconstrained: ``ρ·m + g``).

    Args:
        shard: its group holds ρ, and the weight decay of unconstrained tensors.
        state: ``step`` and ``momentum_buffer``; updated.
        gradient: of the shard's parameter.

    Returns:
        The momentum's entries, ``(numel,)`` in the step's type; ``None`` without a gradient.
    """
    if gradient is None:
        return None
    g = shard.entries(gradient).to(shard.dtype)
    rho = shard.group["momentum"]
    unconstrained = shard.constraint.is_unconstrained
    if unconstrained and shard.group["weight_decay"] != 0:
        g = g + shard.theta() * shard.group["weight_decay"]
    first = is_first_step(shard, state)
    if momentum_disabled(shard, state):
        state["step"].zero_()
    else:
        state["step"] += 1
    if rho == 0:
        return g
    m = shard.momentum_entries(state["momentum_buffer"])
    if first:
        return m.copy_(g)
    # Products are rounded before they are added, here and in the compiled kernels, so that all agree to the bit.
    return m.mul_(rho).add_(g if unconstrained else g * (1 - rho))


def is_first_step(shard: Shard, state: dict[str, Any]) -> bool:
    """Whether momentum starts with this gradient; creates the buffer that it needs."""
    if shard.group["momentum"] > 0 and state.get("momentum_buffer") is None:  # a scheduler raised the momentum from 0
        state["momentum_buffer"] = new_momentum(shard)
        return True
    return bool(state["step"].item() == 0)


def momentum_disabled(shard: Shard, state: dict[str, Any]) -> bool:
    """Whether a scheduler set the momentum to 0: ``step`` then stays 0, so that a later momentum starts afresh.

    The buffer is kept, because a state dict has the same keys before and after.
    """
    return shard.group["momentum"] == 0 and "momentum_buffer" in state


def rescale_ratio(rescale: Rescale, norm: Tensor, distance: Tensor, diameter: Number) -> tuple[Number, Number]:
    """The factor f of the step size ``γ = clamp(lr·f, 0, 1)``, as numerator and denominator.

    Args:
        rescale: ``gradient``: ‖m‖/‖θ − v‖; ``diameter``: 1/D (Pokutta et al., arXiv 2010.07243); ``fast_gradient``:
            2‖m‖/D (Zimmer et al., arXiv 2205.11921); ``none``: 1.
        norm, distance: float64 ``(…,)``, ‖m‖₂ and ‖θ − v‖₂.
        diameter: D, the set's.
    """
    match rescale:
        case "gradient":
            return norm, distance
        case "fast_gradient":
            return 2 * norm, diameter
        case "diameter":
            return torch.ones_like(norm), diameter
        case _:
            return torch.ones_like(norm), 1.0


def step_stats(sums: Products, lr: Number, rescale: Rescale, diameter: Number) -> Tensor:
    """Step size γ, Frank-Wolfe gap and effective learning rate of constrained tensors.

    Args:
        sums: float64 ``(…,)``, of one tensor or of several.
        lr, rescale, diameter: their learning rate and how it becomes a step size, see :func:`rescale_ratio`.

    Returns:
        float64 ``(…, 3)``. Where m = 0 or lr = 0, γ is 0 and θ stays; where θ = v otherwise, γ is 1 and θ stays too. γ
        is NaN where m is not finite.
    """
    norm, distance = square_root(sums.direction_squared), square_root(sums.distance_squared)
    numerator, denominator = rescale_ratio(rescale, norm, distance, diameter)
    gamma = torch.as_tensor(lr * (numerator / denominator)).clamp(0, 1)
    # At θ = v, 0 · ∞ is no number. A rate that is a number is compared here: to send it to a GPU would wait for it.
    stays = (norm == 0) | (lr == 0) if isinstance(lr, Tensor) or lr != 0 else torch.ones_like(norm, dtype=torch.bool)
    gamma = torch.where(stays, 0.0, gamma)
    gamma = torch.where(norm.isfinite(), gamma, torch.nan)
    effective = torch.where(norm == 0, 0.0, gamma * distance / norm)
    return torch.stack([gamma, sums.gap, effective], -1)
