"""The gradients that a step takes, and the checks before it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.distributed.replicas import differences
from sfw_dist.errors import UserError
from sfw_dist.optim.param_groups import entries
from sfw_dist.optim.sharding.interface import Distributor


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient that a step takes; of a frozen parameter none, though an old one may still be there."""
    return parameter.grad if parameter.requires_grad else None


def check_gradients(
    groups: Sequence[dict[str, Any]], distributors: Iterable[Distributor], is_member: Callable[[Tensor], bool]
) -> None:
    """Raise :class:`UserError` for gradients that no step can take."""
    for shard in (shard for distributor in distributors for shard in distributor.shards):
        gradient = gradient_of(shard.parameter)
        if gradient is None:
            continue
        if gradient.shape != shard.parameter.shape:
            shapes = f"{tuple(gradient.shape)}, and the parameter {tuple(shard.parameter.shape)}"
            raise UserError(f"the gradient of {shard.name} has shape {shapes}: call zero_grad after resizing it")
        if gradient.is_sparse:
            raise UserError(f"{shard.name} has a sparse gradient: SFW needs dense ones (nn.Embedding(sparse=False))")
    frozen = [p for group in groups for p in group["params"] if not (p.requires_grad or is_member(p))]
    if any(parameter.grad is not None for parameter in frozen):
        name = next(e.name for e in entries(groups) if e.parameter.grad is not None and not is_member(e.parameter))
        raise UserError(
            f"{name} has a gradient and requires_grad=False: set requires_grad to train it, or grad to None"
        )


def verify_first_step(tensors: Mapping[str, Tensor], ranks: RankGroup, *, gradients_are_reduced: bool) -> None:
    """Compare the ranks' parameters, and their gradients if they should be the same; collective.

    Raises:
        UserError: parameters differ.

    Warns:
        UserWarning: on rank 0, gradients differ.
    """
    if ranks.size == 1:
        return
    if found := differences(tensors, ranks):
        raise UserError(
            f"at the first step parameters differ between ranks that should hold replicas ({found}): wrap the model in "
            "DistributedDataParallel, or seed all ranks alike; with a model of its own on each rank give the optimizer "
            "the ranks that share one as process_group="
        )
    gradients = {name: gradient_of(parameter) for name, parameter in tensors.items()} if gradients_are_reduced else {}
    if (found := differences(gradients, ranks)) and ranks.rank == 0:
        warnings.warn(
            f"at the first step gradients differ between ranks ({found}), so SFW takes each from the tensor's owner "
            "alone: call the model through DistributedDataParallel, which averages them, not through its .module",
            stacklevel=2,
        )
