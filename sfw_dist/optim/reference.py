"""Algorithm 1 of the paper, one step of one tensor, in float64. This is the definition of what :class:`SFW` computes.

Start reading here. Everything else in :mod:`sfw_dist.optim` computes the same step faster, for all tensors together and
on many ranks, and the tests compare it with this module.

Sources: Lu et al., ICLR 2022, Algorithm 1; the rescale rules ``gradient`` and ``diameter`` from Pokutta, Spiegel,
Zimmer, arXiv 2010.07243, ``fast_gradient`` from Zimmer, Spiegel, Pokutta, arXiv 2205.11921.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sfw_dist.constraints import (
    Constraint,
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSupportBall,
)


class Step(NamedTuple):
    """The result of one step."""

    theta: Tensor
    m: Tensor
    gamma: float
    """Step size γ in [0, 1]."""
    gap: float
    """Frank-Wolfe gap ``⟨m, θ − v⟩``."""
    effective_lr: float
    """``γ·‖θ − v‖ / ‖m‖``."""


def sfw_step(
    theta: Tensor, g: Tensor, m: Tensor | None, constraint: Constraint, *, lr: float, momentum: float, rescale: str
) -> Step:
    """One iteration of stochastic Frank-Wolfe with momentum.

    Args:
        theta, g: the tensor θ and its gradient, of one shape and any floating-point type.
        m: the momentum that the step before returned; ``None`` on the tensor's first step.
        constraint: the set C, bound; one of those for which :func:`lmo` has a definition.
        lr: learning rate η.
        momentum: ρ.
        rescale: ``gradient``, ``fast_gradient``, ``diameter`` or ``none``.

    Example:
        >>> from sfw_dist.constraints import KSparsePolytope
        >>> theta, g = torch.zeros(3), torch.tensor([3.0, -4.0, 0.0])
        >>> step = sfw_step(theta, g, None, KSparsePolytope(k=1, radius=2.0), lr=0.1, momentum=0.9, rescale="gradient")
        >>> step.theta, step.gamma  # v = (0, 2, 0), γ = 0.1·5/2
        (tensor([0.0000, 0.5000, 0.0000], dtype=torch.float64), 0.25)
    """
    θ, g = theta.double(), g.double()
    m = g if m is None else momentum * m + (1 - momentum) * g
    v, D = lmo(m, constraint), diameter(constraint, m.numel())
    norm, distance = float(m.norm()), float((θ - v).norm())
    f = {"gradient": norm / distance if distance > 0 else math.inf, "fast_gradient": 2 * norm / D}
    f |= {"diameter": 1 / D, "none": 1.0}
    γ = min(lr * f[rescale], 1.0) if norm > 0 and lr > 0 else 0.0  # where m = 0 every v is a minimizer: θ stays
    θ_next = (1 - γ) * θ + γ * v
    return Step(θ_next, m, γ, float((m * (θ - v)).sum()), γ * distance / norm if norm > 0 else 0.0)


def lmo(m: Tensor, constraint: Constraint) -> Tensor:
    """``argmin_{v∈C} ⟨v, m⟩``, of the shape of ``m``.

    Raises:
        ValueError: there is no definition for this set.
    """
    n = m.numel()
    r = constraint.radius(n)
    match constraint:
        case KSparsePolytope():
            return -r * top_k(m, constraint.support(n)).sign()
        case KSupportBall():
            return -r * unit(top_k(m, constraint.support(n)))
        case LpBall(p=2):
            return -r * unit(m)
        case LpBall(p=math.inf):
            return -r * m.sign()
        case GroupKSupportBall():
            rows = matrix(m)
            kept = top_k(rows.norm(dim=1), constraint.k_of(len(rows))) > 0
            return (-r * unit(rows * kept[:, None])).view(m.shape)
        case NuclearBall():
            return -r * unit(truncated(m, 1))
        case SpectralKSupportBall():
            return -r * unit(truncated(m, constraint.k_of(min(matrix(m).shape))))
    raise ValueError(f"the reference has no LMO for {constraint!r}")


def diameter(constraint: Constraint, n: int) -> float:
    """The L2 diameter of C over ``n`` entries."""
    r = constraint.radius(n)
    match constraint:
        case KSparsePolytope():
            return 2 * r * math.sqrt(constraint.support(n))
        case LpBall(p=math.inf):
            return 2 * r * math.sqrt(n)
    return 2 * r


def top_k(x: Tensor, k: int) -> Tensor:
    """``x`` with all but its K entries of largest magnitude set to 0; of equal ones the first stay."""
    flat = x.flatten()
    largest = flat.abs().argsort(descending=True, stable=True)[:k]
    kept = flat.new_zeros(flat.shape)
    kept[largest] = flat[largest]
    return kept.view(x.shape)


def matrix(x: Tensor) -> Tensor:
    """``x`` as a matrix of its first dimension by all others."""
    return x.reshape(len(x), -1) if x.ndim > 0 else x.reshape(1, 1)


def truncated(x: Tensor, k: int) -> Tensor:
    """The nearest matrix of rank ``k``: the ``k`` largest singular triplets, by an SVD."""
    u, s, vh = torch.linalg.svd(matrix(x), full_matrices=False)
    return (u[:, :k] * s[:k] @ vh[:k]).view(x.shape)


def unit(x: Tensor) -> Tensor:
    """``x/‖x‖₂``, and 0 for ``x = 0``."""
    norm = x.norm()
    return x / norm if norm > 0 else x
