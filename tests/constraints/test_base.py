"""Each set against its definition: by brute force over its vertices on small tensors, by random points on others."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.constraints import Constraint, KSparsePolytope, KSupportBall, LpBall, Unconstrained, constraint_from_spec

SETS: dict[str, Callable[[int, float], Constraint]] = {
    "k_sparse": lambda k, radius: KSparsePolytope(k=k, radius=radius),
    "k_support": lambda k, radius: KSupportBall(k=k, radius=radius),
    "l1": lambda k, radius: LpBall(1, radius=radius),
    "l1.5": lambda k, radius: LpBall(1.5, radius=radius),
    "l2": lambda k, radius: LpBall(2, radius=radius),
    "l3": lambda k, radius: LpBall(3, radius=radius),
    "linf": lambda k, radius: LpBall(math.inf, radius=radius),
}
PROJECTABLE = ("l1", "l2", "linf")
every_set = pytest.mark.parametrize("name", SETS)
every_projection = pytest.mark.parametrize("name", PROJECTABLE)

# Relative rounding error that a vertex may show in each type.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

supports = st.integers(1, 9)
radii = st.floats(1e-2, 1e2)


@st.composite
def tensors(draw: st.DrawFn, max_entries: int = 20) -> Tensor:
    """float64, one-dimensional: normal, or from a grid of seven values (ties and zeros), at magnitudes 1e-3 … 1e3."""
    n, seed = draw(st.integers(1, max_entries)), draw(st.integers(0, 2**32 - 1))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)
    return scale * torch.randint(-3, 4, (n,), generator=generator).double()


def sign_vectors(k: int) -> Iterator[Tensor]:
    for signs in itertools.product((-1.0, 1.0), repeat=k):
        yield torch.tensor(signs, dtype=torch.float64)


def smallest_over_vertices(name: str, x: Tensor, k: int, radius: float) -> float:
    """``min ⟨v, x⟩`` from the definition: a polytope's vertices, the k-support ball's supports, Hölder's inequality."""
    n = x.numel()
    subsets = [list(s) for s in itertools.combinations(range(n), min(k, n))]
    match name:
        case "k_sparse":
            return min(radius * float(s @ x[subset]) for subset in subsets for s in sign_vectors(len(subset)))
        case "k_support":
            return min(-radius * float(x[subset].norm()) for subset in subsets)
        case "l1":
            return min(sign * radius * float(entry) for entry in x for sign in (-1, 1))
        case "linf":
            return min(radius * float(s @ x) for s in sign_vectors(n))
        case _:
            p = float(name[1:])
            return -radius * float(np.linalg.norm(x.numpy(), p / (p - 1)))


def k_support_norm(x: Tensor, k: int) -> float:
    """``inf {Σ x_i²/w_i : 0 < w_i ≤ 1, Σ w_i ≤ k}^½`` (McDonald, Pontil, Stamos, 2014), by bisection on the multiplier.

    The minimum has ``w_i = min(1, |x_i|/t)``, with t such that ``Σ w_i = k``.
    """
    z = x.abs()[x != 0]
    if z.numel() <= k:
        return float(z.norm())
    low, high = 0.0, float(z.sum())
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if float((z / t).clamp(max=1).sum()) > k else (low, t)
    return math.sqrt(float((z.square() / (z / high).clamp(max=1)).sum()))


def gauge_by_definition(name: str, x: Tensor, k: int, radius: float) -> float:
    match name:
        case "k_sparse":
            return max(float(x.abs().max()), float(x.abs().sum()) / min(k, x.numel())) / radius
        case "k_support":
            return k_support_norm(x, k) / radius
        case _:
            return float(np.linalg.norm(x.numpy(), float(name[1:]))) / radius


def points_of(constraint: Constraint, n: int, count: int = 15) -> Tensor:
    """``(count, n)`` points of the set: random ones on its boundary, sparse ones too, and vertices."""
    dense = torch.randn(count, n, dtype=torch.float64)
    sparse = dense * (torch.rand(count, n) < 0.3)
    boundary = [x / constraint.gauge(x).clamp(min=1e-9) for x in torch.cat([dense, sparse])]
    vertices = [constraint.lmo(x) for x in torch.randn(count, n, dtype=torch.float64)]
    return torch.stack(boundary + vertices)


# The oracle


@every_set
@given(x=tensors(max_entries=6), k=supports, radius=radii)
def test_no_vertex_beats_the_lmo(name: str, x: Tensor, k: int, radius: float) -> None:
    """Wrong K entries, a wrong sign or a wrong scale: the value differs from that of the best of all vertices."""
    value = float(SETS[name](k, radius).lmo(x) @ x)
    assert value == pytest.approx(smallest_over_vertices(name, x, k, radius), rel=1e-9, abs=1e-12)


@every_set
@given(x=tensors(), k=supports, radius=radii)
def test_no_random_point_of_the_set_beats_the_lmo(name: str, x: Tensor, k: int, radius: float) -> None:
    """LMO and gauge disagree on the set: a point of gauge 1 has a smaller inner product."""
    constraint = SETS[name](k, radius)
    value = float(constraint.lmo(x) @ x)
    assert value <= float((points_of(constraint, x.numel()) @ x).min()) + 1e-9 * abs(value)


@every_set
@given(x=tensors(), k=supports, radius=radii)
def test_the_lmo_answers_with_a_point_of_the_set(name: str, x: Tensor, k: int, radius: float) -> None:
    """A vertex outside the set, or one inside although x is not 0."""
    constraint = SETS[name](k, radius)
    gauge = float(constraint.gauge(constraint.lmo(x)))
    assert gauge == pytest.approx(1.0 if x.any() else 0.0, abs=1e-6)


@every_set
@given(x=tensors(), k=supports, radius=radii)
def test_a_vertex_has_no_more_nonzeros_than_its_support(name: str, x: Tensor, k: int, radius: float) -> None:
    """The wire format reserves room for ``support(n)`` nonzeros in ascending order."""
    constraint = SETS[name](k, radius)
    indices, values = constraint.lmo_vertex(x)
    assert int(values.count_nonzero()) <= constraint.support(x.numel()) <= x.numel()
    if indices is None:
        assert values.shape == x.shape
    else:
        assert indices.dtype == torch.int64 and indices.shape == values.shape
        assert (indices.diff() > 0).all()
    if constraint.signs_only:
        assert set(values.abs().tolist()) <= {0.0, radius}


def test_ties_go_to_the_lowest_flat_index() -> None:
    """Otherwise the answer depends on the device and the number of threads."""
    x = torch.tensor([[0.5, -1.0], [1.0, 1.0]])
    assert KSparsePolytope(k=2, radius=3.0).lmo(x).tolist() == [[0, 3], [-3, 0]]
    assert KSupportBall(k=1, radius=3.0).lmo(x).tolist() == [[0, 3], [0, 0]]
    assert LpBall(1, radius=3.0).lmo(x).tolist() == [[0, 3], [0, 0]]


def test_fewer_nonzeros_than_k_give_fewer() -> None:
    """A zero of x must not become ±r (or −0): nothing says which sign."""
    x = torch.tensor([0.0, 3.0, -0.0, -4.0, 0.0])
    expected = {"k_sparse": [0, -5, 0, 5, 0], "k_support": [0, -3, 0, 4, 0], "linf": [0, -5, 0, 5, 0]}
    for name, vertex in expected.items():
        assert SETS[name](4, 5.0).lmo(x).tolist() == pytest.approx(vertex), name
    assert not SETS["k_sparse"](4, 5.0).lmo(x).signbit()[0::2].any()


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_k_of_all_entries_or_more(k: int) -> None:
    """A tensor smaller than K: the polytope is the L∞ ball, the k-support ball the L2 ball."""
    x = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    for sparse, dense in (
        (KSparsePolytope(k=k, radius=2.0), LpBall(math.inf, radius=2.0)),
        (KSupportBall(k=k, radius=2.0), LpBall(2, radius=2.0)),
    ):
        torch.testing.assert_close(sparse.lmo(x), dense.lmo(x))
        torch.testing.assert_close(sparse.gauge(x), dense.gauge(x))
        assert sparse.diameter(5) == pytest.approx(dense.diameter(5))


@every_set
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_one_entry(name: str, shape: tuple[int, ...]) -> None:
    """Every set of one entry is [−r, r]."""
    constraint = SETS[name](3, 2.0)
    x = torch.full(shape, -0.7)
    torch.testing.assert_close(constraint.lmo(x), torch.full(shape, 2.0))
    assert float(constraint.gauge(x)) == pytest.approx(0.35)
    assert constraint.diameter(1) == pytest.approx(4.0)


@every_set
def test_zero_is_answered_with_zero(name: str) -> None:
    """0/0 in the scale makes NaN."""
    constraint = SETS[name](3, 2.0)
    x = torch.zeros(2, 4)
    assert torch.equal(constraint.lmo(x), x)
    assert float(constraint.gauge(x)) == 0
    if name in PROJECTABLE:
        assert torch.equal(constraint.project(x), x)


@every_set
def test_nan_is_answered_with_nan(name: str) -> None:
    """A diverged network must not be mistaken for one with a small gradient: sign(NaN) is 0."""
    constraint = SETS[name](3, 2.0)
    x = torch.tensor([1.0, 2.0, math.nan, 3.0, 4.0])
    assert constraint.lmo(x).isnan().any()
    assert constraint.gauge(x).isnan()


@every_set
def test_memory_format_does_not_matter(name: str) -> None:
    """Indices count in the shape's order, also where memory does not: channels_last, transposed, strided."""
    constraint = SETS[name](7, 2.0)
    image = torch.randn(2, 3, 4, 5)
    for view in (image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), image[:, :, ::2, 1:]):
        assert not view.is_contiguous()
        contiguous = view.contiguous()
        assert torch.equal(constraint.lmo(view), constraint.lmo(contiguous))
        torch.testing.assert_close(constraint.gauge(view), constraint.gauge(contiguous), rtol=1e-14, atol=0)
        if name in PROJECTABLE:
            torch.testing.assert_close(constraint.project(view), constraint.project(contiguous), rtol=1e-6, atol=0)


@every_set
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_type_gives_the_float64_answer(name: str, dtype: torch.dtype) -> None:
    """The vertex has x's type and the float64 vertex's value; the gauge is always float64."""
    constraint = SETS[name](7, 2.0)
    x = torch.randn(6, 11).to(dtype)
    vertex = constraint.lmo(x)
    assert vertex.dtype == dtype and vertex.shape == x.shape
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(vertex.double(), constraint.lmo(x.double()), rtol=tolerance, atol=tolerance * 1e-1)
    assert constraint.gauge(x).dtype == torch.float64
    torch.testing.assert_close(constraint.gauge(x), constraint.gauge(x.double()), rtol=1e-12, atol=0)
    if name in PROJECTABLE:
        projected = constraint.project(x)
        assert projected.dtype == dtype
        expected = constraint.project(x.double())
        torch.testing.assert_close(projected.double(), expected, rtol=tolerance, atol=tolerance)


@every_set
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-38),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-38),
        (torch.float16, 3e4),
        (torch.float16, 1e-4),
        (torch.float64, 1e100),
        (torch.float64, 1e-100),
    ],
    ids=str,
)
def test_huge_and_tiny_gradients_have_the_same_vertex(name: str, dtype: torch.dtype, magnitude: float) -> None:
    """Squares overflow or vanish, and so does radius/‖x‖: the vertex depends on x's direction only."""
    constraint = SETS[name](3, 50.0)
    x = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=dtype)
    scaled = (x.double() * magnitude).to(dtype)
    tolerance = max(ROUNDING[dtype], 1e-6)
    torch.testing.assert_close(constraint.lmo(scaled), constraint.lmo(x), rtol=tolerance, atol=tolerance)
    expected = float(constraint.gauge(scaled.double() / magnitude)) * magnitude
    assert float(constraint.gauge(scaled)) == pytest.approx(expected, rel=1e-9)


def test_denormal_gradients_have_a_vertex() -> None:
    """``|x|/max|x|`` of an L_p ball in (1, ∞) must not divide by a magnitude that was flushed to 0."""
    x = torch.tensor([1e-42, -2e-42, 0.0])
    for p in (1.5, 2.0, 3.0):
        ball = LpBall(p, radius=1.0)
        assert float(ball.gauge(ball.lmo(x))) == pytest.approx(1, rel=1e-5)


# The gauge


@every_set
@given(x=tensors(), k=supports, radius=radii)
def test_gauge_is_that_of_the_definition(name: str, x: Tensor, k: int, radius: float) -> None:
    """A feasible start and every check of feasibility hang on it."""
    expected = gauge_by_definition(name, x, k, radius)
    assert float(SETS[name](k, radius).gauge(x)) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(x=tensors(), radius=radii)
def test_k_support_lies_between_l1_and_l2(x: Tensor, radius: float) -> None:
    """K = 1 is the L1 ball, K = n the L2 ball, and the balls grow with K."""
    gauges = [float(KSupportBall(k=k, radius=radius).gauge(x)) for k in range(1, x.numel() + 1)]
    assert gauges[0] == pytest.approx(float(x.abs().sum()) / radius)
    assert gauges[-1] == pytest.approx(float(x.norm()) / radius)
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(gauges))


@every_set
@given(x=tensors(), k=supports, radius=radii, factor=st.floats(-1e3, 1e3), seed=st.integers(0, 2**32 - 1))
def test_gauge_is_a_norm(name: str, x: Tensor, k: int, radius: float, factor: float, seed: int) -> None:
    """Homogeneous and subadditive; else the sets are not convex or not symmetric."""
    gauge = SETS[name](k, radius).gauge
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(gauge(factor * x)) == pytest.approx(abs(factor) * float(gauge(x)), rel=1e-9, abs=1e-12)
    assert float(gauge(x + y)) <= float(gauge(x) + gauge(y)) * (1 + 1e-12)


# Projections


@every_projection
@given(x=tensors(), radius=radii)
def test_no_point_of_the_set_is_nearer_than_the_projection(name: str, x: Tensor, radius: float) -> None:
    """Nearest exactly when ``⟨x − y, z − y⟩ ≤ 0`` for all z of the set: for the worst vertex, then."""
    ball = SETS[name](1, radius)
    y = ball.project(x)
    assert float(ball.gauge(y)) <= 1 + 1e-9
    worst = ball.lmo(y - x)
    assert float((x - y) @ (worst - y)) <= 1e-12 * float(x.norm()) * ball.diameter(x.numel())
    distances = (points_of(ball, x.numel()) - x).norm(dim=1)
    assert float((x - y).norm()) <= float(distances.min()) * (1 + 1e-9) + 1e-12


@every_projection
@given(x=tensors(), radius=radii)
def test_projecting_twice_is_projecting_once(name: str, x: Tensor, radius: float) -> None:
    """And a point of the set stays where it is."""
    ball = SETS[name](1, radius)
    y = ball.project(x)
    torch.testing.assert_close(ball.project(y), y, rtol=1e-9, atol=1e-12)
    inside = x / ball.gauge(x).clamp(min=1) * 0.9
    torch.testing.assert_close(ball.project(inside), inside, rtol=0, atol=0)


@every_projection
@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9, 1e30])
def test_projection_from_far_away_lands_in_the_set(name: str, magnitude: float) -> None:
    """In float32 ``|x| − threshold`` loses the radius beside ``|x|``; at 1e30 even float64 does."""
    ball = SETS[name](1, 1.0)
    for x in (magnitude + torch.rand(100), torch.tensor([magnitude, 0.0])):
        assert float(ball.gauge(ball.project(x))) <= 1 + 1e-6


def test_projection_in_float16_does_not_overflow() -> None:
    """A float16 tensor may be farther outside than float16 can say: 600,000 times here."""
    x = torch.full((1024,), 6e4, dtype=torch.float16)
    torch.testing.assert_close(LpBall(2, radius=3.2).project(x), torch.full_like(x, 0.1))


@pytest.mark.parametrize("name", sorted(SETS.keys() - set(PROJECTABLE)))
def test_sets_without_projection_say_so(name: str) -> None:
    """A silent wrong projection would be taken for one."""
    with pytest.raises(ValueError, match="has no projection: use lmo"):
        SETS[name](2, 1.0).project(torch.ones(4))


# Diameter, size and K


@every_set
@pytest.mark.parametrize("n", [1, 7, 64])
def test_diameter_is_the_largest_distance(name: str, n: int) -> None:
    """No pair of vertices is farther apart, and ±(the longest vertex) is as far."""
    constraint = SETS[name](5, 0.8)
    vertices = torch.stack([constraint.lmo(x) for x in torch.randn(200, n, dtype=torch.float64)])
    diameter = constraint.diameter(n)
    assert float(torch.pdist(vertices).max()) <= diameter * (1 + 1e-12)
    even, first = torch.ones(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)[0]
    farthest = max(float((constraint.lmo(x) - constraint.lmo(-x)).norm()) for x in (even, first))
    assert farthest == pytest.approx(diameter, rel=1e-12)


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"l1.5"}))
@pytest.mark.parametrize("n", [1, 7, 640])
def test_a_set_of_given_diameter_has_it(name: str, n: int) -> None:
    """The radius follows from D, by itself and through ``tau``: D = 2·τ·E‖W‖."""
    shape = {key: value for key, value in SETS[name](5, 1.0).spec().items() if key != "radius"}
    by_diameter = constraint_from_spec({**shape, "diameter": 9.0})
    assert by_diameter.diameter(n) == pytest.approx(9.0)
    assert by_diameter.bind(n, 123.0).diameter(n) == pytest.approx(9.0)
    by_tau = constraint_from_spec({**shape, "tau": 15.0})
    assert by_tau.bind(n, 0.3).diameter(n) == pytest.approx(9.0)


def test_lp_radius_between_1_and_2_is_the_published_rule() -> None:
    """``r = (D/2)·n^{1/p − 1/2}``, which makes a larger set than D says; its diameter is 2·r."""
    ball = LpBall(1.5, diameter=9.0)
    assert ball.radius(64) == pytest.approx(4.5 * 64 ** (2 / 3 - 1 / 2))
    assert ball.diameter(64) == pytest.approx(2 * ball.radius(64))


@pytest.mark.parametrize("cls", [KSparsePolytope, KSupportBall])
def test_k_is_a_fraction_of_the_entries(cls: type[KSparsePolytope] | type[KSupportBall]) -> None:
    """``K = min(max(k_min, ⌊k_frac·n⌋), n)``, at least 1, also after binding."""
    spec = cls(k_frac=0.05, k_min=10, tau=15.0)
    for n, k in {1: 1, 9: 9, 10: 10, 199: 10, 200: 10, 219: 10, 220: 11, 2_359_296: 117_964}.items():
        assert spec.support(n) == k
        bound = spec.bind(n, 1.0)
        assert isinstance(bound, cls) and bound.k == k
    assert cls(k_frac=0.05, radius=1.0).support(10) == 1
    assert cls(k_frac=1.0, radius=1.0).support(10) == 10
    assert cls(k=7, radius=1.0).support(5) == 5


def test_unconstrained_has_no_bounds() -> None:
    """It is in every group's place for a set, so it answers what it can."""
    free = Unconstrained()
    x = torch.tensor([1e30, -1.0])
    assert float(free.gauge(x)) == 0 and free.diameter(2) == math.inf and free.bind(2, 1.0) == free
    projected = free.project(x)
    assert torch.equal(projected, x) and projected.data_ptr() != x.data_ptr()
    with pytest.raises(ValueError, match="Unconstrained has no LMO"):
        free.lmo(x)


# Plain values and errors

EXAMPLES: list[Constraint] = [
    *(make(3, 0.1) for make in SETS.values()),
    KSparsePolytope(k_frac=0.05, k_min=10, tau=15.0),
    KSupportBall(k_frac=0.3, diameter=2.5),
    LpBall("inf", tau=3.0),
    Unconstrained(),
]


@pytest.mark.parametrize("constraint", EXAMPLES, ids=repr)
def test_plain_values_bring_back_an_equal_set(constraint: Constraint) -> None:
    """State dicts hold the values, through JSON too, which has no infinity; logs hold the repr."""
    text = json.dumps(constraint.spec(), allow_nan=False)
    again = constraint_from_spec(json.loads(text))
    assert type(again) is type(constraint) and again == constraint and hash(again) == hash(constraint)
    assert eval(repr(constraint)) == constraint  # repr is Python, made by this package


@pytest.mark.parametrize("constraint", EXAMPLES, ids=repr)
def test_a_set_in_a_checkpoint_is_read_without_pickle_code(constraint: Constraint) -> None:
    """Fails when torch.load(weights_only=True) refuses the param groups that frameworks put into their checkpoints."""
    file = io.BytesIO()
    torch.save(
        {"param_groups": [{"constraint": constraint, "lr": 0.1}, {"constraint": (constraint, constraint)}]}, file
    )
    file.seek(0)
    first, second = torch.load(file, weights_only=True)["param_groups"]
    assert first["constraint"] == constraint and second["constraint"] == (constraint, constraint)
    assert copy.deepcopy(constraint) == constraint


def test_different_sets_are_not_equal() -> None:
    """Equality of everything would let ranks disagree unseen."""
    assert all(a != b for a, b in itertools.combinations(EXAMPLES, 2))
    assert KSparsePolytope(k=3, radius=1.0) != KSupportBall(k=3, radius=1.0) != "k_support"


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: KSparsePolytope(k_frac=5.0, tau=15.0), "5.0"),
        (lambda: KSparsePolytope(k_frac=0.0, tau=15.0), "0.0"),
        (lambda: KSparsePolytope(k_frac=math.nan, tau=15.0), "nan"),
        (lambda: KSparsePolytope(k=0, radius=1.0), "k=0"),
        (lambda: KSparsePolytope(k=3, k_min=2, radius=1.0), "k_min=2"),
        (lambda: KSparsePolytope(k_frac=0.05, k_min=0, radius=1.0), "0"),
        (lambda: KSparsePolytope(k=3, k_frac=0.05, radius=1.0), "k_frac=0.05"),
        (lambda: KSupportBall(radius=1.0), "k=None"),
        (lambda: KSparsePolytope(k=3, tau=-1.0), "-1.0"),
        (lambda: KSparsePolytope(k=3, radius=math.inf), "inf"),
        (lambda: KSupportBall(k=3, radius=math.nan), "nan"),
        (lambda: LpBall(2, diameter=0.0), "0.0"),
        (lambda: KSparsePolytope(k=3, radius=1.5, diameter=2.5), "2.5"),
        (lambda: KSparsePolytope(k=3), "{}"),
        (lambda: LpBall(0.5, radius=1.0), "0.5"),
        (lambda: LpBall(math.nan, radius=1.0), "nan"),
        (lambda: LpBall("round", radius=1.0), "'round'"),
        (lambda: KSparsePolytope(k=3, tau=15.0).lmo(torch.ones(4)), "tau=15.0"),
        (lambda: KSupportBall(k=3, tau=15.0).gauge(torch.ones(4)), "tau=15.0"),
        (lambda: LpBall(2, tau=15.0).diameter(4), "tau=15.0"),
        (lambda: constraint_from_spec({"kind": "spectral", "radius": 1.0}), "'spectral'"),
    ],
)
def test_errors_are_one_line_with_the_value(make: Callable[[], object], value: str) -> None:
    """A wrong size that is accepted trains the wrong network without a word."""
    with pytest.raises(ValueError) as error:
        make()
    assert value in str(error.value) and "\n" not in str(error.value)
