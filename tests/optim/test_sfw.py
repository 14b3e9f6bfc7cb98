"""The optimizer in one process: what a step does, what torch expects of an optimizer, and how it refuses bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained, constrain
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError
from sfw_dist.optim.reference import sfw_step

SETS = {
    "k_sparse": KSparsePolytope(k=9, radius=0.3),
    "k_support": KSupportBall(k=9, radius=1.5),
    "l2": LpBall(2, radius=2.0),
    "linf": LpBall(math.inf, radius=0.2),
}
RESCALES = {"gradient": 0.01, "fast_gradient": 0.02, "diameter": 0.3, "none": 0.05}  # with a suitable learning rate
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


def test_frozen_parameters_stay_and_do_not_shift_the_others() -> None:
    """A constraint counted off per gradient, not per parameter, would go to the wrong tensor behind a frozen one."""
    frozen, first, second = parameters(shapes=[(5,), (20, 11), (17,)])
    frozen.requires_grad_(False)
    start = frozen.detach().clone()
    sets = [SETS["l2"], SETS["k_sparse"], SETS["linf"]]
    groups = [{"params": [p], "constraint": c} for p, c in zip([frozen, first, second], sets, strict=True)]
    alone = parameters(shapes=[(5,), (20, 11), (17,)])[1:]
    other = SFW([{"params": [p], "constraint": c} for p, c in zip(alone, sets[1:], strict=True)])
    optimizer = SFW(groups)
    for step in range(5):
        set_gradients([first, second], step)
        set_gradients(alone, step)
        optimizer.step()
        other.step()
    assert torch.equal(frozen, start)
    assert_all_equal([first.detach(), second.detach()], [p.detach() for p in alone])


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


# ----------------------------------------------------------------------------------------- torch's machinery


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


def test_zero_grad() -> None:
    params = parameters()
    optimizer = SFW(mixed_groups(params))
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_step_hooks_run_around_the_step() -> None:
    """Profilers and trainers hang on these; a hook that sees no parameters would be called at the wrong place."""
    p = parameters()[1]
    start = p.detach().clone()
    optimizer = SFW([{"params": [p], "constraint": SETS["l2"]}])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", torch.equal(p, start))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", torch.equal(p, start))))
    train(optimizer, range(1))
    assert seen == [("before", True), ("after", False)]


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


def test_grad_scaler_unscales_and_skips() -> None:
    """With gradients of infinity nothing moves, momentum neither; otherwise the scale has no effect."""
    params, plain = parameters(), parameters()
    optimizer, other = SFW(mixed_groups(params), lr=0.1), SFW(mixed_groups(plain), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(factor: float) -> None:
        set_gradients(params, 0)
        gradients = [p.grad for p in params]
        optimizer.zero_grad()
        scaler.scale(sum((p * g).sum() * factor for p, g in zip(params, gradients, strict=True))).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(1.0)
    expected = train(other, range(1))
    assert_all_equal([p.detach() for p in params], expected)  # a scale that is a power of two is exact

    momentum = copy.deepcopy([s["momentum_buffer"] for s in optimizer.state.values()])
    scaled_step(math.inf)
    assert scaler.get_scale() == 512.0
    assert_all_equal([p.detach() for p in params], expected)
    assert_all_equal([s["momentum_buffer"] for s in optimizer.state.values()], momentum)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_trains_on(duplicate: Callable[[Any], Any]) -> None:
    """torch's own pickling keeps groups and state only; the copy must follow the original, and not move it."""
    optimizer = SFW(mixed_groups(parameters()))
    train(optimizer)
    twin = duplicate(optimizer)
    assert twin.statistics() == optimizer.statistics()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    on = range(10, 15)
    continued = train(twin, on)
    assert_all_equal([p.detach() for group in optimizer.param_groups for p in group["params"]], before)
    assert_all_equal(train(optimizer, on), continued)
    twin.param_groups[0]["lr"] = 1e6
    train(twin, range(1))
    assert next(iter(twin.statistics().values())).gamma == 1.0


# ------------------------------------------------------------------------------------------------------ state


def test_torchs_own_state_dicts_load() -> None:
    """Fails when state that torch.distributed.checkpoint keys by name is looked up by number, and not found."""
    models = [nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)) for _ in range(2)]
    first, second = (SFW(constrain(model, KSparsePolytope(k=4, tau=15.0)), lr=0.1) for model in models)
    train(first)
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert second.state[q]["step"] == 10
        assert torch.equal(first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"])


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that may hold no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype: torch.dtype, momentum: float) -> None:
    """torch's own load_state_dict would cast the float32 momentum of a bf16 parameter to bf16."""
    uninterrupted = train(SFW(mixed_groups(parameters(dtype)), lr=0.1, momentum=momentum), range(20))

    stopped = SFW(mixed_groups(parameters(dtype)), lr=0.1, momentum=momentum)
    halfway = train(stopped, range(10))
    state = saved_and_loaded(stopped.state_dict())
    resumed = SFW(mixed_groups([nn.Parameter(x.clone()) for x in halfway]), lr=7.0, momentum=momentum)
    resumed.load_state_dict(state)
    assert_all_equal(train(resumed, range(10, 20)), uninterrupted)


def test_a_loaded_state_is_a_copy() -> None:
    """Two optimizers that share a momentum tensor would both add to it."""
    optimizer = SFW(mixed_groups(parameters()))
    train(optimizer)
    twin = SFW(mixed_groups([nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]))
    twin.load_state_dict(optimizer.state_dict())
    continued = train(twin, range(10, 12))
    assert_all_equal(train(optimizer, range(10, 12)), continued)


def test_a_state_brings_its_constraint() -> None:
    """As in torch: the groups' options become those that were saved."""
    wide = KSparsePolytope(k=9, radius=50.0)
    saved = SFW([{"params": parameters(), "constraint": wide}], lr=0.1)
    loading = SFW([{"params": parameters(), "constraint": SETS["l2"]}], lr=0.2)
    loading.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert loading.param_groups[0]["constraint"] == wide
    assert loading.param_groups[0]["lr"] == 0.1
    start = [nn.Parameter(p.detach().clone()) for p in loading.param_groups[0]["params"]]
    same = SFW([{"params": start, "constraint": wide}], lr=0.1)
    assert_all_equal(train(loading), train(same))


def keys(state: dict[str, Any]) -> Any:
    return {i: sorted(entries) for i, entries in state["state"].items()}, [sorted(g) for g in state["param_groups"]]


def test_a_fresh_state_has_the_keys_of_later_ones() -> None:
    """Distributed checkpoints are loaded into the fresh optimizer's tensors: what is not there is not read."""
    optimizer = SFW(mixed_groups(parameters()))
    fresh = keys(optimizer.state_dict())
    train(optimizer)
    assert keys(optimizer.state_dict()) == fresh
    assert fresh[0] == {i: ["momentum_buffer", "step"] for i in range(3)}


def test_a_state_of_another_shape_is_refused_whole() -> None:
    """Momentum of another shape would be broadcast. A refused state must leave the optimizer as it was."""
    shapes = [*SHAPES[:2], (18,)]
    other = SFW(mixed_groups(parameters(shapes=shapes)), lr=0.5)
    optimizer, untouched = SFW(mixed_groups(parameters())), SFW(mixed_groups(parameters()))
    train(optimizer), train(untouched)
    with pytest.raises(ValueError, match=r"momentum_buffer of group2\.param0 has shape \(18,\)"):
        optimizer.load_state_dict(other.state_dict())
    assert_all_equal(train(optimizer), train(untouched))


def test_a_state_of_other_groups_is_refused() -> None:
    other = SFW([{"params": parameters(), "constraint": SETS["l2"]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SFW(mixed_groups(parameters())).load_state_dict(other.state_dict())


def test_a_group_added_later_keeps_the_momentum_of_the_others() -> None:
    """Fine-tuning adds layers in the middle of a run."""
    old, alone, new = parameters(), parameters(), parameters(shapes=[(6, 5)])[0]
    optimizer, other = SFW(mixed_groups(old), lr=0.1), SFW(mixed_groups(alone), lr=0.1)
    train(optimizer), train(other)
    optimizer.add_param_group({"params": [new], "constraint": KSparsePolytope(k=3, radius=0.01)})
    assert KSparsePolytope(k=3, radius=0.01).gauge(new) <= 1 + 1e-6
    start = new.detach().clone()
    for step in range(10, 15):
        set_gradients([new], step)
        set_gradients(old, step)
        set_gradients(alone, step)
        optimizer.step()
        other.step()
    assert_all_equal([p.detach() for p in old], [p.detach() for p in alone])
    assert not torch.equal(new, start)


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


def test_a_momentum_that_a_scheduler_raises_from_zero_starts_with_the_gradient() -> None:
    """OneCycleLR cycles the momentum by default; a missing buffer was a KeyError in the middle of training."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}], lr=0.1, momentum=0.0)
    p.grad = torch.arange(30.0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("constraint", [KSparsePolytope(k=3, radius=1.0), Unconstrained()], ids=repr)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_momentum_that_a_scheduler_took_away_starts_anew(resumed: bool, constraint: Constraint, fused: bool) -> None:
    """The momentum of long ago came back, or not, as the run had been resumed in between or not."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.1, momentum=0.9, fused=fused)
    before = keys(optimizer.state_dict())
    for momentum, sign in ((0.9, 1.0), (0.9, 1.0), (0.0, 1.0), (0.0, 1.0), (0.9, -1.0)):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = sign * torch.arange(30.0)
        if resumed:
            state = saved_and_loaded(optimizer.state_dict())
            optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.1, momentum=0.9, fused=fused)
            optimizer.load_state_dict(state)
        optimizer.step()
        assert resumed or keys(optimizer.state_dict()) == before
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    optimizer.step()
    expected = p.grad * (1.9 if constraint == Unconstrained() else 1.0)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)


def test_the_state_of_another_optimizer_is_refused_in_one_line() -> None:
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}])
    with pytest.raises(ValueError, match="another optimizer's") as raised:
        optimizer.load_state_dict(torch.optim.SGD([p], lr=0.1).state_dict())
    assert "\n" not in str(raised.value)


def test_a_refused_group_is_not_kept() -> None:
    """It stayed in param_groups without a slot, and later state dicts disagreed with the parameters."""
    p, q = torch.nn.Parameter(torch.zeros(30)), torch.nn.Parameter(torch.zeros(3))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}])
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group({"params": [q], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 2


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
