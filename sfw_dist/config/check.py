"""The check that every configuration class makes of its values."""

from __future__ import annotations

from sfw_dist.errors import UserError


def require(valid: bool, key: str, value: object, domain: str, remedy: str) -> None:
    """Refuse a value outside its domain.

    Args:
        valid: whether the value is in its domain.
        key: dotted name of the field, as in ``optimizer.lr``.
        value: what was given.
        domain: what the value must be, to follow "must be".
        remedy: what to write instead.

    Raises:
        UserError: ``valid`` is false. The message is one line with key, domain, value and remedy.

    Example:
        >>> require(False, "train.epochs", 0, "at least 1", "write 180")
        Traceback (most recent call last):
        sfw_dist.errors.UserError: train.epochs must be at least 1, got 0: write 180
    """
    if not valid:
        raise UserError(f"{key} must be {domain}, got {value}: {remedy}")
