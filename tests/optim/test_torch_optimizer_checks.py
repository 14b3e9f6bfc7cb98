"""The checks that PyTorch runs on steps of each of its own optimizers, with ours registered as three more.

They are those of PyTorch's ``test/test_optim.py``, written anew; what means nothing for an optimizer of convex sets is
skipped with the reason.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

from sfw_dist import Unconstrained
from sfw_dist.constraints import Constraint
from tests.support.optimizer_infos import (
    INFOS,
    SGD_INFO,
    Problem,
    assert_same,
    each_optimizer,
    every_option,
    every_set,
)

NAMES = "groups without names may stand beside groups with names: Lightning adds such"
pytestmark = pytest.mark.filterwarnings("ignore:no param group has a constraint")


def _errors_of_each() -> list[Any]:
    cases = []
    for info in INFOS:
        for error in info.optim_error_inputs_func("cpu", torch.float32):
            desc = error.optimizer_error_input.desc
            marks = (
                [pytest.mark.skip(reason=NAMES)]
                if desc == "all optimizer param groups should be with/without names."
                else []
            )
            cases.append(pytest.param(info, error, id=f"{info.name}-{desc}", marks=marks))
    return cases


@pytest.mark.parametrize(("info", "error"), _errors_of_each())
def test_bad_input_is_refused_as_torchs_optimizers_refuse_it(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    """Fails when duplicated parameters, groups half with names, a learning rate of two numbers … are taken."""
    wrong = error.optimizer_error_input
    params = [nn.Parameter(torch.randn(1, 1))] if wrong.params is None else wrong.params
    with warnings.catch_warnings():  # whatever else it warns of: a message that matches is enough
        warnings.simplefilter("ignore")
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                info.optim_cls(params, **wrong.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(params, **wrong.kwargs)


def _unconstrained_inputs_of_sgd() -> list[Any]:
    cases = []
    for info in INFOS:
        for options in SGD_INFO.optim_inputs_func("cpu"):
            others = options.kwargs.keys() - {"lr", "momentum", "weight_decay"}
            marks = [pytest.mark.skip(reason=f"has no option {', '.join(sorted(others))}")] if others else []
            cases.append(pytest.param(info, options, id=f"{info.name}-{options.desc}", marks=marks))
    return cases


@pytest.mark.parametrize(("info", "options"), _unconstrained_inputs_of_sgd())
def test_without_a_set_each_step_is_that_of_torchs_sgd(info: OptimizerInfo, options: OptimizerInput) -> None:
    """Fails when an option of SGD means something else in an unconstrained group."""
    kwargs = {"lr": 1e-3, "momentum": 0.0} | options.kwargs
    ours = Problem(info, OptimizerInput(None, kwargs), Unconstrained())
    theirs = Problem(info, OptimizerInput(None, {}), Unconstrained())
    theirs.optimizer = SGD(theirs.parameters, **copy.deepcopy(kwargs))
    for _ in range(8):
        for actual, expected in zip(ours.train(1), theirs.train(1), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@every_option
def test_it_goes_in_the_right_direction(info: OptimizerInfo, options: OptimizerInput, constraint: Constraint) -> None:
    """Fails when an option turns a step uphill, or a step leaves the set."""
    problem = Problem(info, options, constraint)
    before = problem.loss().item()
    problem.train(20)
    assert problem.loss().item() < before
    assert all(constraint.gauge(p.detach()) <= 1 + 1e-6 for p in problem.parameters)


@pytest.mark.parametrize("number", range(len(SGD_INFO.scheduler_inputs)))
@every_set
def test_it_goes_in_the_right_direction_under_several_schedules(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, number: int
) -> None:
    """Fails when schedules that share one optimizer stop or reverse it. The schedules are those of torch's SGD."""
    problem = Problem(info, options, constraint)
    schedules = [make(problem.optimizer) for make in info.scheduler_inputs[number]]
    before = problem.loss().item()
    for _ in range(20):
        problem.optimizer.step(problem.loss)
        for schedule in schedules:
            schedule.step(*([problem.loss().item()] if isinstance(schedule, ReduceLROnPlateau) else []))
    assert problem.loss().item() < before


@each_optimizer
def test_groups_override_learning_rate_and_weight_decay(info: OptimizerInfo) -> None:
    """Fails when a group's own lr or weight_decay is lost to the optimizer's."""
    weight, bias = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5, "weight_decay": 0.2}]
    optimizer = info.optim_cls(groups, lr=0.1, momentum=0.0)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.0), (0.5, 0.2)]
    weight.grad, bias.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((3,), 1 - 0.1))
    torch.testing.assert_close(bias.data, torch.full((3,), 1 - 0.5 * (1 + 0.2)))


@every_set
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one entry"])
def test_a_tensor_learning_rate_equals_the_number(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, shape: tuple[int, ...]
) -> None:
    """Fails when a learning rate that is a tensor is refused, or is read once only."""
    number = Problem(info, OptimizerInput(None, {"lr": 0.125}), constraint)
    rate = torch.full(shape, 0.125)
    tensor = Problem(info, OptimizerInput(None, {"lr": rate}), constraint)
    for _ in range(2):
        torch.testing.assert_close(tensor.train(3), number.train(3), rtol=1e-6, atol=1e-7)
        number.optimizer.param_groups[0]["lr"] *= 0.5
        tensor.optimizer.param_groups[0]["lr"].mul_(0.5)


@every_option
def test_nothing_moves_without_gradients(info: OptimizerInfo, options: OptimizerInput, constraint: Constraint) -> None:
    """Fails when weight decay or an LMO moves a parameter whose gradient is None."""
    problem = Problem(info, options, constraint)
    problem.loss()
    problem.bias.grad = None
    before = problem.bias.detach().clone()
    problem.optimizer.step()
    assert_same(problem.bias.data, before)
    problem.optimizer.zero_grad()
    at_rest = [p.detach().clone() for p in problem.parameters]
    problem.optimizer.step()
    assert_same([p.data for p in problem.parameters], at_rest)


@every_set
def test_nothing_moves_where_all_gradients_have_been_zero(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint
) -> None:
    """Fails when the LMO of zero pulls a parameter towards some vertex."""
    problem = Problem(info, options, constraint)
    before = [p.detach().clone() for p in problem.parameters]
    for _ in range(2):
        for p in problem.parameters:
            p.grad = torch.zeros_like(p)
        problem.optimizer.step()
    assert_same([p.data for p in problem.parameters], before)


@every_option
def test_it_can_be_printed(info: OptimizerInfo, options: OptimizerInput, constraint: Constraint) -> None:
    """Fails when ``repr`` raises, or hides the set of a group."""
    printed = repr(Problem(info, options, constraint).optimizer)
    assert printed.startswith(f"{info.name} (\nParameter Group 0\n")
    assert f"    constraint: {constraint!r}\n" in printed


@each_optimizer
def test_complex_parameters_are_refused(info: OptimizerInfo) -> None:
    """Fails when a complex parameter is taken, of which no set is defined."""
    assert not info.supports_complex
    with pytest.raises(ValueError, match=re.escape("take real floating-point parameters, got torch.complex64")):
        info.optim_cls([nn.Parameter(torch.randn(3, dtype=torch.complex64))])


@each_optimizer
def test_sparse_gradients_are_refused(info: OptimizerInfo) -> None:
    """Fails when a sparse gradient is taken for a dense one."""
    assert not info.supports_sparse
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = info.optim_cls([("table", parameter)])
    parameter.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match="table has a sparse gradient"):
        optimizer.step()


KINDS = ("0-d", "one entry", "strided", "columns", "transposed", "channels last", "permuted", "inner part")


def _view(kind: str) -> Tensor:
    """A tensor of one of :data:`KINDS`, most of them without some of the entries that lie between theirs."""
    data = torch.arange(2 * 6 * 4 * 4, dtype=torch.float32).sin().reshape(2, 6, 4, 4)
    views = {
        "0-d": data[0, 0, 0, 1],
        "one entry": data[:1, :1, 0, 1],
        "strided": data.flatten()[::2],
        "columns": data.reshape(12, 16)[:, ::2],
        "transposed": data.reshape(12, 16).t(),
        "channels last": data.contiguous(memory_format=torch.channels_last),
        "permuted": data.permute(3, 1, 0, 2),
        "inner part": data[:, 1:5, 1:, 1:],
    }
    return views[kind]


@pytest.mark.parametrize("kind", KINDS)
@every_set
def test_strides_make_no_difference(
    info: OptimizerInfo, options: OptimizerInput, constraint: Constraint, kind: str
) -> None:
    """Fails when a step reads or writes a tensor's memory in another order than its entries, or beside them."""
    ours, theirs = nn.Parameter(_view(kind)), nn.Parameter(_view(kind).clone(memory_format=torch.contiguous_format))
    around = _around(ours)
    optimizers = [info.optim_cls([{"params": [p], "constraint": constraint}], lr=0.1) for p in (ours, theirs)]
    for step in range(3):
        gradient = (torch.arange(ours.numel()).float() + step).cos().reshape(ours.shape)
        ours.grad, theirs.grad = torch.empty_like(ours).copy_(gradient), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-6, atol=1e-7)
    assert_same(_around(ours), around)


def _around(parameter: Tensor) -> Tensor:
    """What lies in a tensor's memory beside its entries."""
    memory = torch.tensor([]).set_(parameter.detach().untyped_storage()).clone()
    memory.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset()).zero_()
    return memory
