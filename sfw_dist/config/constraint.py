"""The fields of the constraint set, and the set that they describe.

Names of sets, and the fields that each takes, come from the classes in :mod:`sfw_dist.constraints`.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sfw_dist.constraints import Constraint, constraint_kinds
from sfw_dist.constraints.matrix import SVD
from sfw_dist.errors import UserError, import_path

SIZES = ("tau", "diameter", "radius")


@dataclass
class ConstraintConfig:
    """The set each constrained tensor stays in; exactly one of tau, diameter and radius gives its size."""

    set: str = "k_sparse"
    """Name of the set: k_sparse is the paper's K-sparse polytope, docs/explanation/algorithm.md has the others; or the
    import path of a class of your own, package.module:ClassName."""
    k_frac: float = 0.05
    """K as a fraction, in (0, 1]: of a tensor's entries (k_sparse, k_support), of its filters (group_k_support), of the
    greatest rank it can have (spectral_k_support)."""
    k_min: int = 10
    """Least K of a tensor, where it has as many (sets with k_frac)."""
    svd: SVD = "auto"
    """Singular vectors exactly, by powers of a random block, or by whichever is quicker (nuclear,
    spectral_k_support)."""
    p: float = 2.0
    """Order of the norm, at least 1, `.inf` for the maximum norm (lp)."""
    tau: float | None = None
    """L2 diameter = 2·tau·E‖W_init‖₂; the default, with tau = 15, when none of the three is given."""
    diameter: float | None = None
    """L2 diameter of the set, the same for every tensor."""
    radius: float | None = None
    """Radius of the set, the same for every tensor."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the set's class, for a class of your own."""

    def __post_init__(self) -> None:
        try:
            self.build()
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.constraint: {' '.join(str(error).split())}") from None

    def build(self) -> Constraint:
        """Make the set that :func:`sfw_dist.constrain` binds to each parameter.

        Fields that the set does not take are left out: they keep their values when ``set`` alone is overridden.

        Raises:
            UserError: unknown set, or one that does not take a key of ``arguments``.
            ValueError: a value outside its domain, from the set's constructor.
        """
        kind = constraint_class(self.set)
        taken = kind.fields()
        values: dict[str, Any] = {"k_frac": self.k_frac, "k_min": self.k_min, "svd": self.svd, "p": self.p}
        sizes = {size: getattr(self, size) for size in SIZES}
        values |= {size: value for size, value in sizes.items() if value is not None} or {"tau": 15.0}
        given = {key: value for key, value in values.items() if key in taken}
        for key in self.arguments:
            if key not in taken:
                raise _not_a_field("optimizer.constraint.arguments.", key, self.set)
        return kind(**given | self.arguments)

    @property
    def schedules_k(self) -> bool:
        """Whether K may change over the training: it counts entries of a tensor."""
        return constraint_class(self.set).selects

    @property
    def divisible(self) -> bool:
        """Whether the LMO can be computed while every rank holds only a shard of the tensor."""
        return constraint_class(self.set).divisible

    @property
    def has_projection(self) -> bool:
        """Whether the set has a Euclidean projection."""
        try:
            self.build().bind(1, 1.0).project(torch.zeros(1))
        except ValueError:
            return False
        return True


def constraint_class(name: str) -> type[Constraint]:
    """Find a set's class.

    Args:
        name: a registered name, or ``package.module:ClassName`` for a subclass of ``Constraint``.

    Raises:
        UserError: no set has that name, or the import path leads to no subclass of ``Constraint``.
    """
    if ":" in name:
        return _import_class(name)
    kinds = constraint_kinds()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = f"known are {', '.join(kinds)}, and package.module:ClassName for a class of your own"
        raise UserError(f"optimizer.constraint.set: unknown set {name!r}: {hint}{known}")
    return kinds[name]


def check_given_fields(given: dict[str, Any], name: str, where: str) -> None:
    """Refuse a field that the chosen set does not take, which would have no effect.

    A field is looked at where it is written: a value inherited from a base, which was written for the base's set, is
    no mistake. Nor are the values of a saved configuration, which holds every field.

    Args:
        given: the fields that one file, or the command line, gives.
        name: the set in force there.
        where: the file, or the command line, for the message.

    Raises:
        UserError: a field that the set does not take.
    """
    if given.keys() >= set(SIZES):  # a person gives one of them: this was written by save_config
        return
    always = ("set", "arguments")
    for key, value in given.items():
        if value is not None and key not in {*constraint_class(name).fields(), *always}:
            raise _not_a_field(f"{where}: optimizer.constraint.", key, name)


def _not_a_field(prefix: str, key: str, name: str) -> UserError:
    taken = constraint_class(name).fields()
    known = [f.name for f in fields(ConstraintConfig) if f.name in taken]
    own = [field for field in taken if field not in known]
    takes = ", ".join([*known, *own]) if prefix.endswith("arguments.") else ", ".join(known)
    return UserError(f"{prefix}{key} is no field of the set {name}, which takes {takes or 'none'}: remove it")


def _import_class(path: str) -> type[Constraint]:
    remedy = "write package.module:ClassName of a subclass of sfw_dist.constraints.Constraint that can be imported"
    found = import_path(path, "optimizer.constraint.set", remedy)
    if not (inspect.isclass(found) and issubclass(found, Constraint)):
        raise UserError(f"optimizer.constraint.set: {path} is no constraint set: {remedy}")
    return found
