"""Groups of tensors in several sets, and trainings of them with chosen gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained
from sfw_dist.constraints import Constraint

SETS = {
    "k_sparse": KSparsePolytope(k=9, radius=0.3),
    "k_support": KSupportBall(k=9, radius=1.5),
    "l2": LpBall(2, radius=2.0),
    "linf": LpBall(math.inf, radius=0.2),
}
SHAPES = [(12, 4, 3, 3), (20, 11), (17,)]

every_set = pytest.mark.parametrize("constraint", SETS.values(), ids=SETS.keys())


def tensors(seed: int, shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.1 for shape in shapes]


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(x) for x in tensors(0, shapes, dtype)]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    """Gradients that differ from step to step around a fixed direction, as a network's do."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        mean = torch.arange(p.numel()).sin().view(p.shape)
        p.grad = (0.1 * mean + 0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)


def train(optimizer: SFW, steps: range = range(10)) -> list[Tensor]:
    """Copies of all parameters after these steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def mixed_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """A sparse, a dense and an unconstrained group."""
    sets: list[Constraint] = [SETS["k_sparse"], SETS["l2"], Unconstrained()]
    return [{"params": [p], "constraint": c} for p, c in zip(params, sets, strict=True)]


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Close in proportion to the tensor's largest entry: entries near 0 come of cancellation."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()), check_dtype=False)
