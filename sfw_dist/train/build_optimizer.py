"""Builds the optimizer that a configuration names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from sfw_dist.config import Config, OptimizerConfig
from sfw_dist.constraints import constrain
from sfw_dist.constraints.binding import NormRule
from sfw_dist.optim.baselines import AdaGradSFW, ProjectedSGD
from sfw_dist.optim.sfw import SFW


def norm_rule(config: Config) -> NormRule:
    """Return which norms ``tau`` refers to in a run, see :func:`~sfw_dist.constrain`.

    SFW-Init scales the weights between its own use of the sets and the optimizer's: with it the initializers' norms
    count, so that both have the same sets.
    """
    return "initializer" if config.init.steps else "auto"


def build_optimizer(model: nn.Module, config: OptimizerConfig, norm: NormRule = "auto") -> Optimizer:
    """Build the optimizer that the configuration names, over all of ``model``'s parameters, by name.

    Args:
        model: with new weights, unless ``norm`` is ``"initializer"``.
        config: the optimizer's.
        norm: as in :func:`~sfw_dist.constrain`.

    Example:
        >>> type(build_optimizer(nn.Linear(4, 2), OptimizerConfig(name="sgd", lr=0.1))).__name__
        'SGD'
    """
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    match config.name:
        case "sgd":
            return SGD(list(model.named_parameters()), **options)
        case "projected_sgd":
            return ProjectedSGD(constrained_groups(model, config, norm), **options)
        case "adagrad_sfw":
            return AdaGradSFW(constrained_groups(model, config, norm), **options)
        case "sfw":
            return SFW(constrained_groups(model, config, norm), rescale=config.rescale, **options)


def constrained_groups(model: nn.Module, config: OptimizerConfig, norm: NormRule) -> list[dict[str, Any]]:
    """Make the param groups of an optimizer with constraint sets; arguments as for :func:`build_optimizer`.

    Returns:
        One group for each constrained tensor, with the set of the first epoch, and one for the unconstrained tensors,
        with ``config.unconstrained_lr``.
    """
    of_first_epoch = config.constraint
    if config.k_schedule.kind != "none":
        of_first_epoch = replace(of_first_epoch, k_frac=config.k_schedule.start)
    groups = constrain(model, of_first_epoch.build(), unconstrained=config.unconstrained, norm=norm)
    for group in groups:
        if group["constraint"].is_unconstrained:
            group["lr"] = config.unconstrained_lr
    return groups
