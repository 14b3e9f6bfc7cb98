"""How far a sweep has come, in one line of a terminal or for a function of the caller's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int | None], None]
"""Called with what is done ("measured", "recalibrated"), the batches done, and all batches, if that is known."""

_INTERVAL = 0.2
"""Seconds between two lines."""


def reported(
    batches: Iterable[T], what: str, progress: bool | Progress | None, *, most: int | None = None
) -> Iterator[T]:
    """The batches; each that is finished is reported.

    Args:
        batches: a loader, of a known length or not.
        what: is done with them.
        progress: who is told; ``True``: a line on stderr; ``None``: the same if stderr is a terminal.
        most: how many batches are taken at most.
    """
    total = _length(batches)
    total = most if total is None else total if most is None else min(total, most)
    progress = sys.stderr.isatty() if progress is None else progress
    tell = _Line() if progress is True else progress or None
    done = 0
    try:
        for batch in batches if most != 0 else ():
            yield batch
            done += 1
            if tell is not None:
                tell(what, done, total)
            if done == most:
                return
    finally:
        if isinstance(tell, _Line):
            tell.end()


class _Line:
    """One line of stderr, written again and again."""

    def __init__(self) -> None:
        self._width, self._next = 0, 0.0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if time.monotonic() >= self._next or done == total:
            text = f"{what} {done} of {total} batches" if total is not None else f"{what} {done} batches"
            self._write(text)
            self._next = time.monotonic() + _INTERVAL

    def end(self) -> None:
        """Leave an empty line."""
        if self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        print(f"\r{text:{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(text)


def _length(batches: object) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader of an iterable data set
        return None
