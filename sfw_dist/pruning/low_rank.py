"""Low-rank pruning: each weight as a product of two thin matrices, the ranks shared out by energy.

A weight W, seen as the matrix of its first dimension (``out``) by all others (``rest``), becomes the product of
``out × q`` and ``q × rest``: its q leading singular triplets, the nearest matrix of that rank. A convolution is then
one with q filters and a 1×1 one after it. That takes ``q·(out + rest)`` parameters, and FLOPs in the same proportion;
where it would be no fewer than ``out·rest`` the weight stays as it is.

Which triplets stay is decided over all layers together: those of most energy (σ²) for each parameter that they take.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Choice:
    """One step up in rank of one layer."""

    name: str
    rank: int
    cost: int
    """Parameters that it adds."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is left of each weight at one sparsity. The tensors are shared with `Factors`."""

    factors: Factors
    ranks: Mapping[str, int]
    """By weight; its full rank where it stays as it is."""
    counts: Mapping[str, tuple[int, int]]
    """Parameters before, and after: of the two factors, or of the weight itself."""

    @property
    def kept(self) -> int:
        """Parameters after, over all prunable ones."""
        return sum(kept for _, kept in self.counts.values())

    @property
    def total(self) -> int:
        """Entries of all prunable parameters."""
        return sum(entries for entries, _ in self.counts.values())

    @property
    def sparsity(self) -> float:
        """The fraction of prunable parameters that is saved."""
        return (self.total - self.kept) / self.total

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parameters that are no matrix, and stay."""
        return tuple(name for name in self.counts if name not in self.ranks)

    def weights(self) -> dict[str, Tensor]:
        """The weights of reduced rank by name, as dense tensors, in their own shape and type; computed anew."""
        return {name: self.factors.product(name, rank) for name, rank in self.ranks.items() if self._reduced(name)}

    def pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The factors of a weight, ``(out, rank)`` and ``(rank, rest)``; ``None`` where it stays as it is."""
        return self.factors.pair(name, self.ranks[name]) if name in self.ranks and self._reduced(name) else None

    def _reduced(self, name: str) -> bool:
        entries, kept = self.counts[name]
        return kept < entries


class Factors:
    """The singular value decompositions of some weights, from which a `LowRank` of any sparsity is taken.

    Args:
        parameters: all prunable ones, finite, by name.
        whole: names of those that stay as they are, besides those of one dimension.
    """

    def __init__(self, parameters: Mapping[str, Tensor], whole: Collection[str] = ()) -> None:
        self._parameters = dict(parameters)
        self._triplets: dict[str, tuple[Tensor, Tensor]] = {}
        order: list[tuple[float, _Choice]] = []
        for name, parameter in self._parameters.items():
            if name in whole or parameter.ndim < 2:
                continue
            # In float64: near ties in energy must not go one way here and another on other hardware.
            u, s, vh = torch.linalg.svd(parameter.double().flatten(1), full_matrices=False)
            self._triplets[name] = (u * s).to(parameter.dtype), vh.to(parameter.dtype)
            order += _choices(name, u.shape[0], vh.shape[1], s.square().tolist())
        # Stable: of equal ones the first layer's, and of one layer the lower rank, come first.
        self._order = [choice for _, choice in sorted(order, key=lambda item: -item[0])]
        self._used = list(accumulate(choice.cost for choice in self._order))
        self.entries = sum(p.numel() for p in self._parameters.values())
        """Of all prunable parameters."""

    def truncated(self, removed: int) -> LowRank:
        """The most triplets, in their order, that save at least ``removed`` parameters; of each weight one at least.

        So ranks at a higher sparsity are never higher. A sparsity beyond rank 1 everywhere is not reached.
        """
        whole = sum(p.numel() for name, p in self._parameters.items() if name not in self._triplets)
        left = self.entries - removed - whole
        count = max(sum(used <= left for used in self._used), len(self._triplets))
        ranks: dict[str, int] = {}
        costs = dict.fromkeys(self._parameters, 0)
        for choice in self._order[:count]:
            ranks[choice.name] = choice.rank
            costs[choice.name] += choice.cost
        counts = {
            name: (p.numel(), costs[name] if name in self._triplets else p.numel())
            for name, p in self._parameters.items()
        }
        return LowRank(self, {name: ranks[name] for name in self._triplets}, counts)

    def pair(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """``(out, rank)`` and ``(rank, rest)`` in the weight's type; their product is the nearest of that rank."""
        left, right = self._triplets[name]
        return left[:, :rank], right[:rank]

    def product(self, name: str, rank: int) -> Tensor:
        """The nearest weight of that rank."""
        left, right = self.pair(name, rank)
        return (left @ right).view(self._parameters[name].shape)


def _choices(name: str, out: int, rest: int, energies: list[float]) -> list[tuple[float, _Choice]]:
    """The steps from rank 1 up, each with its energy a parameter, not rising; the last leaves the weight as it is."""
    each, dense, full = out + rest, out * rest, min(out, rest)
    last = min(-(-dense // each), full)  # from this rank on factors save nothing
    found: list[tuple[float, _Choice]] = []
    worth = math.inf  # rank 0 would cut the network in two
    for rank in range(1, last + 1):
        if rank < last:
            cost, energy = each, energies[rank - 1]
        else:
            cost, energy = dense - (last - 1) * each, sum(energies[last - 1 :])
        if rank > 1:
            worth = min(worth, energy / cost)
        found.append((worth, _Choice(name, rank if rank < last else full, cost)))
    return found
