"""One step of one tensor: what its owner computes, and what every rank then does with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sfw_dist.constraints import Constraint, LpBall, Unconstrained, Vertex
from sfw_dist.reduction import frank_wolfe_products
from sfw_dist.wire import HEADER, VertexFormat

Rescale = Literal["gradient", "fast_gradient", "diameter", "none"]


@dataclass
class Slot:
    """A tensor in the order of the plan."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    dtype: torch.dtype
    """In which momentum is kept and the step computed: float32, or float64 for float64 parameters."""
    constraint: Constraint
    format: VertexFormat

    @classmethod
    def of(cls, group: dict[str, Any], group_index: int, index: int) -> Slot:
        """The ``index``-th parameter of a param group; raises ``ValueError`` if its set is not bound."""
        parameter = group["params"][index]
        name = group["param_names"][index] if "param_names" in group else f"group{group_index}.param{index}"
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        constraint, n = group["constraint"], parameter.numel()
        radius = constraint.radius(n) if constraint.signs_only else None
        return cls(name, parameter, group, dtype, constraint, VertexFormat(n, constraint.support(n), dtype, radius))

    @property
    def cost(self) -> float:
        """Of its owner's work, in memory passes times entries.

        3 passes for the momentum (m in and out, g); for a constrained tensor 2 more for the step size (m, θ); and about
        4 for a selection (magnitudes out, partition in and out, scan) where vertices are sparse.
        """
        if isinstance(self.constraint, Unconstrained):
            return 3.0 * self.format.n
        dense = isinstance(self.constraint, LpBall) and self.constraint.p != 1
        return (5.0 if dense else 9.0) * self.format.n


def answer(slot: Slot, state: dict[str, Any]) -> tuple[Tensor, Vertex]:
    """The owner's part: header (step size, gap, effective learning rate; float64 ``(3,)``) and vertex.

    ``state`` holds ``step`` and ``momentum_buffer``, and is moved on. An unconstrained tensor's "vertex" is its
    momentum, and its step size the learning rate. A step size that is not finite tells of a gradient that was not.
    """
    m = _momentum(slot, state)
    if m is None:  # A step of length 0, to a vertex that any rank can decode.
        header = torch.zeros(HEADER, dtype=torch.float64, device=slot.parameter.device)
        return header, Vertex(None, torch.zeros(slot.format.n, dtype=slot.dtype, device=slot.parameter.device))
    if isinstance(slot.constraint, Unconstrained):
        lr = torch.as_tensor(slot.group["lr"], dtype=torch.float64, device=m.device)
        poison = m.sum(dtype=torch.float64) * 0  # NaN or infinity anywhere in m makes NaN here
        return torch.stack([lr + poison, poison, lr]), Vertex(None, m.view(-1))
    vertex = slot.constraint.lmo_vertex(m)
    return _step_size(slot, m, vertex), vertex


def move(slot: Slot, step_size: Tensor, vertex: Vertex) -> None:
    """Every rank's part: ``θ ← (1 − γ)·θ + γ·v``, or ``θ − lr·m``; the same operations on one rank as on many."""
    parameter = slot.parameter
    theta = parameter.detach().to(slot.dtype).contiguous().view(-1)
    if isinstance(slot.constraint, Unconstrained):
        theta = theta.sub_(vertex.values * step_size.to(slot.dtype))
    else:
        theta.mul_((1 - step_size).to(slot.dtype))
        shift = vertex.values * step_size.to(slot.dtype)
        theta = theta.add_(shift) if vertex.indices is None else theta.index_add_(0, vertex.indices, shift)
    if theta.data_ptr() != parameter.data_ptr():  # another type or memory format: the step was made on a copy
        parameter.copy_(theta.view(parameter.shape))


def _momentum(slot: Slot, state: dict[str, Any]) -> Tensor | None:
    """The tensor's momentum after this step's gradient, in the step's type; ``None`` without a gradient."""
    gradient = slot.parameter.grad
    if gradient is None:
        return None
    g = gradient.to(slot.dtype)
    rho = slot.group["momentum"]
    unconstrained = isinstance(slot.constraint, Unconstrained)
    if unconstrained and slot.group["weight_decay"] != 0:
        g = g.add(slot.parameter, alpha=slot.group["weight_decay"])
    first = state["step"] == 0
    state["step"] += 1
    if rho == 0:
        return g.contiguous()
    if "momentum_buffer" not in state:  # a scheduler raised the momentum from 0
        state["momentum_buffer"] = g.clone(memory_format=torch.contiguous_format)
        return state["momentum_buffer"]
    m = state["momentum_buffer"]
    if first:
        return m.copy_(g)
    return m.mul_(rho).add_(g, alpha=1.0 if unconstrained else 1 - rho)


def _step_size(slot: Slot, m: Tensor, vertex: Vertex) -> Tensor:
    """The header of a constrained tensor: γ, gap and effective learning rate, float64 ``(3,)`` on its device."""
    theta = slot.parameter.detach().to(slot.dtype).reshape(-1)
    products = frank_wolfe_products(m.view(-1), theta, *vertex)
    norm, distance = products.direction_squared.sqrt(), products.distance_squared.sqrt()
    match slot.group["rescale"]:
        case "gradient":
            factor = norm / distance  # θ = v makes it infinite, and γ = 1 then keeps θ
        case "fast_gradient":
            factor = 2 * norm / slot.constraint.diameter(slot.format.n)
        case "diameter":
            factor = torch.full_like(norm, 1 / slot.constraint.diameter(slot.format.n))
        case _:
            factor = torch.ones_like(norm)
    gamma = torch.where(norm == 0, norm, (slot.group["lr"] * factor).clamp(0, 1))
    gamma = torch.where(norm.isfinite(), gamma, torch.nan)
    effective = torch.where(norm == 0, norm, gamma * distance / norm)
    return torch.stack([gamma, products.gap, effective])
