"""Ctrl-C, SIGTERM and a scheduler's SIGUSR2 as a request to stop at the next step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupt:
    """While it is entered, SIGINT, SIGTERM and SIGUSR2 are only noted; afterwards the handlers are as before.

    The training loop looks at it between steps, where all ranks can agree to stop. Saving in a handler would find
    tensors half updated and other ranks inside a collective.
    """

    def __init__(self) -> None:
        self.requested = False
        self.preempted = False
        """Whether one of them was SIGUSR2: a scheduler wants the machine and will give it back."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.preempted |= number == signal.SIGUSR2
