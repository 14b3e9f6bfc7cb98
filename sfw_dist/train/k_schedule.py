"""K over the epochs."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from sfw_dist.config import KScheduleConfig, OptimizerConfig
from sfw_dist.optim.param_groups import make_feasible


def k_frac(config: KScheduleConfig, final: float, epoch: int, epochs: int) -> float:
    """Return K of an epoch, as a fraction of a tensor's entries.

    With ``t = min(1, epoch/last)``, from ``s = config.start`` to ``f = final``: linear ``s + (f − s)·t``, geometric
    ``s^(1−t)·f^t``, cosine ``f + (s − f)·(1 + cos πt)/2``.

    Args:
        config: the rule, its first value, and the fraction of the epochs after which ``final`` is reached.
        final: the fraction at the end, ``optimizer.constraint.k_frac``.
        epoch: counted from 0.
        epochs: of the whole training.

    Example:
        >>> config = KScheduleConfig(kind="linear", start=0.5, end=0.5)
        >>> [k_frac(config, 0.1, epoch, epochs=4) for epoch in range(4)]
        [0.5, 0.3, 0.1, 0.1]
    """
    last = max(1, min(round(config.end * epochs), epochs - 1))
    t = min(1.0, epoch / last)
    if config.kind == "none" or t == 1:
        return final
    match config.kind:
        case "linear":
            return config.start + (final - config.start) * t
        case "geometric":
            return math.exp(math.log(config.start) * (1 - t) + math.log(final) * t)
        case "cosine":
            return final + (config.start - final) * (1 + math.cos(math.pi * t)) / 2


class KSchedule:
    """K over the epochs: gives the param groups other sets at the beginning of an epoch. Momentum is kept.

    Each set keeps its L2 diameter D, so the radius follows: ``r = D/(2·√K)`` for the K-sparse polytope. Polytopes of
    one diameter are not nested (a larger K lowers the bound on ‖θ‖∞ and raises that on ‖θ‖₁), so a tensor outside its
    new set is divided by its gauge, at most ``√(K₂/K₁)`` or its inverse. k-support balls of one diameter grow with K.
    The sets follow from the epoch, so a checkpoint need not hold them.

    Args:
        optimizer: with one set in each param group, that of any epoch.
        config: the schedule, and the K that it ends with.
        epochs: of the whole training.
    """

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig, epochs: int) -> None:
        self._optimizer, self._config, self._epochs = optimizer, config, epochs
        self._diameters = [
            group["constraint"].diameter(group["params"][0].numel()) if _has_k(group) else None
            for group in (optimizer.param_groups if self.changes else ())  # DeepSpeed's have several sets each
        ]

    @property
    def changes(self) -> bool:
        """Whether K changes over the epochs."""
        return self._config.k_schedule.kind != "none"

    def k_frac(self, epoch: int) -> float:
        """Return K of an epoch, counted from 0, as a fraction of a tensor's entries."""
        return k_frac(self._config.k_schedule, self._config.constraint.k_frac, epoch, self._epochs)

    def begin_epoch(self, epoch: int) -> None:
        """Set the param groups' sets to those of an epoch; does nothing where they are so already.

        Collective if parameters are DTensors.
        """
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
