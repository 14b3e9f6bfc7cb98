"""Algorithms that exchange several small messages, run side by side so that each round is one all-reduce.

The latency of a message counts here, not its size. Each algorithm is a generator, an :data:`AsyncTask`: it yields what
this rank contributes, an int32 tensor whose shape is the same on all ranks, and receives the sum over the ranks.
Counts are summed as they are. A float64 travels as two int32 words (:func:`as_words`) that one rank contributes while
all others contribute zeros, so that it arrives bit for bit, in whatever order a backend adds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

AsyncTask = Generator[Tensor, Tensor, Any]
"""Yields int32 tensors, receives their sums over the ranks, returns its result."""


def coalesce(tasks: Sequence[AsyncTask]) -> AsyncTask:
    """One task that runs several in lockstep, each round's messages joined into one.

    Args:
        tasks: in the same order on every rank; they may need different numbers of rounds.

    Returns:
        The tasks' results, in their order.
    """
    results: list[Any] = [None] * len(tasks)
    replies: dict[int, Tensor | None] = dict.fromkeys(range(len(tasks)))
    while replies:
        messages: dict[int, Tensor] = {}
        for i, reply in replies.items():
            try:
                messages[i] = tasks[i].send(reply)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                results[i] = end.value
        if not messages:
            break
        total = yield torch.cat([message.reshape(-1) for message in messages.values()])
        sizes = [message.numel() for message in messages.values()]
        replies = {i: part.view(messages[i].shape) for i, part in zip(messages, total.split(sizes), strict=True)}
    return results


def run_coalesced(tasks: Sequence[AsyncTask], all_reduce: Callable[[Tensor], object]) -> list[Any]:
    """Run tasks to their ends, one all-reduce a round.

    Args:
        tasks: see :func:`coalesce`.
        all_reduce: sums an int32 tensor over the ranks, in place.

    Returns:
        The tasks' results, in their order.

    Example:
        >>> import torch
        >>> def double(x):
        ...     total = yield torch.tensor([x], dtype=torch.int32)
        ...     return int(total)
        >>> run_coalesced([double(3), double(4)], lambda message: message.mul_(2))  # two ranks with equal messages
        [6, 8]
    """
    together, reply = coalesce(tasks), None
    while True:
        try:
            message = together.send(reply)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            results: list[Any] = end.value
            return results
        all_reduce(message)
        reply = message


def as_words(numbers: Tensor) -> Tensor:
    """float64 as int32 words, two for each number along the last dimension; :func:`as_numbers` is the inverse."""
    return numbers.contiguous().view(torch.int32)


def as_numbers(words: Tensor) -> Tensor:
    """The float64 numbers behind the words of :func:`as_words`, wherever in a message these lie."""
    return words.clone().view(torch.float64)
