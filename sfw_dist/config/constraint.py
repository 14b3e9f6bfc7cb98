"""The fields of the constraint set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sfw_dist.constraints import (
    Constraint,
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSupportBall,
    Unconstrained,
)
from sfw_dist.constraints.matrix import SVD
from sfw_dist.errors import UserError

SetName = Literal["k_sparse", "k_support", "lp", "unconstrained", "group_k_support", "nuclear", "spectral_k_support"]
NEED_WHOLE_TENSORS = ("group_k_support", "nuclear", "spectral_k_support")


@dataclass
class ConstraintConfig:
    """The set each constrained tensor stays in; exactly one of tau, diameter and radius gives its size."""

    set: SetName = "k_sparse"
    """K-sparse polytope (the paper's), k-support ball, L_p ball, no constraint; or, of filters and of low rank, group
    k-support, nuclear and spectral k-support balls."""
    k_frac: float = 0.05
    """K as a fraction, in (0, 1]: of a tensor's entries (k_sparse, k_support), of its filters (group_k_support), of the
    greatest rank it can have (spectral_k_support)."""
    k_min: int = 10
    """Least K of a tensor, where it has as many (all four)."""
    svd: SVD = "auto"
    """Singular vectors exactly, by powers of a random block, or by these where it is quicker (nuclear,
    spectral_k_support)."""
    p: float = 2.0
    """Order of the norm, at least 1, `.inf` for the maximum norm (lp)."""
    tau: float | None = None
    """L2 diameter = 2·tau·E‖W_init‖₂; the default, with tau = 15, when none of the three is given."""
    diameter: float | None = None
    """L2 diameter of the set, the same for every tensor."""
    radius: float | None = None
    """Radius of the set, the same for every tensor."""

    def __post_init__(self) -> None:
        try:
            self.build()
        except ValueError as error:
            raise UserError(f"optimizer.constraint: {error}") from None

    def build(self) -> Constraint:
        """The specification that :func:`sfw_dist.constrain` binds to each parameter. Raises ``ValueError``."""
        sizes = {"tau": self.tau, "diameter": self.diameter, "radius": self.radius}
        size = {key: value for key, value in sizes.items() if value is not None} or {"tau": 15.0}
        of_k: dict[str, Any] = {"k_frac": self.k_frac, "k_min": self.k_min, **size}
        match self.set:
            case "k_sparse":
                return KSparsePolytope(**of_k)
            case "k_support":
                return KSupportBall(**of_k)
            case "group_k_support":
                return GroupKSupportBall(**of_k)
            case "spectral_k_support":
                return SpectralKSupportBall(svd=self.svd, **of_k)
            case "nuclear":
                return NuclearBall(svd=self.svd, **size)
            case "lp":
                return LpBall(p=self.p, **size)
            case "unconstrained":
                return Unconstrained()
