"""Sets of filters and of low rank: against brute force over rows, and against numpy's SVD."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist import SFW, GroupKSupportBall, KSupportBall, LpBall, NuclearBall, SpectralKSupportBall, constrain
from sfw_dist.constraints import Constraint, constraint_from_spec
from sfw_dist.constraints.matrix import leading_by_powers, leading_exactly
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.optim.reference import sfw_step
from sfw_dist.optim.shard import Shard, step_cost
from sfw_dist.optim.sharding.dtensors import sharded_distributor
from tests.constraints.test_base import ROUNDING, k_support_norm

SETS: dict[str, Callable[[int, float], Constraint]] = {
    "group": lambda k, radius: GroupKSupportBall(k=k, radius=radius),
    "nuclear": lambda k, radius: NuclearBall(radius=radius),
    "nuclear by powers": lambda k, radius: NuclearBall(radius=radius, svd="power"),
    "spectral": lambda k, radius: SpectralKSupportBall(k=k, radius=radius),
    "spectral by powers": lambda k, radius: SpectralKSupportBall(k=k, radius=radius, svd="power"),
}
every_set = pytest.mark.parametrize("name", SETS)
spectral_sets = pytest.mark.parametrize("name", [name for name in SETS if name != "group"])
supports, radii = st.integers(1, 4), st.floats(1e-2, 1e2)
FILTERS = (6, 3, 2, 2)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """float64: normal, of low rank, or of small integers (ties, zero rows, repeated singular values); three scales."""
    rows, columns, seed = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    match draw(st.sampled_from(["normal", "low rank", "integers"])):
        case "normal":
            x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        case "low rank":
            left = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
            x = left @ torch.randn(1, columns, generator=generator, dtype=torch.float64)
        case _:
            x = torch.randint(-1, 2, (rows, columns), generator=generator).double()
    return scale * x


def singular_values(x: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.svd(x.numpy(), compute_uv=False))


def smallest_over_vertices(name: str, x: Tensor, k: int, radius: float) -> float:
    """``min ⟨v, x⟩``: over all choices of K rows, or by von Neumann's trace inequality."""
    if name == "group":
        subsets = itertools.combinations(range(len(x)), min(k, len(x)))
        return min(-radius * float(x[list(rows)].norm()) for rows in subsets)
    return -radius * float(singular_values(x)[: 1 if "nuclear" in name else k].norm())


def gauge_by_definition(name: str, x: Tensor, k: int, radius: float) -> float:
    if name == "group":
        return k_support_norm(x.norm(dim=1), k) / radius
    return k_support_norm(singular_values(x), 1 if "nuclear" in name else k) / radius


# The oracle


@every_set
@given(x=matrices(), k=supports, radius=radii)
def test_no_vertex_beats_the_lmo(name: str, x: Tensor, k: int, radius: float) -> None:
    """Other rows than the K largest, other singular vectors than the leading ones, a wrong sign or scale."""
    value = float((SETS[name](k, radius).lmo(x) * x).sum())
    assert value == pytest.approx(smallest_over_vertices(name, x, k, radius), rel=1e-9, abs=1e-9)


@every_set
@given(x=matrices(), k=supports, radius=radii)
def test_no_random_point_of_the_set_beats_the_lmo(name: str, x: Tensor, k: int, radius: float) -> None:
    """LMO and gauge disagree on the set: a point of gauge 1 has a smaller inner product."""
    constraint = SETS[name](k, radius)
    value = float((constraint.lmo(x) * x).sum())
    for point in torch.randn(10, *x.shape, dtype=torch.float64):
        for candidate in (point / constraint.gauge(point), constraint.lmo(point)):
            assert value <= float((candidate * x).sum()) + 1e-9 * abs(value)


@every_set
@given(x=matrices(), k=supports, radius=radii)
def test_the_lmo_answers_with_a_vertex(name: str, x: Tensor, k: int, radius: float) -> None:
    """Outside the set, of more rows or rank than K, or shorter than r although x is not 0."""
    constraint = SETS[name](k, radius)
    vertex = constraint.lmo(x)
    length = radius if x.any() else 0.0
    assert float(vertex.norm()) == pytest.approx(length, rel=1e-9)
    assert float(constraint.gauge(vertex)) == pytest.approx(length / radius, abs=1e-6)
    if name == "group":
        assert int(vertex.any(1).sum()) <= k
    else:
        assert int((singular_values(vertex) > 1e-12 * radius).sum()) <= (1 if "nuclear" in name else k)


def test_ties_go_to_the_lowest_row() -> None:
    """Otherwise the answer depends on the device and the number of threads."""
    x = torch.tensor([[0.0, 1.0], [3.0, 4.0], [-5.0, 0.0], [4.0, 3.0]])
    vertex = GroupKSupportBall(k=2, radius=math.sqrt(50.0)).lmo(x)
    torch.testing.assert_close(vertex, torch.tensor([[0.0, 0.0], [-3.0, -4.0], [5.0, 0.0], [0.0, 0.0]]))


@spectral_sets
def test_equal_singular_values_have_one_answer(name: str) -> None:
    """Of an identity every direction leads: the choice may be any, but not another in the next step."""
    constraint = SETS[name](2, 3.0)
    first = constraint.lmo(torch.eye(5))
    assert float(first.diagonal().sum()) == pytest.approx(-3.0 if "nuclear" in name else -3.0 * math.sqrt(2))
    assert torch.equal(first, constraint.lmo(torch.eye(5)))


def test_groups_are_whole_filters_of_a_convolution() -> None:
    """Entries of all filters instead: nothing to remove as a filter."""
    x = torch.randn(FILTERS)
    vertex = GroupKSupportBall(k=2, radius=1.0).lmo(x)
    kept = x.flatten(1).norm(dim=1).topk(2).indices.sort().values
    assert vertex.flatten(1).any(1).nonzero().view(-1).tolist() == kept.tolist()
    torch.testing.assert_close(vertex[kept], -x[kept] / x[kept].norm())


def test_a_convolution_is_a_matrix_of_its_filters() -> None:
    """Batched over the kernel's places instead, "rank 1" would be of each slice."""
    x = torch.randn(FILTERS, dtype=torch.float64)
    u, _, vh = np.linalg.svd(x.flatten(1).numpy(), full_matrices=False)
    expected = torch.from_numpy(-np.outer(u[:, 0], vh[0])).view(FILTERS)
    torch.testing.assert_close(NuclearBall(radius=1.0).lmo(x), expected)


@pytest.mark.parametrize("shape", [(), (1,), (9,)])
def test_one_dimension_is_entries_or_a_column(shape: tuple[int, ...]) -> None:
    """Biases and scales: each entry a group; a column has one singular value, its length."""
    x = torch.randn(shape)
    pairs: list[tuple[Constraint, Constraint]] = [
        (GroupKSupportBall(k=3, radius=2.0), KSupportBall(k=3, radius=2.0)),
        (NuclearBall(radius=2.0), LpBall(2, radius=2.0)),
        (SpectralKSupportBall(k=3, radius=2.0), LpBall(2, radius=2.0)),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine.lmo(x), other.lmo(x))
        torch.testing.assert_close(mine.gauge(x), other.gauge(x))


@every_set
def test_zero_is_answered_with_zero(name: str) -> None:
    """0/0 in the scale makes NaN."""
    x = torch.zeros(FILTERS)
    assert torch.equal(SETS[name](3, 2.0).lmo(x), x)
    assert float(SETS[name](3, 2.0).gauge(x)) == 0


@every_set
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_answered_with_nan(name: str, value: float) -> None:
    """Factorizations raise on NaN, on the tensor's owner alone: the other ranks would wait for it for ever."""
    x = torch.randn(4, 5)
    x[2, 3] = value
    constraint = SETS[name](2, 2.0)
    assert constraint.lmo(x).isnan().any()
    assert not constraint.gauge(x).isfinite()


@every_set
def test_memory_format_does_not_matter(name: str) -> None:
    """Rows count in the shape's order, also where memory does not: channels_last, transposed, strided."""
    constraint = SETS[name](2, 2.0)
    image = torch.randn(2, 3, 4, 5)
    for view in (image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), image[:, :, ::2, 1:]):
        assert torch.equal(constraint.lmo(view), constraint.lmo(view.contiguous()))
        assert torch.equal(constraint.gauge(view), constraint.gauge(view.contiguous()))


@every_set
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_type_gives_the_float64_answer(name: str, dtype: torch.dtype) -> None:
    """The vertex has x's type and the float64 vertex's value; the gauge is always float64."""
    constraint = SETS[name](3, 2.0)
    x = torch.randn(FILTERS).to(dtype)
    vertex = constraint.lmo(x)
    assert vertex.dtype == dtype and vertex.shape == x.shape
    torch.testing.assert_close(vertex.double(), constraint.lmo(x.double()), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert constraint.gauge(x).dtype == torch.float64
    torch.testing.assert_close(constraint.gauge(x), constraint.gauge(x.double()), rtol=1e-12, atol=0)


@every_set
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float32, 1e30), (torch.float32, 1e-38), (torch.float64, 1e100)], ids=str
)
def test_huge_and_tiny_gradients_have_the_same_vertex(name: str, dtype: torch.dtype, magnitude: float) -> None:
    """Squares overflow or vanish: the vertex depends on x's direction only."""
    constraint = SETS[name](2, 50.0)
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.5, 1.0], [0.2, 0.1, 0.0]], dtype=dtype)
    torch.testing.assert_close(constraint.lmo(x * magnitude), constraint.lmo(x), rtol=1e-5, atol=1e-5)


# Singular vectors by powers


@pytest.mark.parametrize("k", [1, 3, 20])
def test_powers_miss_little_of_pure_noise(k: int) -> None:
    """Its singular values lie close together, so that powers tell them apart the least."""
    x = torch.randn(300, 700, dtype=torch.float64)
    exact = (leading_exactly(x, k).T @ x).norm()
    powers = (leading_by_powers(x, k).T @ x).norm()
    assert (1 - 0.02) * exact <= powers <= exact * (1 + 1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_powers_find_what_stands_out(k: int) -> None:
    """As gradients do: a few directions above noise, found to rounding."""
    signal = torch.randn(200, 3, dtype=torch.float64) @ torch.randn(3, 400, dtype=torch.float64)
    x = signal + 0.1 * torch.randn(200, 400, dtype=torch.float64)
    u = np.linalg.svd(x.numpy(), full_matrices=False)[0][:, :k]
    found = leading_by_powers(x, k)
    torch.testing.assert_close(found @ found.T, torch.from_numpy(u @ u.T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [leading_exactly, leading_by_powers])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_vectors_of_a_matrix_of_low_rank_are_orthonormal(method: Callable[[Tensor, int], Tensor], rank: int) -> None:
    """Its powers depend on one another: were U not orthonormal, the vertex would lie outside the set."""
    left, right = torch.zeros(80, 3, dtype=torch.float64), torch.randn(3, 90, dtype=torch.float64)
    left[:rank, :rank] = torch.eye(rank)
    u = method(left @ right, 5)
    assert u.shape == (80, 5)
    torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(u @ (u.T @ left), left, rtol=0, atol=1e-7)


def test_the_random_block_is_the_same_and_leaves_the_random_state_alone() -> None:
    """Another block on another rank or in another step is another answer; a draw from the global state moves data."""
    x, before = torch.randn(64, 200, dtype=torch.float64), torch.get_rng_state()
    assert torch.equal(leading_by_powers(x, 2), leading_by_powers(x, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_large_matrices_go_by_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors of a Gram matrix are cubic in its side: minutes a step for an embedding."""
    monkeypatch.setattr("sfw_dist.constraints.matrix._LARGEST_EXACT", 200)
    x = torch.randn(210, 300)
    auto, powers, exact = (SpectralKSupportBall(k=2, radius=1.0, svd=svd).lmo(x) for svd in ("auto", "power", "exact"))
    assert torch.equal(auto, powers) and not torch.equal(auto, exact)
    many = [SpectralKSupportBall(k=20, radius=1.0, svd=svd).lmo(x) for svd in ("auto", "exact")]
    assert torch.equal(*many)


# Gauge, size, K


@every_set
@given(x=matrices(), k=supports, radius=radii)
def test_gauge_is_that_of_the_definition(name: str, x: Tensor, k: int, radius: float) -> None:
    """A feasible start and every check of feasibility hang on it."""
    expected = gauge_by_definition(name, x, k, radius)
    assert float(SETS[name](k, radius).gauge(x)) == pytest.approx(expected, rel=1e-7, abs=1e-10)


@every_set
@given(x=matrices(), k=supports, factor=st.floats(-1e3, 1e3), seed=st.integers(0, 2**32 - 1))
def test_gauge_is_a_norm(name: str, x: Tensor, k: int, factor: float, seed: int) -> None:
    """Homogeneous and subadditive; else the sets are not convex or not symmetric."""
    gauge = SETS[name](k, 1.5).gauge
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(gauge(factor * x)) == pytest.approx(abs(factor) * float(gauge(x)), rel=1e-9, abs=1e-12)
    assert float(gauge(x + y)) <= float(gauge(x) + gauge(y)) * (1 + 1e-12)


@every_set
def test_diameter_is_the_largest_distance(name: str) -> None:
    """No pair of vertices is farther apart, and a vertex and its opposite are as far."""
    constraint = SETS[name](2, 0.8)
    vertices = torch.stack([constraint.lmo(x) for x in torch.randn(60, 4, 5, dtype=torch.float64)]).flatten(1)
    assert float(torch.pdist(vertices).max()) <= constraint.diameter(20) * (1 + 1e-12)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert float((constraint.lmo(x) - constraint.lmo(-x)).norm()) == pytest.approx(constraint.diameter(20))


@every_set
def test_a_set_of_given_diameter_has_it(name: str) -> None:
    """The radius follows from D, by itself and through ``tau``: D = 2·τ·E‖W‖."""
    shape = {key: value for key, value in SETS[name](5, 1.0).spec().items() if key != "radius"}
    by_diameter = constraint_from_spec({**shape, "diameter": 9.0})
    assert by_diameter.diameter(20) == pytest.approx(9.0)
    assert by_diameter.bind(20, 123.0).diameter(20) == pytest.approx(9.0)
    assert constraint_from_spec({**shape, "tau": 15.0}).bind(20, 0.3).diameter(20) == pytest.approx(9.0)


def test_k_is_a_fraction_of_rows_or_rank_also_after_binding() -> None:
    """Of the entries instead: 5 % of 18,432 entries are more than all 64 filters."""
    filters = torch.Size((64, 32, 3, 3))
    for spec in (GroupKSupportBall(k_frac=0.1, k_min=2, tau=15.0), SpectralKSupportBall(k_frac=0.1, k_min=2, tau=15.0)):
        bound = spec.bind(filters.numel(), 1.0).spec()
        assert bound == {key: value for key, value in spec.spec().items() if key != "tau"} | {"radius": 15.0}
    group = GroupKSupportBall(k_frac=0.1, k_min=2, tau=15.0).bind(filters.numel(), 1.0)
    assert group.nonzeros(filters) == 6 * 288 and group.nonzeros(torch.Size((3, 7))) == 2 * 7
    spectral = SpectralKSupportBall(k_frac=0.1, k_min=2, tau=15.0).bind(filters.numel(), 1.0)
    assert isinstance(spectral, SpectralKSupportBall)
    assert (spectral.rank(filters), spectral.rank(torch.Size((40, 9))), spectral.rank(torch.Size((9,)))) == (6, 2, 1)


@pytest.mark.parametrize("svd", ["auto", "exact", "power"])
def test_plain_values_bring_back_an_equal_set(svd: Any) -> None:
    """State dicts and the check between ranks hold the values."""
    sets: list[Constraint] = [
        GroupKSupportBall(k_frac=0.2, k_min=3, radius=1.0),
        NuclearBall(tau=15.0, svd=svd),
        SpectralKSupportBall(k=3, diameter=2.0, svd=svd),
    ]
    for constraint in sets:
        again = constraint_from_spec(json.loads(json.dumps(constraint.spec(), allow_nan=False)))
        assert type(again) is type(constraint) and again == constraint and hash(again) == hash(constraint)
        assert eval(repr(constraint)) == constraint
    assert NuclearBall(radius=1.0) != NuclearBall(radius=1.0, svd="exact")


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: NuclearBall(radius=1.0, svd="fast"), "'fast'"),  # type: ignore[arg-type]
        (lambda: NuclearBall(), "{}"),
        (lambda: GroupKSupportBall(k_frac=5.0, tau=15.0), "5.0"),
        (lambda: SpectralKSupportBall(tau=15.0), "k=None"),
        (lambda: SpectralKSupportBall(k=2, tau=15.0).lmo(torch.ones(3, 3)), "tau=15.0"),
        (lambda: NuclearBall(radius=1.0).project(torch.ones(3, 3)), "has no projection: use lmo"),
    ],
)
def test_errors_are_one_line_with_the_value(make: Callable[[], object], value: str) -> None:
    """A wrong size that is accepted trains the wrong network without a word."""
    with pytest.raises(ValueError) as error:
        make()
    assert value in str(error.value) and "\n" not in str(error.value)


# Steps


def optimizer_of(constraint: Constraint, dtype: torch.dtype, **options: Any) -> tuple[SFW, nn.Parameter]:
    p = nn.Parameter((0.1 * torch.randn(FILTERS, generator=torch.Generator().manual_seed(0))).to(dtype))
    return SFW([{"params": [("conv", p)], "constraint": constraint}], **options), p


def set_gradient(p: nn.Parameter, step: int) -> None:
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + step))
    p.grad = (0.1 * torch.arange(p.numel()).sin().view(p.shape) + 0.1 * noise).to(p.dtype)


@every_set
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient"])
def test_thirty_steps_follow_the_reference(
    name: str, momentum: float, dtype: torch.dtype, rtol: float, rescale: Any
) -> None:
    """A vertex from the flat momentum, of which every entry is a row, departs from Algorithm 1 in the first step."""
    options = {"lr": 0.02, "momentum": momentum, "rescale": rescale}
    constraint = SETS[name](2, 1.5)
    optimizer, p = optimizer_of(constraint, dtype, **options)
    theta, m = p.detach().clone(), None
    for step in range(30):
        set_gradient(p, step)
        optimizer.step()
        assert p.grad is not None
        expected = sfw_step(theta, p.grad, m, constraint, **options)
        theta, m = expected.theta, expected.m
        tolerance = rtol * float(theta.abs().max())
        torch.testing.assert_close(p.detach().double(), theta, rtol=rtol, atol=tolerance)
        told = (expected.gap, expected.gamma, expected.effective_lr)
        assert optimizer.statistics()["conv"] == pytest.approx(told, rel=10 * rtol)
        assert 0 < expected.gamma < 1


@every_set
def test_a_thousand_steps_stay_in_the_set(name: str) -> None:
    """Rounding must not carry a tensor out of the set, and a start outside of it is scaled in."""
    constraint = SETS[name](2, 1.5)
    optimizer, p = optimizer_of(constraint, torch.float32, lr=0.3)
    with torch.no_grad():
        p.mul_(100)
    optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.3)
    assert constraint.gauge(p) == pytest.approx(1, abs=1e-5)
    for step in range(1000):
        set_gradient(p, step)
        optimizer.step()
    assert 0.1 < constraint.gauge(p) <= 1 + 1e-5


@every_set
def test_channels_last_takes_the_same_steps(name: str) -> None:
    """A convolution kept in another memory format must keep its filters together."""
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        optimizer, p = optimizer_of(SETS[name](2, 1.5), torch.float32, lr=0.1)
        p.data = p.data.to(memory_format=memory_format)
        for step in range(5):
            set_gradient(p, step)
            optimizer.step()
        assert p.is_contiguous(memory_format=memory_format)
        ends.append(p.detach().contiguous())
    assert torch.equal(*ends)


@every_set
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_anything_moved(name: str, value: float) -> None:
    """An error out of the SVD names no tensor, and is raised by one rank of many."""
    optimizer, p = optimizer_of(SETS[name](2, 1.5), torch.float32)
    before = p.detach().clone()
    set_gradient(p, 0)
    assert p.grad is not None
    p.grad[1, 2, 0, 1] = value
    with pytest.raises(UserError, match=r"^the gradient of conv is not finite"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_filters_travel_sparse() -> None:
    """K filters need K times their size on the wire; room for all entries would be as much as the parameters."""
    p, group = nn.Parameter(torch.zeros(64, 32, 3, 3)), {"momentum": 0.9}
    slot = Shard.of("conv", p, group, GroupKSupportBall(k=6, radius=1.0), 0, p.numel())
    assert slot.codec.nbytes < 24 + p.numel() / 8 + 4 * 6 * 288 + 16
    dense = Shard.of("conv", p, group, NuclearBall(radius=1.0), 0, p.numel())
    assert dense.codec.layout == "all"


def test_the_plan_knows_that_singular_vectors_cost_more() -> None:
    """Counted as other tensors, the rank that owns the largest convolution would hold up all others."""
    large, thin = torch.Size((512, 512, 3, 3)), torch.Size((8, 512 * 512 * 9 // 8))
    sparse, nuclear = KSupportBall(k=3, radius=1.0), NuclearBall(radius=1.0)
    assert step_cost(large, nuclear) > 5 * step_cost(large, sparse)
    assert step_cost(thin, nuclear) < 2 * step_cost(thin, sparse)
    assert step_cost(torch.Size((4096, 4096)), NuclearBall(radius=1.0, svd="exact")) > 5 * step_cost(
        torch.Size((4096, 4096)), nuclear
    )


@every_set
def test_tensors_of_which_no_rank_has_all_are_refused(name: str) -> None:
    """A rank would take the rows and singular values of its part for the tensor's."""
    p = nn.Parameter(torch.zeros(4, 5))
    shard = Shard.of("weight", p, {"momentum": 0.9}, SETS[name](2, 1.0), 0, 20)
    with pytest.raises(ValueError, match="of weight has an LMO that needs the whole tensor: keep that tensor whole"):
        sharded_distributor([shard], RankGroup.alone())


@every_set
def test_a_network_learns_in_the_set(name: str) -> None:
    """The whole of it: ``constrain`` binds by shape-free size, and the loss falls."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5))
    spec = {key: value for key, value in SETS[name](4, 1.0).spec().items() if key != "radius"}
    groups = constrain(net, constraint_from_spec({**spec, "tau": 5.0}))
    optimizer = SFW(groups, lr=0.1)
    inputs = torch.randn(64, 12)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), inputs[:, :5].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    for group in optimizer.param_groups:
        assert all(group["constraint"].gauge(p) <= 1 + 1e-5 for p in group["params"])
