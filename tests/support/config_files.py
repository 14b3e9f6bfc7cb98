"""Reading configurations in tests, and the message with which one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfw_dist.config import Config, parse_run
from sfw_dist.errors import UserError

Write = Callable[..., Path]


def parse(*argv: str | Path) -> Config:
    return parse_run([str(argument) for argument in argv])[0]


def error_of(*argv: str | Path) -> str:
    """The message that ``argv`` is refused with; it must be one line."""
    with pytest.raises(UserError) as raised:
        parse(*argv)
    message = str(raised.value)
    assert "\n" not in message
    return message


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
