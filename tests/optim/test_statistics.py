"""What is kept of the last step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfw_dist.constraints import Constraint, KSparsePolytope, Unconstrained
from sfw_dist.optim.shard import Shard
from sfw_dist.optim.statistics import LastStep


def shard(name: str, constraint: Constraint | None = None) -> Shard:
    return Shard.of(name, nn.Parameter(torch.ones(3)), {}, constraint or KSparsePolytope(k=1, radius=1.0))


def table(*gammas: float) -> Tensor:
    return torch.tensor([[gamma, 0.0, 0.0] for gamma in gammas], dtype=torch.float64)


def test_a_step_replaces_the_statistics_of_the_step_before() -> None:
    """Fails when a step that was not finite is reported again after one that was."""
    a, b, c, last = shard("a"), shard("b"), shard("c"), LastStep()
    last.record([a, b], table(0.1, torch.nan))
    last.record([c], table(0.3))
    assert last.not_finite(wait=False) == {"b"}
    last.record([a, b], table(0.4, 0.5))
    assert last.not_finite(wait=True) == set()
    assert [found.gamma for found in last.statistics([a, b, c]).values()] == [0.4, 0.5, 0.3]


def test_unconstrained_tensors_have_no_statistics_and_new_ones_have_zeros() -> None:
    """Fails when a tensor that has not stepped is missing, or an unconstrained one has a gap."""
    last = LastStep()
    last.record([shard("free", Unconstrained())], table(0.05))
    found = last.statistics([shard("free", Unconstrained()), shard("new")])
    assert {name: tuple(row) for name, row in found.items()} == {"new": (0.0, 0.0, 0.0)}
