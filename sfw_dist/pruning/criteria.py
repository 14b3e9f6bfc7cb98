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

from sfw_dist.distributed.dtensor import entries_as, to_local, wrapped_as
from sfw_dist.errors import UserError
from sfw_dist.ops.shards import Shards
from sfw_dist.pruning.scope import FLOATS

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
    """Absolute values."""
    return {name: parameter.detach().abs() for name, parameter in parameters.items()}


def criterion_scores(criterion: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What a criterion gives to the prunable parameters; the scores lie as these do.

    Collective where parameters are DTensors, as is :func:`check_scores`.

    Raises:
        UserError: a parameter without scores, no dense real tensor, another shape, or NaN.
    """
    scores = CRITERIA[criterion](parameters)
    checked = {}
    for name, parameter in parameters.items():
        if name not in scores:
            raise UserError(f"criterion {criterion} gives no scores for {name}: it must score each parameter")
        checked[name] = _fitting(f"what criterion {criterion} gives for {name}", scores[name], parameter)
    unordered = Shards(checked).first_with(torch.isnan)
    if unordered is not None:
        if Shards(parameters).first_with(torch.isnan) is None:
            raise UserError(f"criterion {criterion} gives NaN for {unordered}: it must give numbers")
        raise UserError(f"{unordered} holds NaN, which has no {criterion}: prune a checkpoint from before it diverged")
    return checked


def check_scores(
    scores: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], model: nn.Module
) -> dict[str, Tensor]:
    """A user's own scores for the prunable parameters, in their order and on their devices.

    Args:
        scores: one tensor for each of ``parameters``, of its shape, finite, the largest entries being the ones to
            keep. Scores of other parameters of ``model`` are ignored. For a DTensor, a whole tensor or a DTensor.
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
        checked[name] = _fitting(f"scores[{name!r}]", scores[name], parameter)
    wrong = Shards(checked).first_with(lambda x: ~x.isfinite())
    if wrong is not None:
        raise UserError(f"scores[{wrong!r}] is not finite: give finite numbers, the lowest for what should go first")
    return checked


def _fitting(label: str, score: Tensor, parameter: nn.Parameter) -> Tensor:
    """A parameter's scores in a type that the selection takes, where the parameter's entries lie.

    Raises:
        UserError: no dense real tensor, or another shape; the message begins with ``label``.
    """
    if not isinstance(score, Tensor) or score.layout != torch.strided or score.is_complex() or score.is_meta:
        kind = f"{score.layout} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        where = " on the meta device" if isinstance(score, Tensor) and score.is_meta else ""
        raise UserError(f"{label} is {kind}{where}: give a dense tensor of real numbers")
    if score.shape != parameter.shape:
        raise UserError(f"{label} has shape {tuple(score.shape)}: give one score an entry, {tuple(parameter.shape)}")
    local = entries_as(score.detach(), parameter.detach()).to(to_local(parameter).device)
    return wrapped_as(local if local.dtype in FLOATS else local.to(torch.float64), parameter)
