"""Our optimizers as ``torch.testing`` describes torch's own, and a small problem that any of them can be tested on.

An :class:`OptimizerInfo` says of an optimizer what ``torch.testing`` says of SGD: its options, its bad input, what it
does not support. The checks that go over :data:`INFOS` are in ``tests/optim/test_torch_*.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained
from sfw_dist.constraints import Constraint

# The import forbids the whole process to set torch.backends' flags, which Lightning and timm do.
torch.backends.__allow_nonbracketed_mutation_flag = True

SGD_INFO = next(info for info in optim_db if info.optim_cls is SGD)
SETS = {"free": Unconstrained(), "ball": LpBall(2, radius=3.0), "polytope": KSparsePolytope(k=4, radius=2.0)}


def _inputs(*more: OptimizerInput) -> Callable[..., list[OptimizerInput]]:
    common = [
        OptimizerInput(None, {"lr": 1e-2}, "lr"),
        OptimizerInput(None, {"lr": torch.tensor(0.001)}, "tensor lr"),
        OptimizerInput(None, {"lr": 1e-2, "momentum": 0.0, "weight_decay": 0.1}, "weight_decay without momentum"),
    ]
    return lambda device, dtype=None: [*common, *more]


def _errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    bad = [
        ({"momentum": -0.5}, "momentum must be in"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ]
    ours = [
        ErrorOptimizerInput(OptimizerInput(None, kwargs, message), error_type=ValueError, error_regex=message)
        for kwargs, message in bad
    ]
    return [*get_error_inputs_for_all_optims(device, dtype), *ours]


INFOS = [
    OptimizerInfo(
        SFW,
        optim_inputs_func=_inputs(
            OptimizerInput(None, {"lr": 1e-2, "rescale": "none"}, "rescale none"),
            OptimizerInput(None, {"lr": 1e-2, "rescale": "diameter"}, "rescale diameter"),
            OptimizerInput(None, {"lr": 1e-2, "fused": False}, "not fused"),
            OptimizerInput(None, {"lr": 1e-2, "replicate_momentum": True, "split": None}, "replicated"),
        ),
        optim_error_inputs_func=_errors,
        scheduler_inputs=SGD_INFO.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
    ),
    OptimizerInfo(
        ProjectedSGD,
        optim_inputs_func=_inputs(),
        optim_error_inputs_func=_errors,
        scheduler_inputs=SGD_INFO.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
    ),
    OptimizerInfo(
        AdaGradSFW,
        optim_inputs_func=_inputs(OptimizerInput(None, {"inner_steps": 5}, "five inner steps")),
        optim_error_inputs_func=_errors,
        scheduler_inputs=SGD_INFO.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
    ),
]

NO_PROJECTION = "the K-sparse polytope has no Euclidean projection, which is ProjectedSGD's step"
each_optimizer = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def _cases(*, first_only: bool = False) -> list[Any]:
    """Each optimizer with each of its options, or the first alone, and each set."""
    cases = []
    for info in INFOS:
        for options in info.optim_inputs_func("cpu")[: 1 if first_only else None]:
            for name, constraint in SETS.items():
                refused = info.optim_cls is ProjectedSGD and name == "polytope"
                marks = [pytest.mark.skip(reason=NO_PROJECTION)] if refused else []
                cases.append(
                    pytest.param(info, options, constraint, id=f"{info.name}-{options.desc}-{name}", marks=marks)
                )
    return cases


every_option = pytest.mark.parametrize(("info", "options", "constraint"), _cases())
every_set = pytest.mark.parametrize(("info", "options", "constraint"), _cases(first_only=True))


class Problem:
    """A linear map, its loss, and the optimizer under test."""

    def __init__(self, info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, **group: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 5, generator=generator) * 0.3)
        self.bias = nn.Parameter(torch.randn(10, generator=generator) * 0.3)
        self.input = torch.randn(5, generator=generator)
        self.parameters = [self.weight, self.bias]
        groups = [{"params": self.parameters, "constraint": constraint, **group}]
        self.optimizer: Optimizer = info.optim_cls(groups, **copy.deepcopy(options.kwargs))

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias - 1).pow(2).sum()
        loss.backward()
        return loss

    def train(self, steps: int) -> list[Tensor]:
        for _ in range(steps):
            self.optimizer.step(self.loss)
        return [p.detach().clone() for p in self.parameters]


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the bit, whatever is nested in what."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected
