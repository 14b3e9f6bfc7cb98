"""What a param group must be before SFW takes it: valid options, and a feasible start."""

from __future__ import annotations

import logging
import math
from typing import Any, get_args

import torch

from sfw_dist.constraints import Constraint
from sfw_dist.step import Rescale

logger = logging.getLogger(__name__)


def check_group(group: dict[str, Any]) -> None:
    """Raises ``ValueError`` for an option outside its domain."""
    if not 0 < group["lr"] < math.inf:
        raise ValueError(f"lr must be > 0, got {group['lr']}: write lr=1.0, and lr=0.05 for unconstrained groups")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}: write momentum=0.9")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}: write weight_decay=0.0005")
    if group["rescale"] not in get_args(Rescale):
        raise ValueError(f"rescale must be one of {', '.join(get_args(Rescale))}, got {group['rescale']!r}")
    if not isinstance(group["constraint"], Constraint):
        raise ValueError(f"a group's constraint must be a set such as KSparsePolytope, got {group['constraint']!r}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"SFW optimizes real floating-point parameters, got {parameter.dtype}")


@torch.no_grad()
def into_the_set(group: dict[str, Any]) -> None:
    """A feasible start: scale by the gauge the tensors that are outside their set."""
    for parameter in group["params"]:
        if parameter.numel() == 0:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no entries: leave it out")
        gauge = group["constraint"].gauge(parameter)
        if gauge > 1:
            parameter.copy_(parameter.double() / gauge)
            logger.info("a tensor of shape %s was %.3g times outside its set: scaled", tuple(parameter.shape), gauge)
