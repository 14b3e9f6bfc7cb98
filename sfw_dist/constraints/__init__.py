"""Convex sets and their linear minimization oracles (LMOs), and :func:`constrain`, which binds one to every
parameter.
"""

from sfw_dist.constraints.base import Constraint, Vertex, constraint_from_spec, constraint_kinds
from sfw_dist.constraints.binding import Binding, bindings, constrain
from sfw_dist.constraints.initial_norm import expected_initial_norm
from sfw_dist.constraints.k_sparse import KSparsePolytope, KSupportBall
from sfw_dist.constraints.lp import LpBall
from sfw_dist.constraints.matrix import GroupKSupportBall, NuclearBall, SpectralKSupportBall
from sfw_dist.constraints.unconstrained import Unconstrained

__all__ = [
    "Binding",
    "Constraint",
    "GroupKSupportBall",
    "KSparsePolytope",
    "KSupportBall",
    "LpBall",
    "NuclearBall",
    "SpectralKSupportBall",
    "Unconstrained",
    "Vertex",
    "bindings",
    "constrain",
    "constraint_from_spec",
    "constraint_kinds",
    "expected_initial_norm",
]
