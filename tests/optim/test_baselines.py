"""AdaGradSFW and ProjectedSGD: the published numbers, their sets, and the ways of a torch optimizer."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from sfw_dist import AdaGradSFW, KSparsePolytope, KSupportBall, LpBall, ProjectedSGD, Unconstrained, constrain
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = np.load(GOLDEN / "variants.npz")
TRAJECTORY = np.load(GOLDEN / "trajectory.npz")
SETS = {
    AdaGradSFW: (KSparsePolytope(k=4, radius=0.5), KSupportBall(k=4, radius=0.7), LpBall(2, radius=0.6)),
    ProjectedSGD: (LpBall(2, radius=0.6), LpBall(1, radius=0.9), LpBall(math.inf, radius=0.1)),
}
BOTH = pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.__name__)
Kind = type[AdaGradSFW] | type[ProjectedSGD]


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("adagradsfw", lambda groups: AdaGradSFW(groups, lr=1e-2, momentum=0.9, inner_steps=2, delta=1e-8)),
        ("projected_sgd", lambda groups: ProjectedSGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)),
    ],
)
def test_trajectory_is_the_published_one(
    key: str, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> None:
    """Twelve steps. Fails when S adds gradients instead of momenta, the quotient lacks lr, or momentum is damped."""
    parameters = [nn.Parameter(torch.from_numpy(TRAJECTORY[f"p0_{j}"]).clone()) for j in range(4)]
    groups = [{"params": [p], "constraint": LpBall(2, diameter=3 * float(p.detach().norm()))} for p in parameters]
    optimizer = make(groups)
    for step in range(12):
        for j, parameter in enumerate(parameters):
            parameter.grad = torch.from_numpy(TRAJECTORY[f"grads_{j}"][step])
        optimizer.step()
        for j, parameter in enumerate(parameters):
            expected = torch.from_numpy(PUBLISHED[f"{key}_p{j}"][step])
            torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 4), (3, 2, 3, 3), (30,), (7,))]


def optimizer(kind: Kind, **options: Any) -> torch.optim.Optimizer:
    """Three tensors in sets, and one that is free."""
    named = [(f"layer{i}.weight", p) for i, p in enumerate(parameters())]
    sets: tuple[Constraint, ...] = (*SETS[kind], Unconstrained())
    return kind([{"params": [n], "constraint": c} for n, c in zip(named, sets, strict=True)], **options)


def tensors(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in tensors(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in tensors(optimizer)]


@BOTH
def test_it_starts_and_stays_in_its_sets(kind: Kind) -> None:
    """Fails when a start outside is kept, or a step of a large rate leaves a set."""
    made = optimizer(kind, lr=3.0)
    for steps in (range(0), range(20)):
        for x, constraint in zip(train(made, steps), SETS[kind], strict=False):
            assert float(constraint.gauge(x)) <= 1 + 1e-6


@BOTH
def test_unconstrained_tensors_take_torchs_own_sgd(kind: Kind) -> None:
    """Fails when the tensors beside the constrained ones are trained by another rule, or without weight decay."""
    mine = optimizer(kind, lr=0.1, weight_decay=0.01)
    free = parameters()[-1]
    sgd = SGD([free], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(5):
        before = torch.Generator().manual_seed(step)
        free.grad = [torch.randn(p.shape, generator=before) for p in tensors(mine)][-1]
        sgd.step()
    torch.testing.assert_close(train(mine, range(5))[-1], free.detach())


def test_an_inner_step_ends_at_the_best_point_of_its_segment() -> None:
    """Fails when γ is not the minimiser: the quadratic model falls at another point between y and v."""
    p = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
    ball = LpBall(2, radius=1.0)
    made = AdaGradSFW([{"params": [p], "constraint": ball}], lr=0.5, momentum=0.0, inner_steps=1)
    start, g = p.detach().clone(), torch.tensor([0.2, 1.0, -0.4])
    p.grad = g
    made.step()
    v, metric = ball.lmo(g), g.abs()

    def model(y: torch.Tensor) -> float:
        return float(g @ (y - start) + (metric * (y - start) ** 2).sum() / (2 * 0.5))

    others = [model(start + t * (v - start)) for t in torch.linspace(0, 1, 101)]
    assert model(p.detach()) <= min(others) + 1e-6


@BOTH
def test_the_number_of_threads_does_not_matter(kind: Kind) -> None:
    """Fails when a sum is split by threads: ranks with unlike OMP_NUM_THREADS would drift apart."""
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        p = nn.Parameter(torch.randn(300, 333, generator=torch.Generator().manual_seed(0)))
        made = kind([{"params": [p], "constraint": LpBall(2, diameter=50.0)}], lr=0.1)
        found.append(train(made, range(3))[0])
    assert torch.equal(*found)


@BOTH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind: Kind, momentum: float) -> None:
    """Fails when AdaGrad's sums or the momentum are lost, or a set does not survive a file without code."""
    whole = train(optimizer(kind, lr=0.1, momentum=momentum), range(12))
    stopped = optimizer(kind, lr=0.1, momentum=momentum)
    halfway = train(stopped, range(6))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = optimizer(kind, lr=7.0, momentum=momentum)
    for parameter, x in zip(tensors(resumed), halfway, strict=True):
        parameter.data.copy_(x)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(train(resumed, range(6, 12)), whole, strict=True))


@BOTH
def test_schedulers_closures_and_frozen_tensors(kind: Kind) -> None:
    """Fails when it is no torch optimizer: a rate that is not followed, a loss not returned, a gradient demanded."""
    last = nn.Linear(5, 3)
    network = nn.Sequential(nn.Linear(6, 5), last)
    made = kind(constrain(network, LpBall(2, tau=3.0), unconstrained="norm_and_bias"), lr=0.1)
    scheduler = MultiStepLR(made, [1], 0.5)
    last.weight.requires_grad_(False)
    frozen = last.weight.detach().clone()

    def closure() -> float:
        made.zero_grad()
        loss: torch.Tensor = network(torch.ones(2, 6)).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = []
    for _ in range(8):
        losses.append(made.step(closure))
        scheduler.step()
    assert losses[-1] < losses[0] and torch.equal(last.weight, frozen)
    assert {group["lr"] for group in made.param_groups} == {0.05}


@BOTH
def test_step_hooks_fire_once(kind: Kind) -> None:
    """Fails when a step calls another optimizer's, and its hooks run twice."""
    fired: list[int] = []
    made = optimizer(kind)
    made.register_step_post_hook(lambda *_: fired.append(1))
    train(made, range(2))
    assert len(fired) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdaGradSFW(p, lr=-0.1), r"lr must be at least 0, got -0\.1"),
        (lambda p: AdaGradSFW(p, inner_steps=0), "inner_steps must be a whole number from 1, got 0: write 2"),
        (lambda p: AdaGradSFW(p, delta=0.0), r"delta must be > 0, got 0\.0: write 1e-8"),
        (lambda p: ProjectedSGD(p, momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
        (
            lambda p: ProjectedSGD([{"params": p, "constraint": LpBall(3, radius=1.0)}]),
            r"LpBall\(p=3\.0, radius=1\.0\) has no Euclidean projection: give ProjectedSGD LpBall\(2, …\)",
        ),
    ],
)
def test_a_bad_option_is_refused_in_one_line(make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(parameters())
    assert "\n" not in str(caught.value)


@BOTH
def test_what_it_cannot_take_is_refused_before_anything_moved(kind: Kind) -> None:
    """Fails when a sparse gradient ends in torch's traceback half-way, or momentum of another optimizer is taken."""
    table, other = nn.Embedding(7, 3, sparse=True), parameters()[0]
    made = kind([{"params": [("other", other), ("table", table.weight)], "constraint": LpBall(2, radius=1.0)}])
    before = other.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones_like(other)
    with pytest.raises(UserError, match=r"^table has a sparse gradient"):
        made.step()
    assert torch.equal(other.detach(), before)
    with pytest.raises(ValueError, match="another optimizer's"):
        made.load_state_dict(SGD([other, table.weight], lr=0.1).state_dict())


@pytest.mark.parametrize("kind", [AdaGradSFW, ProjectedSGD])
def test_a_rate_of_zero_leaves_a_tensor_where_it_is(kind: Any) -> None:
    """Fails when a warm-up that begins at 0 divides by it: weights become NaN."""
    p = nn.Parameter(torch.tensor([0.3, -0.2]))
    optimizer = kind([{"params": [p], "constraint": LpBall(2, radius=1.0)}], lr=0.0)
    p.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([0.3, -0.2]))
