"""The optimizer in one process: what a step does, for which tensors, and how it refuses bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError
from sfw_dist.optim.reference import sfw_step
from tests.support.chosen_gradients import (
    SETS,
    assert_all_equal,
    assert_near,
    every_set,
    mixed_groups,
    parameters,
    set_gradients,
    tensors,
    train,
)

RESCALES = {"gradient": 0.01, "fast_gradient": 0.02, "diameter": 0.3, "none": 0.05}  # with a suitable learning rate


# ---------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rescale", RESCALES)
@every_set
def test_fifty_steps_follow_the_reference(
    constraint: Constraint, rescale: Any, momentum: float, dtype: torch.dtype, rtol: float
) -> None:
    """A wrong sign, norm, momentum convention or rescale factor departs from Algorithm 1 within two steps."""
    p = parameters(dtype)[0]
    options = {"lr": RESCALES[rescale], "momentum": momentum, "rescale": rescale}
    optimizer = SFW([{"params": [("conv", p)], "constraint": constraint}], **options)
    theta, m = p.detach().clone(), None
    for step in range(50):
        set_gradients([p], step)
        optimizer.step()
        expected = sfw_step(theta, p.grad, m, constraint, **options)
        theta, m = expected.theta, expected.m
        assert_near(p.detach(), theta, rtol)
        statistics = (expected.gap, expected.gamma, expected.effective_lr)
        assert optimizer.statistics()["conv"] == pytest.approx(statistics, rel=10 * rtol)
        assert 0 < expected.gamma < 1, "the case would not tell the rescale rules apart"


@every_set
def test_a_thousand_steps_stay_in_the_set(constraint: Constraint) -> None:
    """Rounding must not carry a tensor out of the set: every step is a convex combination."""
    p = parameters()[1]
    optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.3)
    train(optimizer, range(1000))
    assert 0.1 < constraint.gauge(p) <= 1 + 1e-6


@pytest.mark.parametrize(("dtype", "excess"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@every_set
def test_an_infeasible_start_is_scaled_make_feasible(constraint: Constraint, dtype: torch.dtype, excess: float) -> None:
    """From outside the set no convex combination is sure to be inside. Only the length may change."""
    p = nn.Parameter((tensors(0)[0] * 100).to(dtype))
    start = p.detach().clone()
    SFW([{"params": [p], "constraint": constraint}])
    assert 1 - excess <= constraint.gauge(p) <= 1 + excess
    assert torch.cosine_similarity(p.detach().double().flatten(), start.double().flatten(), dim=0) > 1 - 1e-4


@every_set
def test_a_feasible_start_is_left_alone(constraint: Constraint) -> None:
    """Scaling every tensor to the boundary would undo the initializer."""
    p = nn.Parameter(tensors(0)[0] * 1e-3)
    start = p.detach().clone()
    SFW([{"params": [p], "constraint": constraint}])
    assert torch.equal(p, start)


def test_two_runs_are_bitwise_equal() -> None:
    assert_all_equal(train(SFW(mixed_groups(parameters()))), train(SFW(mixed_groups(parameters()))))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """Sums split between threads round differently; ranks with different OMP_NUM_THREADS would then drift apart."""
    sets = [KSparsePolytope(k_frac=0.05, radius=0.3), KSupportBall(k_frac=0.05, radius=9.0), LpBall(2, radius=99.0)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = parameters(dtype, [(150_007,)] * 4)
        groups = [{"params": [p], "constraint": c} for p, c in zip(params, [*sets, Unconstrained()], strict=True)]
        optimizer = SFW(groups, lr=0.1, weight_decay=5e-4)
        results.append((train(optimizer, range(2)), optimizer.statistics()))
    for moved, statistics in results[1:]:
        assert_all_equal(moved, results[0][0])
        assert statistics == results[0][1]


@pytest.mark.parametrize("groups", [lambda ps: ps, lambda ps: [{"params": ps, "constraint": Unconstrained()}]])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-2])
@pytest.mark.filterwarnings("ignore:no param group has a constraint")
def test_unconstrained_tensors_take_the_steps_of_sgd(
    groups: Callable[[list[nn.Parameter]], Any], momentum: float, weight_decay: float
) -> None:
    """So does a group that names no constraint. The momentum of SGD is a sum, not a mean, and takes weight decay."""
    ours, theirs = parameters(), parameters()
    optimizer = SFW(groups(ours), lr=0.05, momentum=momentum, weight_decay=weight_decay)
    sgd = torch.optim.SGD(theirs, lr=0.05, momentum=momentum, weight_decay=weight_decay)
    for step in range(30):
        for params, either in ((ours, optimizer), (theirs, sgd)):
            set_gradients(params, step)
            either.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.statistics() == {}


def test_groups_have_their_own_options() -> None:
    """The defaults must not override what a group says."""
    params = parameters()
    sets = [{"params": [p], "constraint": SETS["l2"]} for p in params]
    sets[0] |= {"lr": 0.25}
    sets[1] |= {"lr": 3.0, "rescale": "diameter"}
    optimizer = SFW(sets, lr=0.125, rescale="none")
    train(optimizer, range(1))
    gammas = [s.gamma for s in optimizer.statistics().values()]
    assert gammas == [0.25, pytest.approx(3.0 / 4.0), 0.125]


def test_the_step_size_is_at_most_one() -> None:
    """A longer step leaves the set; γ = 1 puts the tensor on the vertex."""
    params = parameters()
    optimizer = SFW([{"params": params, "constraint": SETS["k_sparse"]}], lr=1e6, momentum=0.0)
    train(optimizer, range(1))
    assert [s.gamma for s in optimizer.statistics().values()] == [1.0] * len(params)
    for p in params:
        torch.testing.assert_close(p.detach(), SETS["k_sparse"].lmo(p.grad))


def test_at_the_vertex_the_tensor_stays() -> None:
    """θ = v divides by a distance of 0."""
    p = nn.Parameter(SETS["k_sparse"].lmo(torch.ones(20)))
    vertex = p.detach().clone()
    optimizer = SFW([{"params": [p], "constraint": SETS["k_sparse"]}])
    p.grad = torch.ones(20)
    optimizer.step()
    assert torch.equal(p, vertex)
    assert optimizer.statistics()["group0.param0"] == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("rescale", RESCALES)
def test_a_zero_gradient_leaves_the_parameters_as_they_are(rescale: Any) -> None:
    """Every point minimizes ⟨v, 0⟩: a step with γ > 0 would pull the tensor to 0, and 0/0 is NaN."""
    params = parameters()
    optimizer = SFW(mixed_groups(params), lr=0.5, rescale=rescale)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_all_equal([p.detach() for p in params], start)
    assert set(optimizer.statistics().values()) == {(0.0, 0.0, 0.0)}


def test_statistics_before_the_first_step_are_zero() -> None:
    named = [("conv", parameters()[0]), ("fc", parameters()[1])]
    optimizer = SFW([{"params": named, "constraint": SETS["l2"]}])
    assert optimizer.statistics() == {"conv": (0.0, 0.0, 0.0), "fc": (0.0, 0.0, 0.0)}


# ------------------------------------------------------------------------------- which tensors, in which form


def test_a_parameter_without_gradient_is_untouched_and_its_first_gradient_is_its_first_step() -> None:
    """m ← 0.1·g in place of m ← g would make the first step of a late tensor too short (rescale=fast_gradient)."""
    late, early = parameters(shapes=[(20, 11)] * 2)
    groups = [{"params": [early, late], "constraint": SETS["l2"]}]
    optimizer = SFW(groups, lr=0.02, rescale="fast_gradient")
    start = late.detach().clone()
    for step in range(3):
        set_gradients([early], step)
        optimizer.step()
    assert torch.equal(late, start)
    assert optimizer.statistics()["group0.param1"] == (0.0, 0.0, 0.0)

    set_gradients([late], 7)
    optimizer.step()
    expected = sfw_step(start, late.grad, None, SETS["l2"], lr=0.02, momentum=0.9, rescale="fast_gradient")
    assert_near(late.detach(), expected.theta, 1e-6)


@pytest.mark.parametrize("constraint", [*SETS.values(), Unconstrained()], ids=[*SETS.keys(), "unconstrained"])
def test_the_memory_format_makes_no_difference(constraint: Constraint) -> None:
    """Entries taken in memory order instead of row-major order go to the wrong place, silently."""
    image, matrix = tensors(0, [(8, 6, 3, 3), (20, 11)])
    plain = [nn.Parameter(image.clone()), nn.Parameter(matrix.clone())]
    strided = [
        nn.Parameter(image.clone(memory_format=torch.channels_last)),
        nn.Parameter(matrix.t().contiguous().t()),
    ]
    assert not any(p.is_contiguous() for p in strided)
    trajectories = []
    for params in (plain, strided):
        optimizer = SFW([{"params": params, "constraint": constraint}], lr=0.1, weight_decay=1e-2)
        for step in range(5):
            set_gradients(params, step)
            for p in params:
                p.grad = torch.empty_like(p).copy_(p.grad)  # autograd gives a gradient its parameter's strides
            optimizer.step()
        trajectories.append([p.detach().contiguous() for p in params])
    assert strided[0].is_contiguous(memory_format=torch.channels_last)
    assert_all_equal(trajectories[1], trajectories[0])


def test_bfloat16_parameters_have_a_float32_momentum() -> None:
    """In bf16 the momentum would lose every gradient below 1/256 of it."""
    params = parameters(torch.bfloat16)
    optimizer = SFW(mixed_groups(params), lr=0.1)
    precise = [nn.Parameter(p.detach().float()) for p in params]
    other = SFW(mixed_groups(precise), lr=0.1)
    for step in range(20):
        set_gradients(params, step)
        for p, q in zip(params, precise, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
    for p, q in zip(params, precise, strict=True):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(*(o.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (other, q))))
        assert (p - q).norm() < 1e-2 * q.norm()


def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    p = parameters()[1]
    optimizer = SFW([{"params": [p], "constraint": SETS["l2"]}])
    start = p.detach().clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(float(start.square().sum()))
    assert not torch.equal(p, start)
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2, 0.1), [0.5, 0.5, 0.05, 0.05]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), [0.5, 0.25, 0.0, 0.25]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)), [0.5, 0.25, 0.5 / 3, 0.125]),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=4), None),  # moves momentum, too
    ],
    ids=["step", "cosine", "lambda", "one_cycle"],
)
def test_schedulers_set_the_step_size(schedule: Callable[[SFW], Any], expected: list[float] | None) -> None:
    """A learning rate copied at construction would ignore the schedule; one of 0 must be a step of length 0."""
    params = parameters()
    optimizer = SFW([{"params": params, "constraint": SETS["l2"]}], lr=0.5, rescale="none")
    scheduler = schedule(optimizer)
    for step in range(4):
        wanted = expected[step] if expected else optimizer.param_groups[0]["lr"]
        train(optimizer, range(step, step + 1))
        assert [s.gamma for s in optimizer.statistics().values()] == [pytest.approx(wanted)] * len(params)
        if step < 3:
            scheduler.step()


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", range(3), ids=["k_sparse", "l2", "unconstrained"])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_moved(position: int, bad: float) -> None:
    """One NaN in a top-K selection makes an arbitrary vertex, and then NaN weights, long before anyone looks."""
    named = [(f"layer{i}.weight", p) for i, p in enumerate(parameters())]
    sets: list[Constraint] = [SETS["k_sparse"], SETS["l2"], Unconstrained()]
    optimizer = SFW([{"params": [entry], "constraint": c} for entry, c in zip(named, sets, strict=True)])
    params = [p for _, p in named]
    start = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[position].grad.view(-1)[3] = bad
    with pytest.raises(UserError, match=rf"^the gradient of layer{position}\.weight is not finite.*$") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert_all_equal([p.detach() for p in params], start)


def test_a_sparse_gradient_is_refused_before_anything_moved() -> None:
    table, other = nn.Embedding(7, 3, sparse=True), parameters()[1]
    optimizer = SFW([{"params": [("other", other), ("table", table.weight)], "constraint": SETS["l2"]}])
    table(torch.tensor([1, 2])).sum().backward()
    set_gradients([other], 0)
    with pytest.raises(UserError, match=r"^table has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.count_nonzero(optimizer.state[other]["momentum_buffer"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"rescale": "gradeint"}, "rescale must be one of gradient, fast_gradient, diameter, none, got 'gradeint'"),
        ({"constraint": "k_sparse"}, "constraint must be a set such as KSparsePolytope, got 'k_sparse'"),
        ({"constraint": KSparsePolytope(k_frac=0.05, tau=15.0)}, r"bind it with constrain\(model, spec\)"),
        ({"params": [nn.Parameter(torch.ones(3) * 1j)]}, r"floating-point parameters, got torch\.complex64"),
        ({"params": [nn.Parameter(torch.ones(0, 5))]}, r"a parameter of shape \(0, 5\) has no entries"),
        (
            {"params": [nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]},
            "floating-point parameters, got torch.float8",
        ),
        (
            {"params": [nn.Parameter(torch.eye(2).to_sparse())]},
            "a parameter is sparse_coo: leave it out, or store it as",
        ),
    ],
)
def test_a_bad_group_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    group = {"params": parameters(), "constraint": SETS["l2"], **options}
    with pytest.raises(ValueError, match=message) as caught:
        SFW([group])
    assert "\n" not in str(caught.value)


def test_a_group_may_be_given_another_set_during_training() -> None:
    """A schedule of K or of the radius does so; the format of the vertices must follow."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}], rescale="none")
    p.grad = -torch.arange(30.0)
    optimizer.step()
    optimizer.param_groups[0]["constraint"] = KSparsePolytope(k=7, radius=0.5)
    optimizer.step()
    assert p.detach().count_nonzero() == 7 and p.detach().max() == 0.5


def test_after_a_gradient_that_was_not_finite_the_optimizer_steps_on() -> None:
    """NaN stayed in the momentum, and every later step blamed a gradient that was fine."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}], lr=0.1)
    p.grad = torch.full((30,), math.nan)
    with pytest.raises(UserError, match="not finite"):
        optimizer.step()
    p.grad = torch.arange(30.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    assert p.isfinite().all() and p.count_nonzero() == 3


@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient", "diameter", "none"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_rate_of_zero_leaves_a_tensor_where_it_is(rescale: Any, fused: bool) -> None:
    """Fails when the end of a linear schedule gives 0·∞ at a vertex, and "the gradient is not finite"."""
    p = nn.Parameter(torch.tensor([0.5, 0.0, 0.0]))
    group = {"params": [p], "constraint": KSparsePolytope(k=1, radius=0.5)}
    optimizer = SFW([group], lr=0.0, rescale=rescale, fused=fused)
    for gradient in ([-1.0, 0.5, 0.0], [0.0, -2.0, 1.0]):  # the first one's vertex is where p is
        p.grad = torch.tensor(gradient)
        optimizer.step()
        assert p.tolist() == [0.5, 0.0, 0.0]
        assert next(iter(optimizer.statistics().values())).gamma == 0
