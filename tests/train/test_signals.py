"""Ctrl-C, SIGTERM and SIGUSR2: a request, never an exception, and nothing left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from sfw_dist.train.signals import SignalHandler

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]


class HandlerError(Exception):
    """What the handlers raise that a test finds in place."""


@pytest.fixture(autouse=True)
def raising_handlers() -> Iterator[None]:
    """Handlers that raise, so that no signal of a failing test ends the tests."""

    def stop(number: int, frame: object) -> None:
        raise HandlerError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_only_noted(number: signal.Signals) -> None:
    """Fails when a signal interrupts a step in the middle, or is lost."""
    with SignalHandler() as signals:
        assert not signals.stop_requested
        signal.raise_signal(number)
        assert signals.stop_requested and signals.preempted == (number == signal.SIGUSR2)
        signal.raise_signal(number)  # an impatient second one does not raise either


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_former_handlers_are_restored(number: signal.Signals, fails: bool) -> None:
    """Fails when a script cannot be stopped any more after training, or after training has raised."""
    if fails:
        with pytest.raises(RuntimeError), SignalHandler():
            raise RuntimeError
    else:
        with SignalHandler():
            pass
    with pytest.raises(HandlerError):
        signal.raise_signal(number)


def test_each_handler_begins_without_a_request() -> None:
    """Fails when the flag is shared: a second training in one process would stop at its first step."""
    with SignalHandler():
        signal.raise_signal(signal.SIGINT)
    with SignalHandler() as second:
        assert not second.stop_requested
