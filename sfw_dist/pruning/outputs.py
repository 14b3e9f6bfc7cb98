"""From what a model returns to its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfw_dist.errors import UserError

_NAMES = ("logits", "out")
"""What the class scores are called in Hugging Face's outputs, and in those of torchvision's segmentation models."""


def logits_of(output: Any) -> Tensor:
    """The class scores in what a model returns.

    Args:
        output: a tensor; an object or a dictionary in which they are named ``logits`` or, in a dictionary, ``out``; or
            a tuple or list that begins with them, where a loss (a single number) may stand before.

    Raises:
        UserError: none of these.

    Example:
        >>> import torch
        >>> scores = torch.zeros(2, 3)
        >>> found = [logits_of(output) for output in (scores, {"logits": scores}, (torch.tensor(0.7), scores))]
        >>> all(logits is scores for logits in found)
        True
    """
    found = output
    if isinstance(output, Mapping):
        found = next((output[name] for name in _NAMES if name in output), None)
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, tuple | list):
            found = next((entry for entry in output if not (isinstance(entry, Tensor) and entry.ndim == 0)), None)
    if not isinstance(found, Tensor):
        raise UserError(
            f"the model returns {_described(output)}, in which no class scores are found: return them as a tensor, "
            "first in a tuple, or in a dictionary under the name logits"
        )
    return found


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"a {kind} of {', '.join(type(entry).__name__ for entry in output) or 'nothing'}"
    return "nothing" if output is None else f"a {kind}"
