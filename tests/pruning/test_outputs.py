"""The class scores in what a model returns."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfw_dist.errors import UserError
from sfw_dist.pruning.outputs import logits_of

SCORES, LOSS, FEATURES = torch.zeros(2, 3), torch.tensor(0.5), torch.ones(2, 9)
Named = namedtuple("Named", "aux logits")


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(SCORES, id="tensor"),
        pytest.param(SimpleNamespace(loss=LOSS, logits=SCORES), id="object"),
        pytest.param({"loss": LOSS, "logits": SCORES}, id="dictionary"),
        pytest.param(OrderedDict(out=SCORES, aux=FEATURES), id="segmentation"),
        pytest.param((SCORES, FEATURES), id="tuple"),
        pytest.param([SCORES], id="list"),
        pytest.param((LOSS, SCORES, FEATURES), id="after the loss"),
        pytest.param(Named(aux=FEATURES, logits=SCORES), id="named tuple"),
    ],
)
def test_logits_are_found_in_every_common_output(output: Any) -> None:
    assert logits_of(output) is SCORES


@pytest.mark.parametrize(
    ("output", "described"),
    [
        pytest.param({"boxes": SCORES, "scores": SCORES}, "a dict with boxes, scores,", id="dictionary"),
        pytest.param((LOSS,), "a tuple of Tensor,", id="a loss alone"),
        pytest.param((), "a tuple of nothing,", id="empty"),
        pytest.param(["a", SCORES], "a list of str, Tensor,", id="text"),
        pytest.param({"logits": "a"}, "a dict with logits,", id="no tensor"),
        pytest.param(None, "nothing,", id="nothing"),
        pytest.param(3.0, "a float,", id="number"),
    ],
)
def test_other_outputs_are_named(output: Any, described: str) -> None:
    with pytest.raises(UserError, match=f"the model returns {described} in which no class scores"):
        logits_of(output)
