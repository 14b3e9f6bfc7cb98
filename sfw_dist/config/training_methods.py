"""The fields of what may go on beside plain steps: SFW-Init before them, K over the training, pruning between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from sfw_dist.config.check import require


@dataclass
class InitConfig:
    """SFW-Init: a scale for each tensor, learned before a fresh run's first step (docs/algorithm.md)."""

    steps: int = 0
    """Iterations, of one and a half batches each; the paper has 390, 0 leaves it out."""
    kappa: float = 0.001
    """Step size of the scales."""
    floor: float = 0.01
    """Least scale of a weight, in [0, 1); a bias's is 0."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "init.steps", self.steps, "at least 0", "write 390, or 0 for none")
        require(0 < self.kappa < math.inf, "init.kappa", self.kappa, "> 0", "write 0.001")
        require(0 <= self.floor < 1, "init.floor", self.floor, "in [0, 1)", "write 0.01")


@dataclass
class KScheduleConfig:
    """K over the training, from ``start`` to ``optimizer.constraint.k_frac``; each set keeps its L2 diameter."""

    kind: Literal["none", "linear", "geometric", "cosine"] = "none"
    """none: K stays; linear, geometric, cosine: the way it takes."""
    start: float = 0.2
    """k_frac of the first epoch, in (0, 1]; above optimizer.constraint.k_frac from dense to sparse, below it back."""
    end: float = 0.5
    """Fraction of the epochs, in (0, 1], after which optimizer.constraint.k_frac is reached, by the last at latest."""

    def __post_init__(self) -> None:
        require(0 < self.start <= 1, "optimizer.k_schedule.start", self.start, "in (0, 1]", "write 0.2 for 20 %")
        require(0 < self.end <= 1, "optimizer.k_schedule.end", self.end, "in (0, 1]", "write 0.5 for half the epochs")

    def k_frac(self, final: float, epoch: int, epochs: int) -> float:
        """The fraction that the given epoch, counted from 0, trains with."""
        last = max(1, min(round(self.end * epochs), epochs - 1))
        t = min(1.0, epoch / last)
        if self.kind == "none" or t == 1:
            return final
        match self.kind:
            case "linear":
                return self.start + (final - self.start) * t
            case "geometric":
                return math.exp(math.log(self.start) * (1 - t) + math.log(final) * t)
            case _:
                return final + (self.start - final) * (1 + math.cos(math.pi * t)) / 2


@dataclass
class GradualConfig:
    """Gradual magnitude pruning (method: gradual)."""

    sparsity: float = 0.9
    """Fraction of the convolutions' and linear layers' weights removed in the end, in (0, 1)."""
    initial: float = 0.0
    """Fraction removed at the beginning, from 0 to below sparsity."""
    begin: float = 0.1
    """Fraction of the training after which pruning begins, in [0, 1)."""
    end: float = 0.7
    """Fraction of the training after which sparsity is reached, above begin; the rest trains what is kept."""
    every: int = 100
    """Steps between two prunings."""
    kind: Literal["global", "layerwise"] = "global"
    """Where magnitudes compete: over the network, or within a tensor."""

    def __post_init__(self) -> None:
        require(0 < self.sparsity < 1, "gradual.sparsity", self.sparsity, "in (0, 1)", "write 0.9 to remove 90 %")
        domain = f"from 0 to below gradual.sparsity {self.sparsity}"
        require(0 <= self.initial < self.sparsity, "gradual.initial", self.initial, domain, "write 0")
        require(0 <= self.begin < 1, "gradual.begin", self.begin, "in [0, 1)", "write 0.1")
        domain = f"above gradual.begin {self.begin} and at most 1"
        require(self.begin < self.end <= 1, "gradual.end", self.end, domain, "write 0.7, and gradual.begin 0.1")
        require(self.every > 0, "gradual.every", self.every, "at least 1", "write 100")

    def target(self, step: int, steps: int) -> float:
        """The sparsity wanted after ``step`` of ``steps``: ``s_f + (s_i − s_f)·(1 − t)³``, 0 before the beginning."""
        if step < self.begin * steps:
            return 0.0
        t = min(1.0, (step - self.begin * steps) / ((self.end - self.begin) * steps))
        return self.sparsity + (self.initial - self.sparsity) * (1 - t) ** 3


@dataclass
class CramConfig:
    """Compression-aware steps (method: cram)."""

    rho: float = 0.05
    """ρ ≥ 0: how far along the gradient the point lies whose compressed form must be good."""
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])
    """Fractions removed there, in (0, 1); each step draws one."""
    dense: bool = True
    """Add the gradient of the dense network (CrAM⁺)."""

    def __post_init__(self) -> None:
        require(0 <= self.rho < math.inf, "cram.rho", self.rho, "at least 0", "write 0.05")
        require(len(self.sparsities) > 0, "cram.sparsities", self.sparsities, "at least one", "write [0.5, 0.7, 0.9]")
        for sparsity in self.sparsities:
            require(0 < sparsity < 1, "cram.sparsities", sparsity, "in (0, 1)", "write 0.9 to remove 90 %")


@dataclass
class SampledConfig:
    """Steps at sampled sparsities (method: sampled)."""

    sparsities: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
    """Fractions removed, in [0, 1), 0 among them; each step draws one, and one that is named twice is drawn twice as
    often."""

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            require(0 <= sparsity < 1, "sampled.sparsities", sparsity, "in [0, 1)", "write 0.9 to remove 90 %")
        remedy = "write [0.0, 0.5, 0.8, 0.9, 0.95, 0.98]"
        require(0 in self.sparsities, "sampled.sparsities", self.sparsities, "with 0, the dense network,", remedy)
