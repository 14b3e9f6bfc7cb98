"""L_p balls."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfw_dist.constraints.base import (
    Constraint,
    ShardedDirection,
    SizedConstraint,
    Vertex,
    scaled_to,
    selected_vertex,
    signed,
)
from sfw_dist.distributed.coalesced import AsyncTask, as_numbers, as_words
from sfw_dist.ops.pairwise_sum import absolute_sum, row_sums, square_root, squared_norm, tree_sum
from sfw_dist.ops.sharded_sum import partial_sums, slots
from sfw_dist.ops.topk import select
from sfw_dist.ops.topk.sharded import select_sharded


class LpBall(SizedConstraint):
    """``{θ : ‖θ‖_p ≤ r}``, p ≥ 1 (``math.inf`` for the maximum norm).

    LMO (``1/p + 1/q = 1``): ``v_i = −r·sign(x_i)·|x_i|^{q−1} / ‖x‖_q^{q−1}``; for p = 1 the one entry of largest
    magnitude, for p = ∞ the signs. Radius from an L2 diameter: ``r = (D/2)·n^{1/p − 1/2}``, with 1/p taken as 1/2 for
    p = 1 and 0 for p = ∞ (the published rule; for 1 < p < 2 it gives more than half the diameter).

    Args:
        p: at least 1; ``math.inf`` or ``"inf"`` for the maximum norm.
        radius, diameter, tau: exactly one of the three, see :class:`~sfw_dist.constraints.base.SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> LpBall(2, radius=5.0).lmo(torch.tensor([3.0, -4.0]))
        tensor([-3.,  4.])
    """

    kind = "lp"
    divisible: ClassVar[bool] = True

    def __init__(self, p: float | str, **size: float | None) -> None:
        super().__init__(**size)
        self.p = float(p)
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1, got {p}: below 1 the set is not convex")
        self.signs_only = self.p in (1.0, math.inf)

    def support(self, n: int) -> int:
        return 1 if self.p == 1 else n

    def work(self, shape: torch.Size) -> float:
        return super().work(shape) if self.p == 1 else 0.0

    def lmo_vertex(self, x: Tensor) -> Vertex:
        radius, flat = self.radius(x.numel()), x.reshape(-1)
        if self.p == 1:
            indices = select(x, 1)
            return Vertex(indices, signed(flat[indices], radius))
        if self.p == math.inf:
            return Vertex(None, signed(flat, radius))
        direction = self.direction(flat, flat.abs().max())
        return Vertex(None, scaled_to(direction, self.norm(tree_sum(row_sums(self.terms, direction))), radius))

    def sharded_lmo(self, direction: ShardedDirection) -> AsyncTask:
        """In 3 messages for p = 1 (a selection), none for p = ∞, one for p = 2 and two for all others."""
        x, partition, device = direction.entries, direction.partition, direction.device
        radius = self.radius(partition.numel)
        if self.p == math.inf:
            return None if x is None else Vertex(None, signed(x, radius))
        if self.p == 1:
            (selected,) = yield from select_sharded([1], [partition], [x], direction.dtype, device)
            return None if x is None or selected is None else selected_vertex(selected, signed(x, radius))
        largest = torch.zeros((), device=device)
        if self.p != 2:
            by_part = torch.zeros(len(partition.parts), dtype=torch.float64, device=device)
            if x is not None and partition.is_primary:
                by_part[partition.own] = x.abs().max()
            largest = as_numbers((yield as_words(by_part))).max().to(direction.dtype)
        unscaled = None if x is None else self.direction(x, largest)
        share = torch.zeros(slots(partition), dtype=torch.float64, device=device)
        if unscaled is not None:
            share = partial_sums(partition, [self.terms], unscaled)[0]
        norm = self.norm(tree_sum(as_numbers((yield as_words(share)))))
        return None if unscaled is None else Vertex(None, scaled_to(unscaled, norm, radius))

    def direction(self, x: Tensor, largest: Tensor) -> Tensor:
        """``sign(x_i)·|x_i|^{q−1}``, the vertex up to sign and length; ``largest`` is ``‖x‖_∞``."""
        if self.p == 2:
            return x
        # |x|^{q−1} overflows or vanishes unless x is scaled first; its scale cancels.
        magnitude = x.abs() / largest.clamp(min=torch.finfo(x.dtype).tiny)
        return magnitude.pow(self.p / (self.p - 1) - 1) * x.sign()

    def terms(self, x: Tensor) -> Tensor:
        """``|x_i|^p`` in float64; :meth:`norm` turns their sum into ``‖x‖_p``. For 1 < p < ∞."""
        return x.double().square() if self.p == 2 else x.abs().double().pow(self.p)

    def norm(self, total: Tensor) -> Tensor:
        """``‖x‖_p`` from the sum of :meth:`terms`."""
        return square_root(total) if self.p == 2 else total ** (1 / self.p)

    def gauge(self, x: Tensor) -> Tensor:
        match self.p:
            case 1.0:
                norm = absolute_sum(x)
            case 2.0:
                norm = squared_norm(x).sqrt()
            case _:
                norm = torch.linalg.vector_norm(x.double(), ord=self.p)
        return norm / self.radius(x.numel())

    def project(self, x: Tensor) -> Tensor:
        """Euclidean projection for p in {1, 2, ∞}; p = 1 by Duchi et al., ICML 2008, figure 1."""
        radius = self.radius(x.numel())
        match self.p:
            case math.inf:
                return x.clamp(-radius, radius)
            case 2.0:
                return (x.double() / self.gauge(x).clamp(min=1)).to(x.dtype)
            case 1.0:
                magnitude = x.double().abs()
                z = magnitude.reshape(-1).sort(descending=True).values
                excess = (z.cumsum(0) - radius) / torch.arange(1, z.numel() + 1, device=x.device)
                # At least one entry stays, even where rounding swallows the radius: 1e30 − 1 = 1e30.
                threshold = excess[(z > excess).sum().clamp(min=1) - 1].clamp(min=0)
                return x.sign() * (magnitude - threshold).clamp(min=0).to(x.dtype)
            case _:
                return super().project(x)

    def diameter(self, n: int) -> float:
        return 2 * self.radius(n) * n ** max(0.0, 0.5 - 1 / self.p)

    def radius_for(self, diameter: float, n: int) -> float:
        inverse = {1.0: 0.5, math.inf: 0.0}.get(self.p, 1 / self.p)
        return diameter / 2 * n ** (inverse - 0.5)

    def with_radius(self, radius: float, n: int) -> Constraint:
        return LpBall(self.p, radius=radius)

    def shape_arguments(self) -> dict[str, Any]:
        return {"p": self.p if self.p < math.inf else "inf"}  # JSON has no infinity
