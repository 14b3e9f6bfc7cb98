"""Sums whose last bits depend on nothing but the numbers.

A parallel sum splits a tensor by the number of threads, so its rounding changes with ``OMP_NUM_THREADS``, and a step
size computed from it too: replicas would drift apart. Here every sum is a tree of a fixed form, in float64. Compiled
code repeats it to the bit (``optim/kernels/cpu_step.cpp``), and ranks can each compute a part of it::

    row      8,192 entries = 512 vectors of 16 lanes; adjacent vectors are added, then adjacent sums … to one vector,
             whose lanes are then added in the same way
    tensor   its rows, the last one filled with zeros; adjacent rows are added, then adjacent sums … to one number
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROW = 8192
LANES = 16
# Entries worked on at a time: their float64 terms (2 MB) stay in the processor's cache.
_CHUNK = 32 * ROW


def tree_sum(x: Tensor, dim: int = 0) -> Tensor:
    """The sum over one dimension, of adjacent pairs again and again; an odd one out is added to 0."""
    x = x.movedim(dim, 0)
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1:])
    while x.shape[0] > 1:
        if x.shape[0] % 2:
            x = torch.cat([x, torch.zeros_like(x[:1])])
        x = x[0::2] + x[1::2]
    return x[0]


def row_sums(terms: Callable[..., Tensor], *flat: Tensor) -> Tensor:
    """Sums of ``terms`` over the rows of the ``flat`` tensors; it maps slices of them to float64 of the same length.

    Returns:
        float64 ``(⌈n / ROW⌉,)``.
    """
    n = flat[0].numel()
    sums = [_rows_of_chunk(terms(*(x[start : start + _CHUNK] for x in flat))) for start in range(0, n, _CHUNK)]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=flat[0].device)


def _rows_of_chunk(terms: Tensor) -> Tensor:
    n = terms.numel()
    width = ROW if n > ROW else -(-n // LANES) * LANES  # the zeros that fill a short row up would change nothing
    rows = torch.nn.functional.pad(terms, (0, -n % width)).view(-1, width // LANES, LANES)
    return tree_sum(tree_sum(rows, 1), 1)


def squared_norm(x: Tensor) -> Tensor:
    """``‖x‖₂²`` as a float64 scalar; ``x`` of any shape, converted before it is squared, so that nothing overflows."""
    return tree_sum(row_sums(lambda a: a.double().square(), x.reshape(-1)))


def absolute_sum(x: Tensor) -> Tensor:
    """``‖x‖₁`` as a float64 scalar; ``x`` of any shape."""
    return tree_sum(row_sums(lambda a: a.double().abs(), x.reshape(-1)))


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """``⟨x, y⟩`` as a float64 scalar; same shape; products, too, are taken in float64."""
    return tree_sum(row_sums(lambda a, b: a.double() * b.double(), x.reshape(-1), y.reshape(-1)))


def square_root(x: Tensor) -> Tensor:
    """Of float64; on the CPU correctly rounded, as numpy's is, while torch's own is not for 1 % of numbers."""
    return torch.as_tensor(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


class Products(NamedTuple):
    """What one step needs to know of a tensor, in float64: a scalar each, or one number a row, ``(rows,)``."""

    direction_squared: Tensor
    """``‖m‖₂²``"""
    distance_squared: Tensor
    """``‖θ − v‖₂²``"""
    gap: Tensor
    """``⟨m, θ − v⟩``, the Frank-Wolfe gap"""


PRODUCTS: tuple[Callable[..., Tensor], ...] = (
    lambda m, difference: m.double().square(),
    lambda m, difference: difference.double().square(),
    lambda m, difference: m.double() * difference.double(),
)
"""The terms of these sums, of m and θ − v."""


def frank_wolfe_products(m: Tensor, theta: Tensor, indices: Tensor | None, values: Tensor) -> Products:
    """The three sums of a step, by row.

    ``θ − v`` is formed entry by entry, in the tensors' type, rather than by ``‖θ‖² − 2⟨θ, v⟩ + ‖v‖²``, which cancels
    when θ is near v.

    Args:
        m, theta: ``(n,)``, same type.
        indices: int64 ``(s,)`` ascending, where v is nonzero; ``None`` for a dense vertex.
        values: ``(s,)`` the vertex there, or ``(n,)``.
    """
    difference = theta - values if indices is None else theta.index_add(0, indices, -values)
    return Products(*(row_sums(terms, m, difference) for terms in PRODUCTS))
