"""The optimizer that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from sfw_dist.config import OptimizerConfig
from sfw_dist.constraints import constrain
from sfw_dist.optim.baselines import AdaGradSFW, ProjectedSGD
from sfw_dist.optim.sfw import SFW


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that the configuration asks for, over all of ``model``'s parameters, which it knows by name."""
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    match config.name:
        case "sgd":
            return SGD(list(model.named_parameters()), **options)
        case "projected_sgd":
            return ProjectedSGD(constrained_groups(model, config), **options)
        case "adagrad_sfw":
            return AdaGradSFW(constrained_groups(model, config), **options)
        case "sfw":
            return SFW(constrained_groups(model, config), rescale=config.rescale, **options)


def constrained_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """One param group a constrained tensor, and one of the unconstrained, with a learning rate of its own."""
    of_first_epoch = config.constraint
    if config.k_schedule.kind != "none":
        of_first_epoch = replace(of_first_epoch, k_frac=config.k_schedule.start)
    groups = constrain(model, of_first_epoch.build(), unconstrained=config.unconstrained)
    for group in groups:
        if group["constraint"].is_unconstrained:
            group["lr"] = config.unconstrained_lr
    return groups
