"""What every field's check says."""

from __future__ import annotations

from sfw_dist.errors import UserError


def require(valid: bool, key: str, value: object, domain: str, remedy: str) -> None:
    """Raise :class:`UserError` with the key, the value and the remedy where a value is not valid."""
    if not valid:
        raise UserError(f"{key} must be {domain}, got {value}: {remedy}")
