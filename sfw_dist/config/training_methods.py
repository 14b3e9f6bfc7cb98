"""The fields of SFW-Init, of the schedule of K, and of the sparse-training methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from sfw_dist.config.check import require


@dataclass
class InitConfig:
    """SFW-Init: a scale for each tensor, learned before a new run's first step.

    See docs/explanation/training-methods.md.
    """

    steps: int = 0
    """Iterations, of one and a half batches each; the paper has 390, 0 skips SFW-Init."""
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
    """none: K is constant; linear, geometric, cosine: how it changes from epoch to epoch."""
    start: float = 0.2
    """k_frac of the first epoch, in (0, 1]; above optimizer.constraint.k_frac K falls, below it K rises."""
    end: float = 0.5
    """Fraction of the epochs, in (0, 1], after which optimizer.constraint.k_frac is reached; at latest in the last."""

    def __post_init__(self) -> None:
        require(0 < self.start <= 1, "optimizer.k_schedule.start", self.start, "in (0, 1]", "write 0.2 for 20 %")
        require(0 < self.end <= 1, "optimizer.k_schedule.end", self.end, "in (0, 1]", "write 0.5 for half the epochs")


@dataclass
class GMPConfig:
    """Gradual magnitude pruning (GMP, method: gmp)."""

    sparsity: float = 0.9
    """Fraction of the convolutions' and linear layers' weights removed in the end, in (0, 1)."""
    initial: float = 0.0
    """Fraction removed at the beginning, from 0 to below sparsity."""
    begin: float = 0.1
    """Fraction of the training after which pruning begins, in [0, 1)."""
    end: float = 0.7
    """Fraction of the training after which sparsity is reached, above begin; then the kept weights train on."""
    every: int = 100
    """Steps between two prunings."""
    ranking: Literal["global", "layerwise"] = "global"
    """Where magnitudes are compared: over the whole network, or within each tensor."""

    def __post_init__(self) -> None:
        require(0 < self.sparsity < 1, "gmp.sparsity", self.sparsity, "in (0, 1)", "write 0.9 to remove 90 %")
        domain = f"from 0 to below gmp.sparsity {self.sparsity}"
        require(0 <= self.initial < self.sparsity, "gmp.initial", self.initial, domain, "write 0")
        require(0 <= self.begin < 1, "gmp.begin", self.begin, "in [0, 1)", "write 0.1")
        domain = f"above gmp.begin {self.begin} and at most 1"
        require(self.begin < self.end <= 1, "gmp.end", self.end, domain, "write 0.7, and gmp.begin 0.1")
        require(self.every > 0, "gmp.every", self.every, "at least 1", "write 100")


@dataclass
class CramConfig:
    """Compression-aware minimization (CrAM, method: cram)."""

    rho: float = 0.05
    """ρ ≥ 0: length of the step along the gradient to the point that is compressed."""
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])
    """Fractions removed there, in (0, 1); each step draws one of them."""
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
    """Fractions removed, in [0, 1), 0 among them; each step draws one. A fraction listed twice is drawn twice as
    often."""

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            require(0 <= sparsity < 1, "sampled.sparsities", sparsity, "in [0, 1)", "write 0.9 to remove 90 %")
        remedy = "write [0.0, 0.5, 0.8, 0.9, 0.95, 0.98]"
        require(0 in self.sparsities, "sampled.sparsities", self.sparsities, "with 0, the dense network,", remedy)
