"""Ctrl-C, SIGTERM and a scheduler's SIGUSR2 as a request to stop after the current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class SignalHandler:
    """A context manager in which SIGINT, SIGTERM and SIGUSR2 only set a flag; on exit the old handlers come back.

    The training loop reads the flag between steps, where all ranks can agree to stop. A handler that saved by itself
    would find tensors half updated and other ranks inside a collective.

    Example:
        >>> with SignalHandler() as signals:
        ...     signal.raise_signal(signal.SIGUSR2)
        ...     signals.stop_requested, signals.preempted
        (True, True)
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.preempted = False
        """Whether one of the signals was SIGUSR2: a scheduler takes the machine and will run the job again."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        self._previous = {number: signal.signal(number, self._request_stop) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        self.preempted |= number == signal.SIGUSR2
