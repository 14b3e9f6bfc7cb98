"""One step of one tensor: what its owner computes, and what every rank then does with it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sfw_dist.constraints import Unconstrained, Vertex
from sfw_dist.ops.pairwise_sum import Products, frank_wolfe_products, square_root, tree_sum
from sfw_dist.optim.shard import Slot, momentum_buffer
from sfw_dist.optim.vertex_codec import HEADER

Rescale = Literal["gradient", "fast_gradient", "diameter", "none"]


def answer(slot: Slot, state: dict[str, Any], gradient: Tensor | None) -> tuple[Tensor, Vertex]:
    """The owner's part: header (step size, gap, effective learning rate; float64 ``(3,)``) and vertex.

    ``state`` holds ``step`` and ``momentum_buffer``, and is moved on. An unconstrained tensor's "vertex" is its
    momentum, and its step size the learning rate. A step size that is not finite tells of a gradient that was not.
    """
    m = momentum(slot, state, gradient)
    if m is None:
        return no_step(slot)
    if isinstance(slot.constraint, Unconstrained):
        lr = torch.as_tensor(slot.group["lr"], dtype=torch.float64, device=m.device)
        poison = torch.where(m.isfinite().all(), 0.0, torch.nan).to(lr)
        return torch.stack([lr + poison, poison, lr]), Vertex(None, m)
    # Some sets look at rows and singular values; those that do not may have to answer for a part of a tensor.
    vertex = slot.constraint.lmo_vertex(m.view(slot.parameter.shape) if slot.whole else m)
    return step_size(slot, frank_wolfe_products(m, slot.theta(), *vertex)), vertex


def no_step(slot: Slot) -> tuple[Tensor, Vertex]:
    """For a tensor without gradient: a step of length 0, to a vertex that any rank can decode."""
    header = torch.zeros(HEADER, dtype=torch.float64, device=slot.parameter.device)
    return header, Vertex(None, torch.zeros(slot.format.n, dtype=slot.dtype, device=slot.parameter.device))


def move(slot: Slot, step_size: Tensor, vertex: Vertex) -> None:
    """Every rank's part: ``θ ← (1 − γ)·θ + γ·v``, or ``θ − lr·m``; the same operations on one rank as on many."""
    moved = moved_entries(slot, step_size, vertex)
    if slot.whole:
        slot.parameter.copy_(moved.view(slot.parameter.shape))
    else:
        # Of a tensor in another memory format, entries() is a copy: they are written where they lie.
        rows = slot.parameter.detach().contiguous()
        slot.entries(rows).copy_(moved)
        if rows.data_ptr() != slot.parameter.data_ptr():
            slot.parameter.copy_(rows)


def moved_entries(slot: Slot, step_size: Tensor, vertex: Vertex) -> Tensor:
    """The slot's entries after the step, in its type, in memory of their own."""
    theta = slot.theta()
    shift = vertex.values * step_size.to(slot.dtype)
    if isinstance(slot.constraint, Unconstrained):
        return theta - shift
    moved = theta * (1 - step_size).to(slot.dtype)
    return moved.add_(shift) if vertex.indices is None else moved.index_add_(0, vertex.indices, shift)


def momentum(slot: Slot, state: dict[str, Any], gradient: Tensor | None) -> Tensor | None:
    """The momentum's entries ``(n,)`` after this step's gradient, in the step's type; ``None`` without a gradient."""
    if gradient is None:
        return None
    g = slot.entries(gradient).to(slot.dtype)
    rho = slot.group["momentum"]
    unconstrained = isinstance(slot.constraint, Unconstrained)
    if unconstrained and slot.group["weight_decay"] != 0:
        g = g + slot.theta() * slot.group["weight_decay"]
    first = is_first(slot, state)
    if forgets(slot, state):
        state["step"].zero_()
    else:
        state["step"] += 1
    if rho == 0:
        return g
    m = state["momentum_buffer"].view(-1)
    if first:
        return m.copy_(g)
    # Products are rounded before they are added, here and in the fused kernels, so that all agree to the bit.
    return m.mul_(rho).add_(g if unconstrained else g * (1 - rho))


def is_first(slot: Slot, state: dict[str, Any]) -> bool:
    """Whether momentum starts with this gradient; makes the buffer that it needs."""
    if slot.group["momentum"] > 0 and "momentum_buffer" not in state:  # a scheduler raised the momentum from 0
        state["momentum_buffer"] = momentum_buffer(slot)
        return True
    return bool(state["step"].item() == 0)


def forgets(slot: Slot, state: dict[str, Any]) -> bool:
    """Whether a scheduler took the momentum away: ``step`` then stays 0, and a later momentum starts anew.

    The buffer stays too, for a state dict has the same keys before and after.
    """
    return slot.group["momentum"] == 0 and "momentum_buffer" in state


def step_size(slot: Slot, rows: Products) -> Tensor:
    """The header of a constrained tensor, from its sums by row: γ, gap, effective learning rate; float64 ``(3,)``."""
    sums = Products(*(tree_sum(sums) for sums in rows))
    return step_sizes(sums, slot.group["lr"], slot.group["rescale"], slot.constraint.diameter(slot.n))


def step_sizes(sums: Products, lr: float | Tensor, rescale: Rescale, diameter: float | Tensor) -> Tensor:
    """γ, gap and effective learning rate from the sums of one constrained tensor, or of several: ``(…, 3)``."""
    norm, distance = square_root(sums.direction_squared), square_root(sums.distance_squared)
    match rescale:
        case "gradient":
            factor = norm / distance  # θ = v makes it infinite, and γ = 1 then keeps θ
        case "fast_gradient":
            factor = 2 * norm / diameter
        case "diameter":
            factor = torch.ones_like(norm) / diameter
        case _:
            factor = torch.ones_like(norm)
    gamma = torch.where(norm == 0, norm, (lr * factor).clamp(0, 1))
    gamma = torch.where(norm.isfinite(), gamma, torch.nan)
    effective = torch.where(norm == 0, norm, gamma * distance / norm)
    return torch.stack([gamma, sums.gap, effective], -1)
