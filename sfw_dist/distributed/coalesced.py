"""Several algorithms that talk between ranks, their messages sent together: what counts is the latency of a message.

Each algorithm is a generator that yields what this rank has to say, an int32 tensor of a shape that is the same on all
ranks, and gets back the sum over the ranks. All that is said in one round travels in one all-reduce. Numbers that are
no counts are sent bit by bit (:func:`as_words`), each by one rank while the others send zeros, so that they arrive as
they were, whatever the order in which a backend adds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

Talk = Generator[Tensor, Tensor, Any]
"""Yields int32 tensors, is sent their sums over the ranks, returns its result."""


def together(talks: Sequence[Talk], add_up: Callable[[Tensor], object]) -> list[Any]:
    """The results of all ``talks``; ``add_up`` all-reduces an int32 tensor in place, once a round."""
    results: list[Any] = [None] * len(talks)
    said: dict[int, Tensor] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(talks)))
    while answers:
        for i, answer in answers.items():
            try:
                said[i] = talks[i].send(answer)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                results[i] = end.value
        message = torch.cat([words.reshape(-1) for words in said.values()]) if said else None
        if message is not None:
            add_up(message)
            parts = message.split([words.numel() for words in said.values()])
            answers = {i: part.view(said[i].shape) for i, part in zip(said, parts, strict=True)}
        else:
            answers = {}
        said = {}
    return results


def as_words(numbers: Tensor) -> Tensor:
    """float64 as int32 words, twice as many along the last dimension; :func:`as_numbers` is the inverse."""
    return numbers.contiguous().view(torch.int32)


def as_numbers(words: Tensor) -> Tensor:
    """The float64 of which :func:`as_words` made words; they may lie anywhere in a message."""
    return words.clone().view(torch.float64)
