"""Low-rank pruning: each weight becomes a product of two thin matrices, the ranks shared out by energy.

A weight W, seen as the matrix of its first dimension (``out``) by all others (``rest``), becomes the product of an
``out × q`` and a ``q × rest`` matrix: its q leading singular triplets, the nearest matrix of that rank. (A convolution
then is one with q filters, followed by a 1×1 convolution.) That takes ``q·(out + rest)`` parameters, and FLOPs in the
same proportion; where this would be no fewer than ``out·rest`` the weight stays as it is.

Which triplets stay is decided over all layers together: those with the most energy (σ²) for each parameter they take.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.distributed.dtensor import MeshRanks, entries_as, full_tensor, wrapped_as
from sfw_dist.pruning.result import Pruning


@dataclass(frozen=True)
class _RankStep:
    """The step of one layer to ``rank``, from the rank below."""

    name: str
    rank: int
    cost: int
    """The parameters that it adds."""


class LowRank(Pruning):
    """What is left of each weight at one sparsity; made by `Factors`, with which it shares the tensors.

    Example:
        >>> weight = torch.eye(4)
        >>> found = Factors({"weight": weight}).at(8)  # remove 8 of 16 parameters
        >>> found.ranks, found.kept
        ({'weight': 1}, 8)
        >>> left, right = found.pair("weight")
        >>> left.shape, right.shape
        (torch.Size([4, 1]), torch.Size([1, 4]))
    """

    def __init__(self, factors: Factors, ranks: Mapping[str, int], counts: Mapping[str, tuple[int, int]]) -> None:
        self._factors, self._ranks, self._counts = factors, ranks, counts

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each weight; its full rank where it stays as it is."""
        return self._ranks

    @property
    def counts(self) -> Mapping[str, tuple[int, int]]:
        """For each parameter its number of entries, and how many numbers are left: of two factors, or of the weight."""
        return self._counts

    @property
    def skipped(self) -> tuple[str, ...]:
        """The parameters that are no single matrix; they stay as they are."""
        return tuple(name for name in self.counts if name not in self.ranks)

    def changed(self) -> Iterable[str]:
        """The weights of reduced rank."""
        return [name for name in self.ranks if self._reduced(name)]

    def shape(self, name: str) -> torch.Size:
        """Of a prunable parameter."""
        return self._factors.shape(name)

    def pruned(self, name: str, parameter: Tensor) -> Tensor:
        """The product of the two factors, in the weight's shape and type; it lies as ``parameter`` does."""
        return wrapped_as(entries_as(self._factors.product(name, self.ranks[name]), parameter).clone(), parameter)

    def pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The factors of a weight, ``(out, rank)`` and ``(rank, rest)``; ``None`` where it stays as it is."""
        return self._factors.pair(name, self.ranks[name]) if name in self.ranks and self._reduced(name) else None

    def _reduced(self, name: str) -> bool:
        entries, kept = self.counts[name]
        return kept < entries


class Factors:
    """The singular value decompositions of weights; from them a `LowRank` of any sparsity is cut.

    Args:
        parameters: all prunable parameters by name, finite. DTensors are gathered one at a time, which is collective,
            and every rank decomposes them and keeps all factors: together about as large as the whole model.
        unfactored: names of those that stay as they are, in addition to those of one dimension.
    """

    def __init__(self, parameters: Mapping[str, Tensor], unfactored: Collection[str] = ()) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._triplets: dict[str, tuple[Tensor, Tensor]] = {}
        order: list[tuple[float, _RankStep]] = []
        for name, parameter in self._parameters.items():
            if name in unfactored or parameter.ndim < 2:
                continue
            # In float64: near ties in energy must not be decided differently on other hardware.
            u, s, vh = torch.linalg.svd(full_tensor(parameter).double().flatten(1), full_matrices=False)
            _agree(s, parameter)
            self._triplets[name] = (u * s).to(parameter.dtype), vh.to(parameter.dtype)
            order += _rank_steps(name, u.shape[0], vh.shape[1], s.square().tolist())
        # The sort is stable: of equal ones the first layer's, and in a layer the lower rank, come first.
        self._order = [step for _, step in sorted(order, key=lambda item: -item[0])]
        self._used = list(accumulate(step.cost for step in self._order))
        self.entries = sum(p.numel() for p in self._parameters.values())
        """The number of entries of all prunable parameters."""

    def at(self, removed: int) -> LowRank:
        """Keep as many triplets, in their order, as leave at least ``removed`` parameters out; of each weight one.

        So ranks at a higher sparsity are never higher. A sparsity beyond rank 1 everywhere is not reached.
        """
        unfactored = sum(p.numel() for name, p in self._parameters.items() if name not in self._triplets)
        left = self.entries - removed - unfactored
        count = max(sum(used <= left for used in self._used), len(self._triplets))
        ranks: dict[str, int] = {}
        costs = dict.fromkeys(self._parameters, 0)
        for step in self._order[:count]:
            ranks[step.name] = step.rank
            costs[step.name] += step.cost
        counts = {
            name: (p.numel(), costs[name] if name in self._triplets else p.numel())
            for name, p in self._parameters.items()
        }
        return LowRank(self, {name: ranks[name] for name in self._triplets}, counts)

    def shape(self, name: str) -> torch.Size:
        """Of a prunable parameter."""
        return self._parameters[name].shape

    def pair(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """``(out, rank)`` and ``(rank, rest)`` in the weight's type; their product is the nearest of that rank."""
        left, right = self._triplets[name]
        return left[:, :rank], right[:rank]

    def product(self, name: str, rank: int) -> Tensor:
        """The nearest weight of that rank, in the weight's shape and type."""
        left, right = self.pair(name, rank)
        return (left @ right).view(self._parameters[name].shape)


def _agree(singular_values: Tensor, parameter: Tensor) -> None:
    """Give all ranks of a DTensor's mesh the first one's, in place: other hardware may round otherwise."""
    if isinstance(parameter, DTensor):
        ranks = MeshRanks(parameter.device_mesh, range(parameter.device_mesh.ndim))
        if ranks.rank:
            singular_values.zero_()
        ranks.all_reduce(singular_values)


def _rank_steps(name: str, out: int, rest: int, energies: list[float]) -> list[tuple[float, _RankStep]]:
    """The steps from rank 1 up, each with its energy per parameter, not rising; the last leaves the weight as it is."""
    each, dense, full = out + rest, out * rest, min(out, rest)
    last = min(-(-dense // each), full)  # from this rank on factors save nothing
    steps: list[tuple[float, _RankStep]] = []
    value = math.inf  # rank 0 would cut the network in two
    for rank in range(1, last + 1):
        if rank < last:
            cost, energy = each, energies[rank - 1]
        else:
            cost, energy = dense - (last - 1) * each, sum(energies[last - 1 :])
        if rank > 1:
            value = min(value, energy / cost)
        steps.append((value, _RankStep(name, rank if rank < last else full, cost)))
    return steps
