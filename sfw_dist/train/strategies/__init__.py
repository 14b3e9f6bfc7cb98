"""How a model is trained on several ranks: what each rank keeps, and when they communicate.

The strategies (``engine: ddp | fsdp | deepspeed`` in a configuration) have one interface, :class:`Strategy`, and write
one kind of checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from sfw_dist.config import Config
from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.train.strategies.base import Strategy, autocast

__all__ = ["Strategy", "autocast", "build_strategy", "check_world"]


def build_strategy(
    model: nn.Module, config: Config, world: World, called: Collection[nn.Module] | None = None
) -> Strategy:
    """Build the strategy that ``config.engine`` names; collective.

    Only that strategy's packages are imported: DeepSpeed takes seconds.

    Args:
        model: the same on every rank.
        config: the run.
        world: this rank and the others.
        called: the modules that the network calls; ``None``: all but those inside torch's own.

    Raises:
        MissingExtraError: DeepSpeed cannot be imported.
    """
    match config.engine:
        case "ddp":
            from sfw_dist.train.strategies.ddp import DDPStrategy

            return DDPStrategy(model, config, world)
        case "fsdp":
            from sfw_dist.train.strategies.fsdp import FSDPStrategy

            return FSDPStrategy(model, config, world, called)
        case "deepspeed":
            from sfw_dist.train.strategies.deepspeed import DeepSpeedStrategy

            return DeepSpeedStrategy(model, config, world)


def check_world(config: Config, world_size: int) -> None:
    """Check that the batch and the strategy's settings fit the number of ranks.

    Raises:
        UserError: a micro-batch or a replica would not be a whole number of images or ranks.
    """
    accumulate, batch = config.train.accumulate, config.data.batch_size
    if batch % (world_size * accumulate):
        step = world_size * accumulate
        raise UserError(
            f"data.batch_size {batch} cannot be split over world size {world_size} and train.accumulate {accumulate}: "
            f"write {max(batch // step, 1) * step}, or a train.accumulate that divides {batch // world_size}"
        )
    replicas = config.fsdp.replicas
    if config.engine == "fsdp" and world_size % replicas:
        raise UserError(
            f"fsdp.replicas {replicas} does not divide world size {world_size}: "
            f"write {largest_divisor(world_size, replicas)}, or start a multiple of {replicas} ranks"
        )


def largest_divisor(of: int, at_most: int) -> int:
    """Return the largest divisor of ``of`` that is at most ``at_most``."""
    return next(number for number in range(min(of, at_most), 0, -1) if of % number == 0)
