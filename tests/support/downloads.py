"""Published files without a network: what ``urlopen`` returns, and errors that must be one line."""

from __future__ import annotations

import hashlib
import io
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import NoReturn
from urllib.error import HTTPError

import pytest

from sfw_dist.data.datasets.download import Remote
from sfw_dist.errors import UserError


def error_of(call: Callable[[], object]) -> str:
    """The message of the UserError; it must be one line."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


def forbidden(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("must not be called")


def remote_of(content: bytes, name: str = "file.bin") -> Remote:
    return Remote(f"http://example.org/{name}", f"md5:{hashlib.md5(content).hexdigest()}")


class Response(io.BytesIO):
    """What ``urlopen`` returns; ``length`` is the announced one."""

    def __init__(self, content: bytes, status: int, length: int) -> None:
        super().__init__(content)
        self.status, self.headers = status, Message()
        self.headers["Content-Length"] = str(length)


class Server:
    """Serves ``content``; the connection ends after ``most`` bytes."""

    def __init__(self, content: bytes, most: int = 1 << 30, ranges: bool = True) -> None:
        self.content, self.most, self.ranges = content, most, ranges
        self.asked: list[str | None] = []

    def __call__(self, request: urllib.request.Request, timeout: float) -> Response:
        asked = request.get_header("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(self.content):
            raise HTTPError(request.full_url, 416, "Range Not Satisfiable", Message(), None)
        rest = self.content[start:]
        return Response(rest[: self.most], 206 if start else 200, len(rest))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text
