"""The check of one value."""

from __future__ import annotations

import pytest

from sfw_dist.config.check import require
from sfw_dist.errors import UserError


def test_a_refused_value_is_named_with_its_remedy() -> None:
    """Fails when a message lacks the key, the value or what to write instead."""
    require(True, "train.epochs", 3, "at least 1", "write 180")
    with pytest.raises(UserError, match=r"^train\.epochs must be at least 1, got 0: write 180$"):
        require(False, "train.epochs", 0, "at least 1", "write 180")
