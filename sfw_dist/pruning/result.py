"""What a pruning leaves of each parameter: the interface that masks and low-rank factors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Pruning(ABC):
    """What is left of each prunable parameter at one sparsity."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, tuple[int, int]]:
        """For each prunable parameter its number of entries, and how many numbers are left of it."""

    @property
    @abstractmethod
    def ranks(self) -> Mapping[str, int]:
        """The rank of each weight that is described by one; empty for masks."""

    @property
    @abstractmethod
    def skipped(self) -> tuple[str, ...]:
        """The prunable parameters that the granularity does not fit; they stay whole."""

    @abstractmethod
    def changed(self) -> Iterable[str]:
        """The names of the parameters that change."""

    @abstractmethod
    def pruned(self, name: str, parameter: Tensor) -> Tensor:
        """A changed parameter after pruning, as a new tensor."""

    @property
    def kept(self) -> int:
        """How many numbers are left, over all prunable parameters."""
        return sum(kept for _, kept in self.counts.values())

    @property
    def total(self) -> int:
        """The number of entries of all prunable parameters."""
        return sum(entries for entries, _ in self.counts.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable entries that is removed."""
        return (self.total - self.kept) / self.total

    def pruned_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of ``model`` that change, by name, as new tensors; ``model`` itself does not change."""
        parameters = dict(model.named_parameters())
        return {name: self.pruned(name, parameters[name].detach()) for name in self.changed()}

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Write the pruned parameters into ``model``."""
        parameters = dict(model.named_parameters())
        for name in self.changed():
            parameters[name].copy_(self.pruned(name, parameters[name]))
