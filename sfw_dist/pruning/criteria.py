"""Pruning criteria: what makes an entry of a parameter worth keeping.

To add a criterion, write a function from the prunable parameters to a score for each of their entries and decorate it
with :func:`register`; ``prune(criterion=...)``, the configuration and the command lines then accept its name. For
scores that need more than the parameters (activations, data), pass ``prune(scores=...)`` and write nothing here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError

Criterion = Callable[[Mapping[str, nn.Parameter]], dict[str, Tensor]]
"""From the prunable parameters by name (``grad`` included) to scores of their shapes: the largest are kept."""

CRITERIA: dict[str, Criterion] = {}
"""The criteria by name."""


def register(criterion: Criterion) -> Criterion:
    """Add a criterion to ``CRITERIA`` under the name of its function.

    Example:
        >>> @register
        ... def saliency(parameters):
        ...     return {name: (p * p.grad).abs().detach() for name, p in parameters.items()}
        >>> sorted(CRITERIA)
        ['magnitude', 'saliency']
        >>> del CRITERIA["saliency"]
    """
    CRITERIA[criterion.__name__] = criterion
    return criterion


@register
def magnitude(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Absolute values. Raises :class:`UserError` for NaN."""
    for name, parameter in parameters.items():
        if parameter.isnan().any():
            raise UserError(f"{name} holds NaN, which has no magnitude: prune a checkpoint from before it diverged")
    return {name: parameter.detach().abs() for name, parameter in parameters.items()}


def check_scores(
    scores: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], model: nn.Module
) -> dict[str, Tensor]:
    """A user's own scores for the prunable parameters, in their order and on their devices.

    Args:
        scores: one tensor for each of ``parameters``, of its shape, finite, the largest entries being the ones to
            keep. Scores of other parameters of ``model`` are ignored.
        parameters: the prunable ones, by name.
        model: the network.

    Raises:
        UserError: a name that the model does not have, a parameter without scores, no dense real tensor, another
            shape, or a score that is not finite.
    """
    known = dict(model.named_parameters())
    for name in scores:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"scores[{name!r}] belongs to no parameter of the model: "
                + (f"did you mean {near[0]!r}?" if near else "write the names of model.named_parameters()")
            )
    checked = {}
    for name, parameter in parameters.items():
        if name not in scores:
            raise UserError(f"scores lack {name!r}: give a tensor of shape {tuple(parameter.shape)} for it")
        score = scores[name]
        kind = type(score).__name__ if not isinstance(score, Tensor) else f"{score.layout} {score.dtype}"
        if not isinstance(score, Tensor) or score.is_sparse or score.is_complex():
            raise UserError(f"scores[{name!r}] is {kind}: give a dense tensor of real numbers")
        score = score.detach()
        if score.shape != parameter.shape:
            raise UserError(
                f"scores[{name!r}] has shape {tuple(score.shape)}: give one score an entry, {tuple(parameter.shape)}"
            )
        if not score.isfinite().all():
            raise UserError(f"scores[{name!r}] is not finite: give finite numbers, the lowest for what should go first")
        checked[name] = (score if score.is_floating_point() else score.to(torch.float64)).to(parameter.device)
    return checked
