"""The sets whose vertices have K nonzeros: the paper's polytope and the k-support ball."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sfw_dist.constraints.base import ShardedDirection, TopKConstraint, Vertex, scaled_to, selected_vertex, signed
from sfw_dist.distributed.coalesced import AsyncTask, as_numbers, as_words
from sfw_dist.ops.pairwise_sum import absolute_sum, square_root, squared_norm, tree_sum
from sfw_dist.ops.sharded_sum import partial_sums, slots
from sfw_dist.ops.topk import select
from sfw_dist.ops.topk.sharded import select_sharded


class KSparsePolytope(TopKConstraint):
    """``C(K, r) = conv{v : at most K nonzeros, each ±r} = {θ : ‖θ‖∞ ≤ r and ‖θ‖₁ ≤ K·r}`` (Lu et al., section 3).

    LMO: ``−r·sign(x_i)`` on the K entries of largest ``|x_i|`` (ties: the lowest flat index; zeros stay 0).
    L2 diameter ``2·r·√K``.

    Args:
        k, k_frac, k_min: K, or ``K = min(max(k_min, ⌊k_frac·n⌋), n)``; the paper has ``k_frac=0.05, k_min=10``.
        radius, diameter, tau: exactly one of the three, see :class:`~sfw_dist.constraints.base.SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> KSparsePolytope(k=2, radius=0.5).lmo(torch.tensor([0.1, -3.0, 2.0]))
        tensor([ 0.0000,  0.5000, -0.5000])
    """

    kind = "k_sparse"
    signs_only = True
    selects: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices = select(x, self.support(x.numel()))
        return Vertex(indices, signed(x.reshape(-1)[indices], self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        n = x.numel()
        largest = x.abs().max().double()
        return torch.maximum(largest, absolute_sum(x) / self.support(n)) / self.radius(n)

    @classmethod
    def sharded_lmos(cls, directions: Sequence[ShardedDirection]) -> AsyncTask:
        """All selections together, in 3 messages (float64: 6)."""
        selected = yield from _select(directions)
        return [
            None if d.entries is None or chosen is None else selected_vertex(chosen, signed(d.entries, _radius(d)))
            for d, chosen in zip(directions, selected, strict=True)
        ]

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / (2 * math.sqrt(self.support(n)))


class KSupportBall(TopKConstraint):
    """``conv{v : ‖v‖₀ ≤ K, ‖v‖₂ ≤ r}`` (Argyriou, Foygel, Srebro, 2012; SFW: arXiv 2205.11921).

    LMO: the K entries of largest ``|x_i|``, scaled to norm r, with the opposite sign. L2 diameter ``2·r``.

    Args:
        k, k_frac, k_min, radius, diameter, tau: as for :class:`KSparsePolytope`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> KSupportBall(k=2, radius=5.0).lmo(torch.tensor([0.1, -3.0, 4.0]))
        tensor([ 0.,  3., -4.])
    """

    kind = "k_support"
    selects: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices, flat = select(x, self.support(x.numel())), x.reshape(-1)
        kept = torch.zeros_like(flat).index_copy_(0, indices, flat[indices])
        norm = square_root(squared_norm(kept))  # with zeros for the other entries: over shards it is the same sum
        return Vertex(indices, scaled_to(flat[indices], norm, self.radius(x.numel())))

    @classmethod
    def sharded_lmos(cls, directions: Sequence[ShardedDirection]) -> AsyncTask:
        """All selections together, in 3 messages (float64: 6), and the norms of what they keep in one more."""
        selected = yield from _select(directions)
        kept = [
            None if d.entries is None or chosen is None else torch.where(chosen, d.entries, 0.0)
            for d, chosen in zip(directions, selected, strict=True)
        ]
        device = directions[0].device
        shares = [
            torch.zeros(slots(d.partition), dtype=torch.float64, device=device)
            if x is None
            else partial_sums(d.partition, [_square], x)[0]
            for d, x in zip(directions, kept, strict=True)
        ]
        total = as_numbers((yield as_words(torch.cat(shares))))
        squares = [tree_sum(part) for part in total.split([share.numel() for share in shares])]
        return [
            None
            if x is None or chosen is None
            else selected_vertex(chosen, scaled_to(x, square_root(square), _radius(d)))
            for d, x, chosen, square in zip(directions, kept, selected, squares, strict=True)
        ]

    def gauge(self, x: Tensor) -> Tensor:
        """The k-support norm over r."""
        n = x.numel()
        return k_support_norm(x.detach().double().abs().reshape(-1), self.support(n)) / self.radius(n)

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2


def _select(directions: Sequence[ShardedDirection]) -> AsyncTask:
    """Which of this rank's entries each tensor's vertex keeps."""
    return select_sharded(
        [d.constraint.support(d.partition.numel) for d in directions],
        [d.partition for d in directions],
        [d.entries for d in directions],
        directions[0].dtype,
        directions[0].device,
    )


def _radius(direction: ShardedDirection) -> float:
    return direction.constraint.radius(direction.partition.numel)


def _square(x: Tensor) -> Tensor:
    return x.double().square()


def k_support_norm(x: Tensor, k: int) -> Tensor:
    """Of magnitudes, float64 ``(n,)``, 1 ≤ k ≤ n (Argyriou, Foygel, Srebro, 2012, proposition 2.1).

    With ``z`` the magnitudes in descending order and ``T_l = Σ_{i≥K−l} z_i``, take the smallest ``l`` with
    ``z_{K−l−1} > T_l/(l+1)``; then ``‖x‖² = Σ_{i<K−l} z_i² + T_l²/(l+1)``.
    """
    z = x.sort(descending=True).values
    from_one = torch.arange(1, k + 1, device=x.device, dtype=torch.float64)  # l + 1
    tails = z[:k].flip(0).cumsum(0) + z[k:].sum()  # T_l for l = 0 … K−1
    before = torch.cat([z.new_full((1,), math.inf), z[: k - 1]]).flip(0)  # z_{K−l−1}, with z_0 = ∞
    level = (before > tails / from_one).to(torch.int8).argmax()
    head = torch.cat([z.new_zeros(1), z[: k - 1].square().cumsum(0)]).flip(0)[level]
    return (head + tails[level].square() / from_one[level]).sqrt()
