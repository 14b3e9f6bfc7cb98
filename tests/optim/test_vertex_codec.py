"""The vertex format: what one rank encodes, all decode bit for bit, in the bytes that were promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.constraints import Constraint, KSparsePolytope, KSupportBall, LpBall, Unconstrained, Vertex
from sfw_dist.optim.vertex_codec import STATS, VertexCodec

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
SOME_STATS = torch.tensor([0.25, -1e-300, 3.0], dtype=torch.float64)

RESNET_LAYER = 2_359_296  # 512 · 512 · 3 · 3


def bits(x: Tensor) -> Tensor:
    """Bit patterns: −0 and 0 differ, NaN equals itself."""
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def format_of(constraint: Constraint, n: int, dtype: torch.dtype) -> VertexCodec:
    if isinstance(constraint, KSparsePolytope | LpBall) and constraint.signs_only:
        return VertexCodec(n, constraint.support(n), dtype, constraint.radius(n))
    return VertexCodec(n, constraint.support(n), dtype)


def sent(vertex_format: VertexCodec, vertex: Vertex, stats: Tensor = SOME_STATS) -> tuple[Tensor, Vertex]:
    """What arrives, through a slot that held garbage, amid others that must stay as they are."""
    nbytes = vertex_format.nbytes
    buffer = torch.randint(0, 256, (nbytes + 16,), dtype=torch.uint8)
    before = buffer.clone()
    vertex_format.encode(stats, vertex, buffer[8:][:nbytes])
    assert torch.equal(buffer[:8], before[:8]) and torch.equal(buffer[-8:], before[-8:])
    return vertex_format.decode(buffer[8:][:nbytes])


def check(vertex_format: VertexCodec, vertex: Vertex) -> None:
    stats, arrived = sent(vertex_format, vertex)
    assert equal_bits(stats, SOME_STATS)
    shape = torch.Size([vertex_format.n])
    # Adding 0 turns −0 into 0: only where every entry is sent does a −0 arrive as one.
    assert equal_bits(arrived.dense(shape) + 0.0, vertex.dense(shape) + 0.0)
    canonical = vertex_format.canonical(vertex)
    assert equal_bits(arrived.values, canonical.values)
    assert (arrived.indices is None) == (canonical.indices is None)
    if arrived.indices is not None and canonical.indices is not None:
        assert torch.equal(arrived.indices, canonical.indices)
        assert (arrived.indices.diff() > 0).all() and arrived.values.all()


@st.composite
def constraints(draw: st.DrawFn) -> Constraint:
    radius = draw(st.floats(0.01, 100))
    k = draw(st.one_of(st.integers(1, 6), st.integers(1, 80)))
    p = draw(st.sampled_from([1, 1.5, 2, 3, math.inf]))
    sets = [KSparsePolytope(k=k, radius=radius), KSupportBall(k=k, radius=radius), LpBall(p, radius=radius)]
    return draw(st.sampled_from([*sets, Unconstrained()]))


@every_dtype
@given(
    constraint=constraints(),
    n=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_arrives_is_what_was_sent(
    dtype: torch.dtype, constraint: Constraint, n: int, density: float, seed: int
) -> None:
    """All sets, as masks, indices and whole; often fewer nonzeros than K. Replicas drift apart at one wrong bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * (torch.rand(n, generator=generator) <= density)
    x = x.to(dtype)
    vertex = Vertex(None, x) if isinstance(constraint, Unconstrained) else constraint.lmo_vertex(x)
    check(format_of(constraint, n, dtype), vertex)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("radius", [None, 0.3])
def test_borders_of_bytes(n: int, radius: float | None) -> None:
    """Entries 0 and n−1 with both signs, K from one to all: the last byte is part full, index 0 has no sign."""
    for k in {1, min(2, n), n // 2 or 1, n - 1 or 1, n}:
        for chosen in (torch.arange(k), torch.arange(n - k, n)):
            for first in (0.3, -0.3):
                values = torch.full((k,), first)
                values[1::2] *= -1
                check(VertexCodec(n, k, torch.float32, radius), Vertex(chosen, values))


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize(("n", "k"), [(64, 1), (64, 32), (64, 64), (10, 10)])
@pytest.mark.parametrize("sparse", [False, True])
def test_zero_vertex(radius: float | None, n: int, k: int, sparse: bool) -> None:
    """A tensor without a gradient sends zeros, given whole; an LMO of a zero tensor gives K zeros with indices."""
    zeros = Vertex(torch.arange(k), torch.zeros(k)) if sparse else Vertex(None, torch.zeros(n))
    vertex_format = VertexCodec(n, k, torch.float32, radius)
    check(vertex_format, zeros)
    assert not sent(vertex_format, zeros)[1].dense(torch.Size([n])).any()


@every_dtype
def test_whole_vertices_keep_every_bit(dtype: torch.dtype) -> None:
    """The momentum of an unconstrained tensor travels as it is: −0, denormals, infinities and NaN too."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.smallest_normal * info.eps, info.max, math.inf, -math.inf, math.nan]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    _, arrived = sent(VertexCodec(values.numel(), values.numel(), dtype), Vertex(None, values))
    assert arrived.indices is None and equal_bits(arrived.values, values)


@pytest.mark.parametrize(
    "constraint", [KSparsePolytope(k=3, radius=1.0), KSupportBall(k=3, radius=1.0), Unconstrained()], ids=repr
)
def test_statistics_survive_nan(constraint: Constraint) -> None:
    """NaN in the stats is how the other ranks learn of a gradient that is not finite, whatever the vertex holds."""
    stats = torch.tensor([math.nan, math.inf, -0.0], dtype=torch.float64)
    x = torch.tensor([1.0, math.nan, 2.0, 3.0])
    vertex = Vertex(None, x) if isinstance(constraint, Unconstrained) else constraint.lmo_vertex(x)
    assert stats.numel() == STATS
    assert equal_bits(sent(format_of(constraint, 4, torch.float32), vertex, stats)[0], stats)


def test_bytes_of_a_large_layer_at_5_percent() -> None:
    """The claim of the method: n/8 + K/8 bytes, 0.131 a parameter, against 4 for the parameter itself."""
    constraint = KSparsePolytope(k_frac=0.05, k_min=10, radius=1.0)
    vertex_format = format_of(constraint, RESNET_LAYER, torch.float32)
    wanted = RESNET_LAYER / 8 + constraint.support(RESNET_LAYER) / 8
    assert wanted <= vertex_format.nbytes <= wanted + 24 + 14  # and what fills the last words
    assert vertex_format.nbytes / RESNET_LAYER == pytest.approx(0.131, abs=5e-4)
    check(vertex_format, constraint.lmo_vertex(torch.randn(RESNET_LAYER)))


@pytest.mark.parametrize("n", [8, 100, 6400])
@pytest.mark.parametrize("radius", [None, 0.5])
@every_dtype
def test_the_smaller_way_to_write_a_support_is_chosen(n: int, radius: float | None, dtype: torch.dtype) -> None:
    """Indices for few nonzeros, a mask for many: never more bytes than either (and the padding to words)."""
    sizes = set()
    for k in range(1, n, max(1, n // 100)):
        nonzeros = math.ceil(k / 8) if radius else k * dtype.itemsize
        mask, indices = math.ceil(n / 8) + nonzeros, 4 * k + (0 if radius else nonzeros)
        payload = VertexCodec(n, k, dtype, radius).nbytes - 24
        assert min(mask, indices) <= payload <= min(mask, indices) + 14
        sizes.add(indices < mask)
    assert sizes == {True, False} or n == 8


def test_every_entry_given_needs_no_support() -> None:
    """24 bytes of stats and the values."""
    assert VertexCodec(1000, 1000, torch.float32).nbytes == 24 + 4000
    assert VertexCodec(1000, 1000, torch.float64).nbytes == 24 + 8000
    assert VertexCodec(1000, 1000, torch.float32, radius=1.0).nbytes == 24 + 128 + 128


def test_more_entries_than_int32_is_an_error() -> None:
    """Otherwise indices wrap around, silently."""
    VertexCodec(2**31 - 3, 1, torch.float32)
    with pytest.raises(ValueError, match=r"^a tensor has 2147483646 entries, .* split it into several$"):
        VertexCodec(2**31 - 2, 1, torch.float32)
