"""Sums that do not depend on the number of threads.

A parallel sum over a whole tensor splits it by the thread count, so its last bits change with ``OMP_NUM_THREADS``; a
step size γ made from it would too, and 1 rank with 8 threads would drift from 8 ranks with one. Here every sum is taken
over rows of fixed length, in float64, and then over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Fewer than the 32,768 elements from which torch splits a sum into a scalar between threads.
_ROW = 16_384
# Elements a block of `frank_wolfe_products` holds: its m, θ and θ − v (3 MB in float32) stay in the processor's cache.
_BLOCK = 16 * _ROW


def _by_rows(reduce: Callable[..., Tensor], *flat: Tensor) -> Tensor:
    """Sum of ``reduce`` over rows of the ``flat`` tensors; it maps ``(rows, length)`` to float64 ``(rows,)``."""
    n = flat[0].numel()
    if n <= _ROW:
        return reduce(*(x.view(1, -1) for x in flat)).view(())
    whole = n - n % _ROW
    rest = reduce(*(x[whole:].view(1, -1) for x in flat))
    total = torch.cat([reduce(*(x[:whole].view(-1, _ROW) for x in flat)), rest])
    return total.sum() if total.numel() <= _ROW else _by_rows(lambda x: x.sum(1), total)


def squared_norm(x: Tensor) -> Tensor:
    """``‖x‖₂²`` as a float64 scalar; ``x`` of any shape, converted before it is squared, so that nothing overflows."""
    return _by_rows(lambda row: torch.linalg.vector_norm(row, dim=1, dtype=torch.float64).square(), x.reshape(-1))


def absolute_sum(x: Tensor) -> Tensor:
    """``‖x‖₁`` as a float64 scalar; ``x`` of any shape."""
    return _by_rows(lambda row: torch.linalg.vector_norm(row, ord=1, dim=1, dtype=torch.float64), x.reshape(-1))


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """``⟨x, y⟩`` as a float64 scalar; same shape, products rounded to the inputs' type, then added in float64."""
    return _by_rows(lambda a, b: (a * b).sum(1, dtype=torch.float64), x.reshape(-1), y.reshape(-1))


class Products(NamedTuple):
    """What one step needs to know of a tensor; float64 scalars on the tensor's device."""

    direction_squared: Tensor
    """``‖m‖₂²``"""
    distance_squared: Tensor
    """``‖θ − v‖₂²``"""
    gap: Tensor
    """``⟨m, θ − v⟩``, the Frank-Wolfe gap"""


def frank_wolfe_products(m: Tensor, theta: Tensor, indices: Tensor | None, values: Tensor) -> Products:
    """The three sums of a step, in one pass over memory: block by block, while a block is in cache.

    ``θ − v`` is formed entry by entry rather than by ``‖θ‖² − 2⟨θ, v⟩ + ‖v‖²``, which cancels when θ is near v.

    Args:
        m, theta: ``(n,)``, same type.
        indices: int64 ``(s,)`` ascending, where v is nonzero; ``None`` for a dense vertex.
        values: ``(s,)`` the vertex there, or ``(n,)``.
    """
    total = torch.zeros(3, dtype=torch.float64, device=m.device)
    for block, inside in _blocks(m, indices):
        difference = theta[block].clone()
        if indices is None:
            difference -= values[block]
        else:
            difference[indices[inside] - block.start] -= values[inside]
        direction = m[block]
        total += torch.stack([squared_norm(direction), squared_norm(difference), inner_product(direction, difference)])
    return Products(*total)


def _blocks(m: Tensor, indices: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Slices of the tensor, each with the slice of ``indices`` that falls into it."""
    n = m.numel()
    if n <= _BLOCK or m.device.type != "cpu":  # On a device, where the cuts fall would have to be read back.
        yield slice(0, n), slice(None)
        return
    starts = torch.arange(0, n + _BLOCK, _BLOCK)
    cuts = (torch.searchsorted(indices, starts) if indices is not None else starts).tolist()
    for i, start in enumerate(range(0, n, _BLOCK)):
        yield slice(start, min(start + _BLOCK, n)), slice(cuts[i], cuts[i + 1])
