"""Exact selection of the K entries of largest magnitude, the heart of the sparse LMOs.

:func:`select` is the entry point for a whole tensor, :mod:`sfw_dist.ops.topk.sharded` for one whose parts lie with
several ranks. The result is the same on every device, at any number of threads or ranks: ties at the K-th magnitude go
to the lowest flat index. The kernels of :mod:`sfw_dist.optim.kernels` make the same selection by themselves.
"""

from __future__ import annotations

from torch import Tensor

from sfw_dist.ops.topk import cpu, reference


def select(x: Tensor, k: int) -> Tensor:
    """Flat indices of the ``k`` entries of largest ``|x|``; ties go to the lowest index.

    Args:
        x: any shape and memory format; indices count in row-major order of the shape. No NaN: the result would be
            meaningless (callers check the norm).
        k: in ``[0, x.numel()]``.

    Returns:
        int64 ``(k,)``, ascending, on ``x``'s device. Zeros are chosen, lowest index first, when fewer than ``k``
        entries are nonzero. On a GPU nothing waits for the host.
    """
    assert 0 <= k <= x.numel(), (k, x.numel())
    return cpu.select(x, k) if x.device.type == "cpu" else reference.select(x, k)
