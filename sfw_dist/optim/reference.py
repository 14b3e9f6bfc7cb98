"""One SFW step for one tensor, in float64, as the papers state it. Slow and plain: the definition of what SFW does.

Algorithm 1: Lu et al., ICLR 2022. The rescale rules: Pokutta, Spiegel, Zimmer, arXiv 2010.07243 (gradient, diameter),
and Zimmer, Spiegel, Pokutta, arXiv 2205.11921 (fast_gradient).
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
    """What one step makes of a tensor, and how it went."""

    theta: Tensor
    m: Tensor
    gamma: float
    gap: float
    effective_lr: float


def sfw_step(
    theta: Tensor, g: Tensor, m: Tensor | None, constraint: Constraint, *, lr: float, momentum: float, rescale: str
) -> Step:
    """Algorithm 1, the body of its loop.

    Args:
        theta, g: the tensor and its gradient, of one shape and any floating-point type.
        m: the momentum that the step before returned; ``None`` on the tensor's first step.
        constraint: a concrete :class:`KSparsePolytope`, :class:`KSupportBall`, :class:`LpBall` with p = 2 or ∞,
            :class:`GroupKSupportBall`, :class:`NuclearBall` or :class:`SpectralKSupportBall`.
        rescale: ``gradient``, ``fast_gradient``, ``diameter`` or ``none``.
    """
    theta, g = theta.double(), g.double()
    m = g if m is None else momentum * m + (1 - momentum) * g
    v, diameter = lmo(m, constraint)

    norm, distance = float(m.norm()), float((theta - v).norm())
    if norm == 0:  # every v is a minimizer: stay
        return Step(theta, m, gamma=0.0, gap=0.0, effective_lr=0.0)
    factor = {
        "gradient": norm / distance if distance > 0 else math.inf,
        "fast_gradient": 2 * norm / diameter,
        "diameter": 1 / diameter,
        "none": 1.0,
    }[rescale]
    gamma = min(lr * factor, 1.0)

    gap = float((m * (theta - v)).sum())
    return Step((1 - gamma) * theta + gamma * v, m, gamma, gap, gamma * distance / norm)


def lmo(m: Tensor, constraint: Constraint) -> tuple[Tensor, float]:
    """``argmin_{v∈C} ⟨v, m⟩``, and the L2 diameter of C."""
    n = m.numel()
    match constraint:
        case KSparsePolytope():
            k, r = constraint.support(n), constraint.radius(n)
            return -r * top_k(m, k).sign(), 2 * r * math.sqrt(k)
        case KSupportBall():
            kept, r = top_k(m, constraint.support(n)), constraint.radius(n)
            return -r * unit(kept), 2 * r
        case LpBall(p=2):
            r = constraint.radius(n)
            return -r * unit(m), 2 * r
        case LpBall(p=math.inf):
            r = constraint.radius(n)
            return -r * m.sign(), 2 * r * math.sqrt(n)
        case GroupKSupportBall():
            rows, r = matrix(m), constraint.radius(n)
            kept = top_k(rows.norm(dim=1), constraint.k_of(len(rows))) > 0
            return (-r * unit(rows * kept[:, None])).view(m.shape), 2 * r
        case NuclearBall():
            r = constraint.radius(n)
            return -r * unit(truncated(m, 1)), 2 * r
        case SpectralKSupportBall():
            r = constraint.radius(n)
            return -r * unit(truncated(m, constraint.k_of(min(matrix(m).shape)))), 2 * r
    raise ValueError(f"the reference has no LMO for {constraint!r}")


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
