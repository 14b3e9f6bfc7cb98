"""Lists of sparsities."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from sfw_dist.errors import UserError


def parse_sparsities(text: str) -> list[float]:
    """Sparsities, ascending and distinct, of a comma list of numbers and inclusive ranges ``start:stop:step``.

    >>> parse_sparsities("0.5,0.9:0.92:0.01")
    [0.5, 0.9, 0.91, 0.92]

    Raises:
        UserError: a piece that is neither, an empty range, or a sparsity outside [0, 1).
    """
    return sorted({float(value) for piece in text.split(",") for value in _expand(piece.strip())})


def _expand(piece: str) -> list[Decimal]:
    """The values of one number or range, in decimal: floating point ends 0.9:0.99:0.01 at 0.98."""
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
