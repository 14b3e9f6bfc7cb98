"""Sparsities: lists of them as text, their range, and how many of N they remove."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal, InvalidOperation

import numpy as np

from sfw_dist.errors import UserError


def parse_sparsities(text: str) -> list[float]:
    """Read a comma-separated list of numbers and inclusive ranges ``start:stop:step``.

    Args:
        text: for example ``0.5,0.9:0.99:0.01``.

    Returns:
        The sparsities, ascending, each once.

    Raises:
        UserError: an item that is neither a number nor a range, an empty range, or a sparsity outside [0, 1).

    Example:
        >>> parse_sparsities("0.5,0.9:0.92:0.01")
        [0.5, 0.9, 0.91, 0.92]
    """
    return sorted({float(value) for piece in text.split(",") for value in _expand(piece.strip())})


def check_sparsity(sparsity: float) -> None:
    """Raise :class:`UserError` for a sparsity outside [0, 1), or none that is a plain number."""
    # Of other kinds the decimal digits, by which pieces are counted, are not known.
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | np.floating | np.integer):
        raise UserError(f"sparsity must be a number, got {sparsity!r}: write float({sparsity!r}), or 0.9 for 90 %")
    if 0 <= sparsity < 1:
        return
    remedy = "it is the fraction to remove"
    if 1 < sparsity < 100:
        remedy = f"write {sparsity / 100:g} for {sparsity:g} %"
    elif sparsity == 1:
        remedy = "1 would leave nothing"
    raise UserError(f"sparsity must be in [0, 1), got {sparsity}: {remedy}")


def removed_count(sparsity: float, n: int) -> int:
    """How many of ``n`` a sparsity removes: ``sparsity * n`` rounded half up, the product computed in decimal.

    Example:
        >>> removed_count(0.29, 50)  # 14.5; in floating point the product is 14.499999999999998
        15
    """
    return int((Decimal(str(sparsity)) * n).to_integral_value(ROUND_HALF_UP))


def _expand(piece: str) -> list[Decimal]:
    """The values of one number or range. In decimal, because in floating point 0.9:0.99:0.01 ends at 0.98."""
    try:
        start, *rest = [Decimal(number) for number in piece.split(":")]
        stop, step = rest or (start, Decimal(1))
        rising = 0 <= start <= stop < 1 and 0 < step <= 1
    except (ValueError, InvalidOperation):
        raise UserError(f"bad sparsities {piece!r}: write a number or start:stop:step, as in 0.9:0.99:0.01") from None
    if not rising:
        raise UserError(f"bad sparsities {piece!r}: they lie in [0, 1) and go up, as in 0.9 or 0.9:0.99:0.01")
    count = int((stop - start) / step) + 1
    if count > 1000:
        raise UserError(f"bad sparsities {piece!r}: {count} of them, at most 1000: take a larger step")
    return [start + i * step for i in range(count)]


PAPER_SPARSITIES = tuple(parse_sparsities("0.1:0.9:0.1,0.91:0.99:0.01"))
"""The 18 sparsities of the paper's curves."""
