"""Sets of filters and of low rank on a GPU: the CPU's answers, and NaN told rather than raised."""

from __future__ import annotations

import math

import pytest
import torch

from sfw_dist import GroupKSupportBall, NuclearBall, SpectralKSupportBall
from sfw_dist.constraints import Constraint

GPU = "cuda:0"
SETS: list[Constraint] = [
    GroupKSupportBall(k=5, radius=2.0),
    NuclearBall(radius=2.0),
    NuclearBall(radius=2.0, svd="power"),
    SpectralKSupportBall(k=5, radius=2.0),
    SpectralKSupportBall(k=5, radius=2.0, svd="power"),
]


@pytest.mark.parametrize("constraint", SETS, ids=repr)
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (300, 40), (17,), ()])
def test_the_answer_is_that_of_the_cpu(constraint: Constraint, shape: tuple[int, ...]) -> None:
    """A random block from the GPU's own generator, or indices left on the host."""
    x = torch.randn(shape)
    vertex = constraint.lmo(x.to(GPU))
    torch.testing.assert_close(vertex.cpu(), constraint.lmo(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(constraint.gauge(x.to(GPU)).cpu(), constraint.gauge(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("constraint", SETS, ids=repr)
def test_nan_is_answered_with_nan(constraint: Constraint) -> None:
    """A factorization that raises, or does not end."""
    x = torch.randn(8, 9, device=GPU)
    x[3, 4] = math.nan
    assert constraint.lmo(x).isnan().any() and constraint.gauge(x).isnan()
