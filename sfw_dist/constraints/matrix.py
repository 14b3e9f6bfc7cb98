"""Sets whose vertices are few whole filters, or matrices of low rank.

They see a tensor as the matrix of its first dimension by all others: an output filter of a convolution, or an output
neuron of a linear layer, is one row (for a transposed convolution, an input channel). A tensor of one dimension is a
matrix of one column. Their LMOs need the whole tensor in its shape, on one rank; these sets are not divisible, so they
do not work on DTensors and flat partitions.

Sources: Zimmer, Spiegel, Pokutta, arXiv 2205.11921 (the group and spectral k-support balls); Halko, Martinsson, Tropp,
arXiv 0909.4061, and Musco, Musco, arXiv 1504.05477 (leading singular vectors from powers of a random block).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sfw_dist.constraints.base import Constraint, SizedConstraint, TopKConstraint, Vertex, scaled_to
from sfw_dist.constraints.k_sparse import k_support_norm
from sfw_dist.ops.pairwise_sum import square_root, squared_norm, tree_sum
from sfw_dist.ops.topk import select

SVD = Literal["auto", "exact", "power"]

_SEED = 0
_OVERSAMPLING = 8
_BLOCKS = 6
_LARGEST_EXACT = 1024
"""Of a matrix's smaller side: beyond it the eigenvectors, cubic in it, take longer than powers of a block."""
_FLOPS_A_PASS = 16.0
"""What a core computes in float64 while it reads one float32: 46 GFLOP/s and 10 GB/s, measured."""


class GroupKSupportBall(TopKConstraint):
    """``conv{v : at most K rows nonzero, ‖v‖₂ ≤ r}``.

    LMO: the K rows of largest L2 norm (ties: the lowest row), together scaled to norm r, with the opposite sign.
    Gauge: the k-support norm of the vector of row norms, over r. L2 diameter ``2·r``.

    Over a tensor of one dimension this is :class:`~sfw_dist.KSupportBall`.

    Args:
        k, k_frac, k_min: K, or a fraction of the tensor's rows, at least ``k_min``.
        radius, diameter, tau: exactly one of the three, see :class:`~sfw_dist.constraints.base.SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> GroupKSupportBall(k=1, radius=5.0).lmo(torch.tensor([[3.0, -4.0], [1.0, 1.0]]))
        tensor([[-3.,  4.],
                [ 0.,  0.]])
    """

    kind = "group_k_support"

    def lmo_vertex(self, x: Tensor) -> Vertex:
        rows = _matrix(x)
        squares = _row_squares(rows)
        chosen = select(squares, self.k_of(len(rows)))
        indices = (chosen[:, None] * rows.shape[1] + torch.arange(rows.shape[1], device=x.device)).view(-1)
        norm = square_root(tree_sum(squares[chosen]))
        return Vertex(indices, scaled_to(rows[chosen].view(-1), norm, self.radius(x.numel())))

    def gauge(self, x: Tensor) -> Tensor:
        norms = square_root(_row_squares(_matrix(x.detach())))
        return k_support_norm(norms, self.k_of(len(norms))) / self.radius(x.numel())

    def support(self, n: int) -> int:
        """All: how many entries K rows have, only :meth:`nonzeros` can tell, from a shape."""
        return n

    def nonzeros(self, shape: torch.Size) -> int:
        rows, columns = _sides(shape)
        return self.k_of(rows) * columns

    def work(self, shape: torch.Size) -> float:
        return 3.0 * shape.numel()  # squares out and in, in float64

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2

    def with_radius(self, radius: float, n: int) -> Constraint:
        return type(self)(
            **self.shape_arguments(), radius=radius
        )  # K follows from the rows of the tensor that it meets


class _Spectral(SizedConstraint):
    """The sets whose vertices are the leading singular triplets of a matrix, scaled to Frobenius norm r.

    With U the K leading left singular vectors of X the vertex is ``−r·U·(UᵀX)/‖UᵀX‖``. For any orthonormal U this is
    a point of the set, and how near it comes to the minimum depends on ``‖UᵀX‖`` alone. U is computed in float64:

    * ``svd="exact"``: eigenvectors of XXᵀ or XᵀX, the smaller; ``‖UᵀX‖`` is the largest there is, to rounding;
    * ``svd="power"``: from six powers of a random block, the same in every step and on every rank (block Krylov);
    * ``svd="auto"``: exact up to 1,024 rows or columns, and where the powers would be half of the space or more.

    Repeated steps, and runs on any number of ranks, agree to the bit where linear algebra does: on the same processor,
    with the same number of threads a rank. Vertices are sent dense.
    """

    def __init__(self, *, svd: SVD = "auto", **arguments: Any) -> None:
        super().__init__(**arguments)
        if svd not in get_args(SVD):
            raise ValueError(f"svd must be one of {', '.join(get_args(SVD))}, got {svd!r}: leave it out for auto")
        self.svd = svd

    @abstractmethod
    def rank(self, shape: torch.Size) -> int:
        """K, the most rank of a vertex of this shape."""

    def lmo_vertex(self, x: Tensor) -> Vertex:
        wide, poison = _finite(_matrix(x).double())
        # Squares of the singular values must not overflow or vanish; the scale cancels.
        wide = wide / wide.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        flat = wide.T if wide.shape[0] > wide.shape[1] else wide
        basis = self._leading(flat, self.rank(x.shape))
        shares = basis.T @ flat
        vertex = scaled_to(basis @ shares, square_root(squared_norm(shares)), self.radius(x.numel()))
        vertex = vertex.T if flat is not wide else vertex
        return Vertex(None, (vertex + poison).reshape(-1).to(x.dtype))

    def _leading(self, x: Tensor, k: int) -> Tensor:
        """``(rows, k)``, orthonormal, of ``(rows, columns)`` with rows ≤ columns."""
        if self.svd == "power" or (self.svd == "auto" and not _is_exact(x.shape[0], k)):
            return leading_by_powers(x, k)
        return leading_exactly(x, k)

    def gauge(self, x: Tensor) -> Tensor:
        wide, poison = _finite(_matrix(x.detach()).double())
        values = torch.linalg.svdvals(wide)
        return k_support_norm(values, self.rank(x.shape)) / self.radius(x.numel()) + poison

    def work(self, shape: torch.Size) -> float:
        short, long = sorted(_sides(shape))
        k = self.rank(shape)
        if self.svd == "power" or (self.svd == "auto" and not _is_exact(short, k)):
            flops = 4.0 * _BLOCKS * short * long * (k + _OVERSAMPLING)
        else:
            flops = 2.0 * short**2 * long + 10.0 * short**3
        return 4.0 * shape.numel() + flops / _FLOPS_A_PASS

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2


class NuclearBall(_Spectral):
    """``{V : ‖V‖_* ≤ r}``, the sum of the singular values; the hull of the matrices of rank 1 and Frobenius norm r.

    LMO: ``−r·u₁·v₁ᵀ``, for the largest singular value. Gauge: ``Σσ_i/r``. L2 diameter ``2·r``. Over a tensor of one
    dimension it is the L2 ball.

    Args:
        svd: how singular vectors are found, see :class:`SpectralKSupportBall`.
        radius, diameter, tau: exactly one of the three, see :class:`~sfw_dist.constraints.base.SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> vertex = NuclearBall(radius=1.0).lmo(torch.diag(torch.tensor([2.0, 1.0])))
        >>> [round(x) for x in vertex.diagonal().tolist()]
        [-1, 0]
    """

    kind = "nuclear"

    def rank(self, shape: torch.Size) -> int:
        return 1

    def shape_arguments(self) -> dict[str, Any]:
        return {"svd": self.svd}


class SpectralKSupportBall(_Spectral, TopKConstraint):
    """``conv{V : rank V ≤ K, ‖V‖_F ≤ r}``.

    LMO: the K leading singular triplets, scaled to Frobenius norm r, with the opposite sign. Gauge: the k-support norm
    of the singular values, over r. L2 diameter ``2·r``.

    Args:
        k, k_frac, k_min: K, or a fraction of the greatest rank that the tensor can have, at least ``k_min``.
        svd: how singular vectors are found: ``"exact"``, ``"power"``, or ``"auto"``: exact where it is quick.
        radius, diameter, tau: exactly one of the three, see :class:`~sfw_dist.constraints.base.SizedConstraint`.

    Raises:
        ValueError: an argument outside its domain.

    Example:
        >>> vertex = SpectralKSupportBall(k=2, radius=5.0).lmo(torch.diag(torch.tensor([4.0, 3.0, 1.0])))
        >>> [round(x) for x in vertex.diagonal().tolist()]
        [-4, -3, 0]
    """

    kind = "spectral_k_support"

    def rank(self, shape: torch.Size) -> int:
        return self.k_of(min(_sides(shape)))

    def support(self, n: int) -> int:
        return n

    def with_radius(self, radius: float, n: int) -> Constraint:
        return type(self)(**self.shape_arguments(), radius=radius)

    def shape_arguments(self) -> dict[str, Any]:
        return {**super().shape_arguments(), "svd": self.svd}


def leading_exactly(x: Tensor, k: int) -> Tensor:
    """The ``k`` leading left singular vectors of ``x`` ``(rows, columns)``, as columns ``(rows, k)``.

    From the Gram matrix, ten times as fast as from an SVD. Its error is below ``1e-15·σ₁²`` in σ², so that ``‖UᵀX‖`` is
    right to rounding, though vectors of singular values under ``1e-8·σ₁`` are arbitrary.
    """
    vectors: Tensor = torch.linalg.eigh(x @ x.T).eigenvectors
    return vectors[:, -k:]


def leading_by_powers(x: Tensor, k: int) -> Tensor:
    """As :func:`leading_exactly`, up to an error that falls with the number of powers (Musco and Musco, 2015).

    The best ``k`` vectors of the space of ``X·Ω, (XXᵀ)·X·Ω, … (XXᵀ)⁵·X·Ω`` Ω a fixed random block of k + 8 columns.
    Pure noise is hardest: of 2048×2048 entries, ``‖UᵀX‖`` falls short by 1 % for k = 1 and by less for larger k.
    """
    rows, columns = x.shape
    width = min(k + _OVERSAMPLING, rows)
    generator = torch.Generator().manual_seed(_SEED)  # on the CPU: the same block on every device
    block = x @ torch.randn(columns, width, generator=generator, dtype=torch.float64).to(x.device)
    blocks = [torch.linalg.qr(block).Q]
    while len(blocks) < _BLOCKS and len(blocks) * width < rows:
        block = x @ (x.T @ blocks[-1])
        for earlier in blocks:
            block = block - earlier @ (earlier.T @ block)
        blocks.append(torch.linalg.qr(block).Q)
    # Blocks of a matrix of low rank may depend on one another; the factor Q of them all is orthonormal even then.
    space = torch.linalg.qr(torch.cat(blocks, 1)[:, :rows]).Q
    return space @ leading_exactly(space.T @ x, k)


def _is_exact(rows: int, k: int) -> bool:
    return rows <= _LARGEST_EXACT or 2 * _BLOCKS * (k + _OVERSAMPLING) >= rows


def _sides(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    rows = shape[0] if shape else 1
    return rows, shape.numel() // rows


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(_sides(x.shape))


def _row_squares(rows: Tensor) -> Tensor:
    """``‖row‖²`` in float64, ``(rows,)``; the same at any number of threads."""
    return tree_sum(rows.double().square(), 1)


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and 0; or, where an entry is not finite, zeros and NaN: factorizations raise, or do not end, on NaN."""
    finite = x.isfinite().all()
    return torch.where(finite, x, 0), torch.where(finite, 0.0, torch.nan)
