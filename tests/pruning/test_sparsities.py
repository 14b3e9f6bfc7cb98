"""Lists of sparsities, and their range."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    PAPER_SPARSITIES,
    parse_sparsities,
    prune,
)
from tests.support.pruning import (
    small_net,
)


def test_parse_sparsities_is_exact_in_decimal() -> None:
    """(0.99 - 0.9) / 0.01 is 8.999999999999996 in floating point: the last point would be missing."""
    assert parse_sparsities("0.9:0.99:0.01") == [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99]
    assert parse_sparsities("0.95, 0.5,0.9:0.95:0.05,0") == [0.0, 0.5, 0.9, 0.95]
    assert parse_sparsities("0.1:0.6:0.2") == [0.1, 0.3, 0.5]
    assert list(PAPER_SPARSITIES) == [i / 10 for i in range(1, 10)] + [i / 100 for i in range(91, 100)]


@pytest.mark.parametrize(
    "piece",
    [
        "",
        "x",
        "nan",
        "0.1:0.2",
        "0.1:0.2:0.1:0.1",
        "90",
        "-0.1",
        "1",
        "0.9:0.5:0.1",
        "0.1:0.5:0",
        "0:0.5:inf",
        "0:0.5:nan",
    ],
)
def test_bad_sparsities_are_told_piece_by_piece(piece: str) -> None:
    """An empty range silently evaluates nothing; a step of 0 never ends."""
    with pytest.raises(UserError) as caught:
        parse_sparsities(f"0.5,{piece},0.9")
    assert repr(piece) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sparsity", "told"),
    [
        (90, "write 0.9 for 90 %"),
        (97.5, "write 0.975 for 97.5 %"),
        (1.0, "1 would leave nothing"),
        (-0.1, "got -0.1"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        (torch.tensor(0.9), "got tensor(0.9000): write float(tensor(0.9000))"),
        (Fraction(9, 10), "got Fraction(9, 10)"),
        (False, "got False"),
        ("0.9", "got '0.9'"),
    ],
)
def test_a_sparsity_that_is_none_names_value_and_remedy(sparsity: Any, told: str) -> None:
    """90 read as "keep nothing" would write a network of zeros over the user's model."""
    model = small_net()
    with pytest.raises(UserError, match="sparsity") as caught:
        prune(model, sparsity)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(parameter.count_nonzero() for parameter in (model.get_parameter(f"{i}.weight") for i in (0, 2, 4)))
