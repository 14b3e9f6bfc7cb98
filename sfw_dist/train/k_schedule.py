"""K over the epochs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sfw_dist.config import OptimizerConfig
from sfw_dist.optim.param_groups import make_feasible


class KSchedule:
    """K over the epochs, by giving the param groups other sets. Momentum stays; see ``config.methods`` for the rule.

    Each set keeps its L2 diameter D, so the radius follows: ``r = D/(2·√K)`` for the K-sparse polytope. Polytopes of
    one diameter are not nested (a larger K lowers the bound on ‖θ‖∞ and raises that on ‖θ‖₁), so at a change whatever
    lies outside its new set is divided by its gauge, at most ``√(K₂/K₁)`` or its inverse. k-support balls of one
    diameter grow with K. Where each set stands follows from the epoch alone, so there is nothing to save.
    """

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig, epochs: int) -> None:
        """``optimizer`` has the sets of any epoch, one a group."""
        self._optimizer, self._config, self._epochs = optimizer, config, epochs
        self._diameters = [
            group["constraint"].diameter(group["params"][0].numel()) if _has_k(group) else None
            for group in optimizer.param_groups
        ]

    @property
    def changes(self) -> bool:
        """Whether there is a schedule at all."""
        return self._config.k_schedule.kind != "none"

    def k_frac(self, epoch: int) -> float:
        """K as a fraction of the entries in an epoch, counted from 0."""
        return self._config.k_schedule.k_frac(self._config.constraint.k_frac, epoch, self._epochs)

    def begin_epoch(self, epoch: int) -> None:
        """Have the sets of this epoch; where they are there already, nothing happens. Of DTensors collective."""
        if not self.changes:
            return
        for group, diameter in zip(self._optimizer.param_groups, self._diameters, strict=True):
            if diameter is None:
                continue
            n, old = group["params"][0].numel(), group["constraint"]
            kind, least = type(old), self._config.constraint.k_min
            k = kind(k_frac=self.k_frac(epoch), k_min=least, diameter=diameter).support(n)
            if k != old.support(n):
                group["constraint"] = kind(k=k, diameter=diameter)
                make_feasible(group)


def _has_k(group: dict[str, Any]) -> bool:
    return "constraint" in group and group["constraint"].selects
