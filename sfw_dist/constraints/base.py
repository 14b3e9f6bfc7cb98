"""The interface of a constraint set, the registry of sets by name, and what several sets share.

Every set is convex and symmetric about 0. A set is either concrete (``KSparsePolytope(k=10, radius=0.5)``) or a
specification that sizes itself to each tensor (``KSparsePolytope(k_frac=0.05, tau=15.0)``); :meth:`Constraint.bind`
turns the second into the first.

To add a set, subclass :class:`Constraint` (or :class:`SizedConstraint`, which handles the radius) and give it a
``kind``: from then on configurations, state dicts and every command know it by that name.

Sources: Lu et al., ICLR 2022, section 3 (K-sparse polytope); Pokutta, Spiegel, Zimmer, arXiv 2010.07243 (L_p balls,
radius modes); Zimmer, Spiegel, Pokutta, arXiv 2205.11921 (k-support balls).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sfw_dist.distributed.coalesced import AsyncTask, coalesce
from sfw_dist.ops.partition import Partition


class Vertex(NamedTuple):
    """The result of an LMO: ``values`` at ``indices``, zero elsewhere."""

    indices: Tensor | None
    """int64 ``(s,)``, row-major, ascending; ``None``: every entry is given."""
    values: Tensor
    """``(s,)``, or ``(n,)`` when ``indices`` is ``None``."""

    def dense(self, shape: torch.Size) -> Tensor:
        """The vertex as a tensor of ``shape``."""
        if self.indices is None:
            return self.values.view(shape)
        return self.values.new_zeros(shape.numel()).index_copy_(0, self.indices, self.values).view(shape)


class ShardedDirection(NamedTuple):
    """What an LMO minimizes along, for a tensor whose entries are divided between ranks."""

    constraint: Constraint
    """Of the whole tensor, bound."""
    entries: Tensor | None
    """This rank's entries of the direction, float32 or float64 ``(n,)``; ``None`` where it has none."""
    partition: Partition
    dtype: torch.dtype
    """Of the entries, on every rank."""
    device: torch.device
    """Of the messages."""


_REGISTRY: dict[str, type[Constraint]] = {}
"""Every set by its name; a class enters when it is defined."""


class Constraint(ABC):
    """A convex set of tensors with ``n`` entries, symmetric about 0.

    A subclass needs :meth:`lmo_vertex`, :meth:`gauge`, :meth:`diameter`, :meth:`radius`, :meth:`bind` and :meth:`spec`.

    Example:
        >>> class Box(SizedConstraint):
        ...     kind = "box"
        ...     def lmo_vertex(self, x):
        ...         return Vertex(None, -self.radius(x.numel()) * x.reshape(-1).sign())
        ...     def gauge(self, x):
        ...         return x.abs().max().double() / self.radius(x.numel())
        ...     def radius_for(self, diameter, n):
        ...         return diameter / (2 * n**0.5)
        >>> Box(radius=0.5).lmo(torch.tensor([3.0, -1.0]))
        tensor([-0.5000,  0.5000])
        >>> constraint_from_spec({"kind": "box", "radius": 0.5})
        Box(radius=0.5)
    """

    kind: ClassVar[str]
    """The set's name in configurations and state dicts."""
    signs_only: bool = False
    """Whether every nonzero of a vertex is ±radius, so that one bit describes it."""
    selects: ClassVar[bool] = False
    """Whether a vertex has K entries selected by magnitude, with K as an argument of the set."""
    is_unconstrained: ClassVar[bool] = False
    """Whether the set is the whole space, over which the optimizer takes momentum-SGD steps instead."""
    divisible: ClassVar[bool] = False
    """Whether there is an LMO for tensors whose entries are divided between ranks, :meth:`sharded_lmo`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            _REGISTRY[cls.kind] = cls

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles are plain values and :func:`constraint_from_spec`, which ``torch.load(weights_only=True)`` may call:
        frameworks put whole param groups into their checkpoints.
        """
        return constraint_from_spec, (self.spec(),)

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
        """The r of the set's formula over ``n`` entries.

        Raises:
            ValueError: the set is not bound.
        """

    @abstractmethod
    def bind(self, n: int, initial_norm: float) -> Constraint:
        """The concrete set for a tensor of ``n`` entries whose initializer has ``E‖W‖₂ = initial_norm``."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain values from which :func:`constraint_from_spec` makes an equal set."""

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of the arguments that the set takes: its constructor's, and its base classes' where it hands
        further keyword arguments on.
        """
        names: list[str] = []
        for constructor in (base.__dict__.get("__init__") for base in cls.__mro__ if base is not object):
            if constructor is None:
                continue
            parameters = list(inspect.signature(constructor).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return tuple(dict.fromkeys(names))

    @property
    def needs_initial_norm(self) -> bool:
        """Whether :meth:`bind` looks at ``initial_norm``."""
        return True

    def support(self, n: int) -> int:
        """The most nonzeros that a vertex over ``n`` entries has."""
        return n

    def nonzeros(self, shape: torch.Size) -> int:
        """The most nonzeros that a vertex of this shape has."""
        return self.support(shape.numel())

    def work(self, shape: torch.Size) -> float:
        """The cost of one LMO, in memory passes times entries.

        A selection costs 4 passes: magnitudes out, partition in and out, scan.
        """
        return 4.0 * shape.numel()

    def project(self, x: Tensor) -> Tensor:
        """``argmin_{y∈C} ‖y − x‖₂``.

        Raises:
            ValueError: the set has no projection.
        """
        raise ValueError(f"{self!r} has no projection: use lmo")

    def lmo(self, x: Tensor) -> Tensor:
        """``argmin_{v∈C} ⟨v, x⟩``, of ``x``'s shape and type."""
        return self.lmo_vertex(x).dense(x.shape)

    def sharded_lmo(self, direction: ShardedDirection) -> AsyncTask:
        """The LMO of one tensor whose entries are divided between ranks; a set with ``divisible = True`` defines it.

        Args:
            direction: this rank's entries, and how the tensor is divided.

        Returns:
            A task (:mod:`sfw_dist.distributed.coalesced`) that every rank runs, those without entries too, and that
            returns the vertex over this rank's entries as a :class:`Vertex`, or ``None`` where the rank has none.

        Raises:
            ValueError: the set defines none.
        """
        raise ValueError(f"{self!r} has no LMO for divided tensors: define sharded_lmo, or set divisible = False")

    @classmethod
    def sharded_lmos(cls, directions: Sequence[ShardedDirection]) -> AsyncTask:
        """The LMOs of several tensors with sets of this class as one task, which returns a list of vertices.

        A set may override it to handle all tensors at once; otherwise each tensor has its :meth:`sharded_lmo`, and
        their messages travel together.
        """
        return coalesce([direction.constraint.sharded_lmo(direction) for direction in directions])

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.spec().items() if key != "kind")
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and self.spec() == other.spec()

    def __hash__(self) -> int:
        return hash(tuple(self.spec().items()))


class SizedConstraint(Constraint):
    """A set of the form r·C₁. Exactly one argument gives its size.

    Args:
        radius: the r of the set's formula.
        diameter: the L2 diameter D, from which r follows.
        tau: ``D = 2·τ·E‖W_init‖₂`` (the paper's mode), known once :meth:`bind` is told the norm.

    Raises:
        ValueError: a size that is missing, given twice, or not positive.
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

    def with_radius(self, radius: float, n: int) -> Constraint:
        """The same set over ``n`` entries with a radius given."""
        return type(self)(**self.shape_arguments(), radius=radius)

    def shape_arguments(self) -> dict[str, Any]:
        """The constructor's arguments other than the size."""
        return {}

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

    @property
    def needs_initial_norm(self) -> bool:
        return self.size_mode == "tau"

    def bind(self, n: int, initial_norm: float) -> Constraint:
        diameter = 2 * self.size * initial_norm
        return self.with_radius(self.radius_for(diameter, n) if self.size_mode == "tau" else self.radius(n), n)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.shape_arguments(), self.size_mode: self.size}


class TopKConstraint(SizedConstraint):
    """A set whose vertices keep K things: entries, rows or singular values.

    Args:
        k: K itself; or
        k_frac: K as a fraction of the things to choose from, in (0, 1], at least
        k_min: which is 1 unless given.
        size: as in :class:`SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain, or both or neither of ``k`` and ``k_frac``.
    """

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

    def with_radius(self, radius: float, n: int) -> Constraint:
        return type(self)(k=self.support(n), radius=radius)

    def shape_arguments(self) -> dict[str, Any]:
        return {"k": self.k} if self.k_frac is None else {"k_frac": self.k_frac, "k_min": self.k_min}


def constraint_kinds() -> dict[str, type[Constraint]]:
    """Every set that is known, by its name.

    Example:
        >>> constraint_kinds()["k_sparse"].fields()
        ('k', 'k_frac', 'k_min', 'radius', 'diameter', 'tau')
    """
    return dict(_REGISTRY)


def constraint_from_spec(spec: dict[str, Any]) -> Constraint:
    """The inverse of :meth:`Constraint.spec`.

    Raises:
        ValueError: no set of that name is known.
    """
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in _REGISTRY:
        raise ValueError(
            f"unknown constraint {kind!r}: known are {', '.join(_REGISTRY)}; import the module that defines it"
        )
    return _REGISTRY[kind](**arguments)


def signed(x: Tensor, radius: float) -> Tensor:
    """``−radius·sign(x)``, NaN where ``x`` is. Adding 0 turns −0 into 0, which is what the vertex codec decodes to."""
    return torch.where(x.isnan(), x, x.sign()).mul_(-radius).add_(0.0)


def scaled_to(x: Tensor, norm: Tensor, radius: float) -> Tensor:
    """``−radius·x/norm``, and 0 where the norm is 0; in float64, because radius/norm overflows where x is tiny."""
    return torch.where(norm == 0, torch.zeros_like(x), (x.double() * (-radius / norm)).to(x.dtype))


def selected_vertex(selected: Tensor, values: Tensor) -> Vertex:
    """The vertex of a shard: ``values`` where ``selected``, both ``(n,)``.

    It is dense, because listing the nonzeros would wait for a GPU, and has −0 elsewhere, because adding that changes no
    bit of θ.
    """
    return Vertex(None, torch.where(selected & values.ne(0), values, -0.0))


torch.serialization.add_safe_globals([constraint_from_spec])
