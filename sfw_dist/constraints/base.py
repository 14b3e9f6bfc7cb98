"""Constraint sets and their linear minimization oracles (LMOs).

Every set is convex and symmetric about 0. A set may be concrete (``KSparsePolytope(k=10, radius=0.5)``) or a
specification that sizes itself to each tensor (``KSparsePolytope(k_frac=0.05, tau=15.0)``); ``bind`` makes the second
into the first. Sources: Lu et al., ICLR 2022, section 3 (K-sparse polytope); Pokutta, Spiegel, Zimmer,
arXiv 2010.07243 (L_p balls, radius modes); Zimmer, Spiegel, Pokutta, arXiv 2205.11921 (k-support ball). The sets that
look at a tensor's filters or singular values are in :mod:`sfw_dist.constraints.matrix`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Vertex(NamedTuple):
    """An LMO's answer: zero but for ``values`` at ``indices``."""

    indices: Tensor | None
    """int64 ``(s,)``, row-major, ascending; ``None``: every entry is given."""
    values: Tensor
    """``(s,)``, or ``(n,)`` when ``indices`` is ``None``."""

    def dense(self, shape: torch.Size) -> Tensor:
        """The vertex as a tensor of ``shape``."""
        if self.indices is None:
            return self.values.view(shape)
        return self.values.new_zeros(shape.numel()).index_copy_(0, self.indices, self.values).view(shape)


_KINDS: dict[str, type[Constraint]] = {}
"""Every set by its name; sets enter it as their classes are made."""


class Constraint(ABC):
    """A convex set of tensors with ``n`` entries, symmetric about 0."""

    kind: ClassVar[str]
    """The set's name in configurations and state dicts."""
    signs_only: bool = False
    """Whether every nonzero of a vertex is ±radius, so that one bit a nonzero describes it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    @abstractmethod
    def lmo_vertex(self, x: Tensor) -> Vertex:
        """``argmin_{v∈C} ⟨v, x⟩`` by its nonzeros; NaN in ``x`` makes NaN in ``v``."""

    @abstractmethod
    def gauge(self, x: Tensor) -> Tensor:
        """``min {t ≥ 0 : x ∈ t·C}`` as a float64 scalar: ``x`` is in C exactly when it is at most 1."""

    @abstractmethod
    def diameter(self, n: int) -> float:
        """The L2 diameter ``max_{u,v∈C} ‖u − v‖₂`` over ``n`` entries."""

    @abstractmethod
    def radius(self, n: int) -> float:
        """The r of the set's formula over ``n`` entries. Raises ``ValueError`` for a set that is not bound."""

    @abstractmethod
    def bind(self, n: int, initial_norm: float) -> Constraint:
        """The concrete set for a tensor of ``n`` entries whose initializer has ``E‖W‖₂ = initial_norm``."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain values from which :func:`constraint_from_spec` makes an equal set."""

    def support(self, n: int) -> int:
        """The most nonzeros that a vertex over ``n`` entries has."""
        return n

    def nonzeros(self, shape: torch.Size) -> int:
        """The most nonzeros that a vertex of this shape has."""
        return self.support(shape.numel())

    def work(self, shape: torch.Size) -> float:
        """Of one LMO, in memory passes times entries; a selection is 4: magnitudes out, partition in and out, scan."""
        return 4.0 * shape.numel()

    def project(self, x: Tensor) -> Tensor:
        """``argmin_{y∈C} ‖y − x‖₂``; sets without a projection raise ``ValueError``."""
        raise ValueError(f"{self!r} has no projection: use lmo")

    def lmo(self, x: Tensor) -> Tensor:
        """``argmin_{v∈C} ⟨v, x⟩``, of ``x``'s shape and type."""
        return self.lmo_vertex(x).dense(x.shape)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.spec().items() if key != "kind")
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and self.spec() == other.spec()

    def __hash__(self) -> int:
        return hash(tuple(self.spec().items()))


class _Sized(Constraint):
    """A set of the form r·C₁. Exactly one of these gives its size:

    * ``radius``: the r of the set's formula;
    * ``diameter``: the L2 diameter D, from which r follows;
    * ``tau``: ``D = 2·τ·E‖W_init‖₂`` (the paper's ``initialization`` mode), known once :meth:`bind` is told the norm.

    Raises ``ValueError`` for a size that is missing, given twice, or not positive.
    """

    def __init__(self, *, radius: float | None = None, diameter: float | None = None, tau: float | None = None) -> None:
        given = {k: v for k, v in {"radius": radius, "diameter": diameter, "tau": tau}.items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"{type(self).__name__} takes exactly one of radius, diameter and tau, got {given}")
        self.size_mode, self.size = next(iter(given.items()))
        if not 0 < self.size < math.inf:
            raise ValueError(f"{self.size_mode} must be positive, got {self.size}: the paper has tau=15")

    @abstractmethod
    def radius_for(self, diameter: float, n: int) -> float:
        """The r for which the set's L2 diameter over ``n`` entries is ``diameter``; linear in ``diameter``."""

    @abstractmethod
    def _with_radius(self, radius: float, n: int) -> Constraint: ...

    @abstractmethod
    def _shape(self) -> dict[str, Any]:
        """The constructor's arguments beside the size."""

    def radius(self, n: int) -> float:
        match self.size_mode:
            case "radius":
                return self.size
            case "diameter":
                return self.radius_for(self.size, n)
            case _:
                raise ValueError(f"{self!r} needs the initial norm: bind it with constrain(model, spec)")

    def diameter(self, n: int) -> float:
        return self.radius(n) / self.radius_for(1.0, n)

    def bind(self, n: int, initial_norm: float) -> Constraint:
        diameter = 2 * self.size * initial_norm
        return self._with_radius(self.radius_for(diameter, n) if self.size_mode == "tau" else self.radius(n), n)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._shape(), self.size_mode: self.size}


class _TopK(_Sized):
    """The sets whose vertices have at most K nonzeros; K is given, or a fraction of the entries."""

    def __init__(
        self, *, k: int | None = None, k_frac: float | None = None, k_min: int | None = None, **size: float | None
    ) -> None:
        super().__init__(**size)
        if (k is None) == (k_frac is None):
            raise ValueError(f"{type(self).__name__} takes either k or k_frac, got k={k}, k_frac={k_frac}")
        if k is not None and (k != int(k) or k < 1 or k_min is not None):
            raise ValueError(f"k must be a whole number from 1, without k_min, got k={k}, k_min={k_min}: write k=10")
        if k_frac is not None and not 0 < k_frac <= 1:
            raise ValueError(f"k_frac must be in (0, 1], got {k_frac}: write 0.05 for 5 %")
        self.k, self.k_frac, self.k_min = k, k_frac, 1 if k_min is None else k_min
        if self.k_min < 1:
            raise ValueError(f"k_min must be at least 1, got {k_min}: the paper's is 10")

    def support(self, n: int) -> int:
        return self.k_of(n)

    def k_of(self, n: int) -> int:
        """``K = min(max(k_min, ⌊k_frac·n⌋), n)`` of ``n`` things to choose from."""
        wanted = self.k if self.k_frac is None else max(self.k_min, int(self.k_frac * n))
        assert wanted is not None
        return min(wanted, n)

    def _with_radius(self, radius: float, n: int) -> Constraint:
        return type(self)(k=self.support(n), radius=radius)

    def _shape(self) -> dict[str, Any]:
        return {"k": self.k} if self.k_frac is None else {"k_frac": self.k_frac, "k_min": self.k_min}


def constraint_from_spec(spec: dict[str, Any]) -> Constraint:
    """The inverse of :meth:`Constraint.spec`. Raises ``ValueError`` for an unknown kind."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown constraint {kind!r}: known are {', '.join(_KINDS)}")
    return _KINDS[kind](**arguments)


def signed(x: Tensor, radius: float) -> Tensor:
    """``−radius·sign(x)``, NaN where ``x`` is; adding 0 turns −0 into 0, which is what the wire format brings back."""
    return torch.where(x.isnan(), x, x.sign()).mul_(-radius).add_(0.0)


def scaled_to(x: Tensor, norm: Tensor, radius: float) -> Tensor:
    """``−radius·x/norm``, and 0 where the norm is; in float64, for radius/norm overflows where x is tiny."""
    return torch.where(norm == 0, torch.zeros_like(x), (x.double() * (-radius / norm)).to(x.dtype))
