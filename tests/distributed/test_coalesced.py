"""Several talks in one: each hears what it would hear alone, in as many messages as the longest takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sfw_dist.distributed.coalesced import AsyncTask, as_numbers, as_words, run_coalesced


def counting(rounds: int, size: int) -> AsyncTask:
    """Says ``size`` ones in each round, and returns all that it heard."""
    heard = []
    for _ in range(rounds):
        heard.append((yield torch.ones(size, 2, dtype=torch.int32)).clone())
    return heard


def test_talks_of_different_length_share_their_messages() -> None:
    """Fails when a talk hears another's words, or one that has ended holds the others up."""
    messages = []

    def add_up(words: Tensor) -> None:
        messages.append(words.numel())
        words.mul_(3)

    found = run_coalesced([counting(2, 1), counting(0, 9), counting(3, 2)], add_up)
    assert messages == [6, 6, 4]
    assert found[1] == []
    assert [x.tolist() for x in found[0]] == [[[3, 3]]] * 2
    assert [x.tolist() for x in found[2]] == [[[3, 3], [3, 3]]] * 3


def test_without_talks_nothing_is_sent() -> None:
    """Fails when ranks that have nothing to say wait for each other."""
    assert run_coalesced([], lambda words: 1 / 0) == []


def test_numbers_arrive_as_they_were() -> None:
    """Fails when a sum with other ranks' zeros changes a bit: of -0, of the smallest number, of NaN."""
    numbers = torch.tensor([-0.0, 5e-324, float("nan"), float("-inf"), 1 / 3], dtype=torch.float64)
    words = as_words(numbers) + torch.zeros(10, dtype=torch.int32)
    back = as_numbers(torch.cat([torch.zeros(1, dtype=torch.int32), words])[1:])  # at an odd place of a message
    assert torch.equal(back.view(torch.int64), numbers.view(torch.int64))
