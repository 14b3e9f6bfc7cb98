"""Constraint sets and their linear minimization oracles (LMOs).

Every set is convex and symmetric about 0. A set may be concrete (``KSparsePolytope(k=10, radius=0.5)``) or a
specification that sizes itself to each tensor (``KSparsePolytope(k_frac=0.05, tau=15.0)``); ``bind`` makes the second
into the first. Sources: Lu et al., ICLR 2022, section 3 (K-sparse polytope); Pokutta, Spiegel, Zimmer,
arXiv 2010.07243 (L_p balls, radius modes); Zimmer, Spiegel, Pokutta, arXiv 2205.11921 (k-support ball). The sets that
look at a tensor's filters or singular values are in :mod:`sfw_dist.structured`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sfw_dist.reduction import absolute_sum, row_sums, square_root, squared_norm, tree_sum
from sfw_dist.topk import select
from sfw_dist.topk.kept import squared_norm_of_kept


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


class KSparsePolytope(_TopK):
    """``C(K, r) = conv{v : at most K nonzeros, each ±r} = {θ : ‖θ‖∞ ≤ r and ‖θ‖₁ ≤ K·r}`` (Lu et al., section 3).

    LMO: ``−r·sign(x_i)`` on the K entries of largest ``|x_i|`` (ties: the lowest flat index; zeros stay 0).
    L2 diameter ``2·r·√K``.
    """

    kind = "k_sparse"
    signs_only = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices = select(x, self.support(x.numel()))
        return Vertex(indices, signed(x.reshape(-1)[indices], self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        n = x.numel()
        largest = x.abs().max().double()
        return torch.maximum(largest, absolute_sum(x) / self.support(n)) / self.radius(n)

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / (2 * math.sqrt(self.support(n)))


class KSupportBall(_TopK):
    """``conv{v : ‖v‖₀ ≤ K, ‖v‖₂ ≤ r}`` (Argyriou, Foygel, Srebro, 2012; SFW: arXiv 2205.11921).

    LMO: the K entries of largest ``|x_i|``, scaled to norm r, with the sign turned. L2 diameter ``2·r``.
    """

    kind = "k_support"

    def lmo_vertex(self, x: Tensor) -> Vertex:
        indices, flat = select(x, self.support(x.numel())), x.reshape(-1)
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        norm = square_root(squared_norm_of_kept(wide, indices))
        return Vertex(indices, scaled_to(flat[indices], norm, self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        """The k-support norm over r."""
        n = x.numel()
        return k_support_norm(x.detach().double().abs().reshape(-1), self.support(n)) / self.radius(n)

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2


class LpBall(_Sized):
    """``{θ : ‖θ‖_p ≤ r}``, p ≥ 1 (``math.inf`` for the maximum norm).

    LMO (``1/p + 1/q = 1``): ``v_i = −r·sign(x_i)·|x_i|^{q−1} / ‖x‖_q^{q−1}``; for p = 1 the one entry of largest
    magnitude, for p = ∞ the signs. Radius from an L2 diameter: ``r = (D/2)·n^{1/p − 1/2}``, with 1/p taken as 1/2 for
    p = 1 and 0 for p = ∞ (the published rule; for 1 < p < 2 it gives more than half the diameter).
    """

    kind = "lp"

    def __init__(self, p: float | str, **size: float | None) -> None:
        super().__init__(**size)
        self.p = float(p)
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1, got {p}: below 1 the set is not convex")
        self.signs_only = self.p in (1.0, math.inf)

    def support(self, n: int) -> int:
        return 1 if self.p == 1 else n

    def work(self, shape: torch.Size) -> float:
        return super().work(shape) if self.p == 1 else 0.0

    def lmo_vertex(self, x: Tensor) -> Vertex:
        radius, flat = self.radius(x.numel()), x.reshape(-1)
        if self.p == 1:
            indices = select(x, 1)
            return Vertex(indices, signed(flat[indices], radius))
        if self.p == math.inf:
            return Vertex(None, signed(flat, radius))
        direction = self.direction(flat, flat.abs().max())
        return Vertex(None, scaled_to(direction, self.norm(tree_sum(row_sums(self.terms, direction))), radius))

    def direction(self, x: Tensor, largest: Tensor) -> Tensor:
        """The vertex but for sign and length: ``sign(x_i)·|x_i|^{q−1}``; ``largest`` is the magnitude ``‖x‖_∞``."""
        if self.p == 2:
            return x
        # |x|^{q−1} overflows or vanishes unless x is scaled first; its scale cancels.
        magnitude = x.abs() / largest.clamp(min=torch.finfo(x.dtype).tiny)
        return magnitude.pow(self.p / (self.p - 1) - 1) * x.sign()

    def terms(self, x: Tensor) -> Tensor:
        """``|x_i|^p`` in float64, of whose sum :meth:`norm` makes ``‖x‖_p``; for 1 < p < ∞."""
        return x.double().square() if self.p == 2 else x.abs().double().pow(self.p)

    def norm(self, total: Tensor) -> Tensor:
        """``‖x‖_p`` from the sum of :meth:`terms`."""
        return square_root(total) if self.p == 2 else total ** (1 / self.p)

    def gauge(self, x: Tensor) -> Tensor:
        match self.p:
            case 1.0:
                norm = absolute_sum(x)
            case 2.0:
                norm = squared_norm(x).sqrt()
            case _:
                norm = torch.linalg.vector_norm(x.double(), ord=self.p)
        return norm / self.radius(x.numel())

    def project(self, x: Tensor) -> Tensor:
        """Euclidean projection for p in {1, 2, ∞}; p = 1 by Duchi et al., ICML 2008, figure 1."""
        radius = self.radius(x.numel())
        match self.p:
            case math.inf:
                return x.clamp(-radius, radius)
            case 2.0:
                return (x.double() / self.gauge(x).clamp(min=1)).to(x.dtype)
            case 1.0:
                magnitude = x.double().abs()
                z = magnitude.reshape(-1).sort(descending=True).values
                excess = (z.cumsum(0) - radius) / torch.arange(1, z.numel() + 1, device=x.device)
                # At least one entry stays, also where the radius is lost beside it: 1e30 − 1 = 1e30.
                threshold = excess[(z > excess).sum().clamp(min=1) - 1].clamp(min=0)
                return x.sign() * (magnitude - threshold).clamp(min=0).to(x.dtype)
            case _:
                return super().project(x)

    def diameter(self, n: int) -> float:
        return 2 * self.radius(n) * n ** max(0.0, 0.5 - 1 / self.p)

    def radius_for(self, diameter: float, n: int) -> float:
        inverse = {1.0: 0.5, math.inf: 0.0}.get(self.p, 1 / self.p)
        return diameter / 2 * n ** (inverse - 0.5)

    def _with_radius(self, radius: float, n: int) -> Constraint:
        return LpBall(self.p, radius=radius)

    def _shape(self) -> dict[str, Any]:
        return {"p": self.p if self.p < math.inf else "inf"}  # JSON has no infinity


class Unconstrained(Constraint):
    """All tensors: the optimizer takes momentum-SGD steps instead. It has no LMO."""

    kind = "unconstrained"

    def lmo_vertex(self, x: Tensor) -> Vertex:
        raise ValueError("Unconstrained has no LMO: a linear function has no minimum over the whole space")

    def gauge(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=x.device)

    def project(self, x: Tensor) -> Tensor:
        return x.clone()

    def radius(self, n: int) -> float:
        return math.inf

    def diameter(self, n: int) -> float:
        return math.inf

    def bind(self, n: int, initial_norm: float) -> Constraint:
        return self

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}


def constraint_from_spec(spec: dict[str, Any]) -> Constraint:
    """The inverse of :meth:`Constraint.spec`. Raises ``ValueError`` for an unknown kind."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown constraint {kind!r}: known are {', '.join(_KINDS)}")
    return _KINDS[kind](**arguments)


def k_support_norm(x: Tensor, k: int) -> Tensor:
    """Of magnitudes, float64 ``(n,)``, 1 ≤ k ≤ n (Argyriou, Foygel, Srebro, 2012, proposition 2.1).

    With ``z`` the magnitudes in descending order and ``T_l = Σ_{i≥K−l} z_i``, take the smallest ``l`` with
    ``z_{K−l−1} > T_l/(l+1)``; then ``‖x‖² = Σ_{i<K−l} z_i² + T_l²/(l+1)``.
    """
    z = x.sort(descending=True).values
    from_one = torch.arange(1, k + 1, device=x.device, dtype=torch.float64)  # l + 1
    tails = z[:k].flip(0).cumsum(0) + z[k:].sum()  # T_l for l = 0 … K−1
    before = torch.cat([z.new_full((1,), math.inf), z[: k - 1]]).flip(0)  # z_{K−l−1}, with z_0 = ∞
    level = (before > tails / from_one).to(torch.int8).argmax()
    head = torch.cat([z.new_zeros(1), z[: k - 1].square().cumsum(0)]).flip(0)[level]
    return (head + tails[level].square() / from_one[level]).sqrt()


def signed(x: Tensor, radius: float) -> Tensor:
    """``−radius·sign(x)``, NaN where ``x`` is; adding 0 turns −0 into 0, which is what the wire format brings back."""
    return torch.where(x.isnan(), x, x.sign()).mul_(-radius).add_(0.0)


def scaled_to(x: Tensor, norm: Tensor, radius: float) -> Tensor:
    """``−radius·x/norm``, and 0 where the norm is; in float64, for radius/norm overflows where x is tiny."""
    return torch.where(norm == 0, torch.zeros_like(x), (x.double() * (-radius / norm)).to(x.dtype))
