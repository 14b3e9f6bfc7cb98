"""The sets whose vertices have K nonzeros: the paper's polytope and the k-support ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfw_dist.constraints.base import Vertex, _TopK, scaled_to, signed
from sfw_dist.ops.pairwise_sum import absolute_sum, square_root
from sfw_dist.ops.topk import select
from sfw_dist.ops.topk.norm import squared_norm_of_kept


class KSparsePolytope(_TopK):
    """``C(K, r) = conv{v : at most K nonzeros, each ±r} = {θ : ‖θ‖∞ ≤ r and ‖θ‖₁ ≤ K·r}`` (Lu et al., section 3).

    LMO: ``−r·sign(x_i)`` on the K entries of largest ``|x_i|`` (ties: the lowest flat index; zeros stay 0).
    L2 diameter ``2·r·√K``.
    """

    kind = "k_sparse"
    signs_only = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices = select(x, self.support(x.numel()))
        return Vertex(indices, signed(x.reshape(-1)[indices], self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        n = x.numel()
        largest = x.abs().max().double()
        return torch.maximum(largest, absolute_sum(x) / self.support(n)) / self.radius(n)

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / (2 * math.sqrt(self.support(n)))


class KSupportBall(_TopK):
    """``conv{v : ‖v‖₀ ≤ K, ‖v‖₂ ≤ r}`` (Argyriou, Foygel, Srebro, 2012; SFW: arXiv 2205.11921).

    LMO: the K entries of largest ``|x_i|``, scaled to norm r, with the sign turned. L2 diameter ``2·r``.
    """

    kind = "k_support"

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices, flat = select(x, self.support(x.numel())), x.reshape(-1)
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        norm = square_root(squared_norm_of_kept(wide, indices))
        return Vertex(indices, scaled_to(flat[indices], norm, self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        """The k-support norm over r."""
        n = x.numel()
        return k_support_norm(x.detach().double().abs().reshape(-1), self.support(n)) / self.radius(n)

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2


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
