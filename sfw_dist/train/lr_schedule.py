"""The learning rate over the epochs."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from sfw_dist.config import ScheduleConfig

_SHORT, _LONG = 5, 10
_DECREASE, _INCREASE = 0.7, 1.06


class DynamicRate:
    """The paper's dynamic rule, on top of any scheduler (Pokutta et al., arXiv 2010.07243, section 4).

    After each epoch with at least 10 behind it: ×0.7 when the mean training loss of the last 5 epochs is greater than
    that of the last 10, ×1.06 when it is smaller; the newest epoch counts. Steps on a loss, like ``ReduceLROnPlateau``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._losses: list[float] = []

    def step(self, loss: float) -> None:
        """``loss``: the epoch's training loss, the mean over all its batches and ranks."""
        self._losses = [*self._losses, loss][-_LONG:]
        if len(self._losses) < _LONG:
            return
        # The last 5 exceed the last 10 on average just when they exceed the 5 before; so equal losses compare equal.
        before, last = math.fsum(self._losses[:-_SHORT]), math.fsum(self._losses[-_SHORT:])
        factor = _DECREASE if last > before else _INCREASE if last < before else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = list(state_dict["losses"])


class LRSchedule:
    """A run's learning rate: a torch scheduler, and the dynamic rule on top if ``config.dynamic``."""

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, epochs: int) -> None:
        self._base = _base(optimizer, config, epochs)
        self._dynamic = DynamicRate(optimizer) if config.dynamic else None

    def step(self, loss: float) -> None:
        """Set the next epoch's rate; ``loss`` as in :meth:`DynamicRate.step`."""
        self._base.step()
        if self._dynamic:
            self._dynamic.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, which JSON can hold."""
        base = {key: dict(value) if key == "milestones" else value for key, value in self._base.state_dict().items()}
        return {"base": base, "dynamic": self._dynamic.state_dict() if self._dynamic else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Milestones come from the configuration, which a resumed run shares; JSON would make strings of their keys.
        self._base.load_state_dict({k: v for k, v in state_dict["base"].items() if k != "milestones"})
        if self._dynamic:
            self._dynamic.load_state_dict(state_dict["dynamic"])


def _base(optimizer: Optimizer, config: ScheduleConfig, epochs: int) -> LRScheduler:
    match config.kind:
        case "steps":
            # At least 1: torch would apply a milestone at 0 before the first epoch.
            return MultiStepLR(optimizer, [max(1, round(m * epochs)) for m in config.milestones], config.gamma)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=epochs)
        case "constant":
            return ConstantLR(optimizer, factor=1.0)
