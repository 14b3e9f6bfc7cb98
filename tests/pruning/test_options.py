"""The options as one value, and the older words for them."""

from __future__ import annotations

from typing import Any

import pytest

from sfw_dist.errors import UserError
from sfw_dist.pruning import PruningOptions
from sfw_dist.pruning.options import OLD_KINDS, without_old_words


@pytest.mark.parametrize("kind", OLD_KINDS)
def test_result_files_are_read_in_either_words(kind: str) -> None:
    """A run from before is taken for another pruning, or a file does not say what it was written for."""
    old = PruningOptions.of_record({"scope": "all", "kind": kind, "top1": 0.5})
    assert (old.granularity, old.ranking, old.criterion, old.scope) == (*OLD_KINDS[kind], "magnitude", "all")
    assert old.record()["kind"] == kind
    assert PruningOptions.of_record(old.record()) == old


def test_what_a_record_leaves_open_is_the_defaults() -> None:
    """Arrays from before recorded null for what was the run's; recalibration is not even a key in the oldest."""
    default = PruningOptions(scope="all", granularity="filter", ranking="layerwise", recalibrate=7)
    assert PruningOptions.of_record({"scope": None, "kind": None, "tasks": [[0.5]]}, default) == default
    assert PruningOptions.of_record({"kind": "2:4"}, default) == PruningOptions("all", "2:4", recalibrate=7)


def test_two_of_four_without_an_older_word_is_recorded_as_2_4() -> None:
    """The key ``kind`` of a file must stay readable by those who know the older words alone."""
    assert PruningOptions(granularity="2:4", ranking="layerwise").record()["kind"] == "2:4"


def test_two_of_four_takes_one_sparsity_whatever_is_configured() -> None:
    """The configured list of 19 ends in an error in one command, and in [0.5] in another."""
    assert PruningOptions(granularity="2:4").default_sparsities([0.0, 0.9]) == [0.5]
    assert PruningOptions(granularity="filter").default_sparsities([0.0, 0.9]) == [0.0, 0.9]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scope": "weight"}, "unknown scope 'weight': choose one of weights, all"),
        ({"granularity": "filters"}, "unknown granularity 'filters': choose one of weight, 2:4, filter, rank"),
        ({"ranking": "local"}, "unknown ranking 'local': choose one of global, layerwise"),
        ({"recalibrate": -1}, "recalibrate must be at least 0, got -1: write 50, or 0 for none"),
        ({"granularity": "rank", "ranking": "layerwise"}, "got ranking layerwise: write ranking global"),
    ],
)
def test_wrong_options_are_told_when_they_are_made(options: dict[str, Any], told: str) -> None:
    """A job of an array meets them after an hour in the queue."""
    with pytest.raises(UserError, match=told) as caught:
        PruningOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "rank"}, "unknown kind 'rank': choose one of global, .*low_rank"),
        ({"kind": None}, "unknown kind None"),
        ({"kind": "filters", "ranking": "global"}, "kind filters .* got ranking too: leave kind out"),
    ],
)
def test_older_words_do_not_mix_with_new_ones(options: dict[str, Any], told: str) -> None:
    """One of two words that contradict each other is passed over."""
    with pytest.raises(UserError, match=told):
        without_old_words(options)
