"""Loaders and batches of every kind, as a sweep reads them: what is copied, left out and refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sfw_dist import sweep
from sfw_dist.errors import UserError


def test_a_metric_that_changes_its_targets_does_not_change_the_next_ones() -> None:
    """Fails when the second sparsity is compared with what the first one has left, or the caller's data change."""

    def metric(output: Tensor, target: Any) -> float:
        target.pair["labels"] += 1
        return float(target.pair["labels"].sum())

    class Target(NamedTuple):
        pair: dict[str, Tensor]

    labels = torch.arange(4)
    curve = sweep(nn.Linear(6, 7), [(torch.ones(4, 6), Target({"labels": labels}))], [0.0, 0.5, 0.8], metric=metric)
    assert [point.metrics["metric"] for point in curve] == [10.0] * 3 and labels.tolist() == [0, 1, 2, 3]


def test_batches_without_samples_have_no_weight() -> None:
    """Fails when the mean of nothing, NaN, becomes the mean of all."""
    net, some = nn.Linear(6, 7), [torch.ones(4, 6), torch.ones(0, 6)]
    (point,) = sweep(net, some, [0.5], metric=lambda output, _: output.mean())
    (alone,) = sweep(net, some[:1], [0.5], metric=lambda output, _: output.mean())
    assert point == alone and point.samples == 4


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        (nn.Flatten(), {}, "^Flatten has no parameters: give a model with weights$"),
        (nn.LazyLinear(7), {}, "^weight is not initialised yet: run one batch through the model first$"),
        (nn.Linear(6, 7), {"loader": None}, "^loader is None, which gives no batches: give a DataLoader"),
        (nn.Linear(6, 7), {"calibration": 5}, "^calibration is 5, which gives no batches: give a DataLoader"),
        (nn.Linear(6, 7), {"metric": "accuracy"}, "^metric is 'accuracy': give a function of"),
    ],
    ids=["no weights", "lazy", "no loader", "number", "no function"],
)
def test_what_cannot_be_measured_is_told_in_one_line(model: nn.Module, words: dict[str, Any], told: str) -> None:
    """Fails when it is a traceback out of torch or Python."""
    with pytest.raises(UserError, match=told):
        sweep(**{"model": model, "loader": [torch.ones(4, 6)], "sparsities": [0.5], **words})
