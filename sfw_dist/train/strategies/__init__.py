"""How a model is trained on several ranks: what each keeps, and when they talk.

The engines (``engine: ddp | fsdp | deepspeed``) have one interface, :class:`Engine`, and write one kind of checkpoint.
"""

from __future__ import annotations

from torch import nn

from sfw_dist.config import Config
from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.train.strategies.base import Engine, autocast

__all__ = ["Engine", "autocast", "check_world", "open_engine"]


def open_engine(model: nn.Module, config: Config, world: World) -> Engine:
    """The engine that the configuration asks for, of a model that is the same on every rank; collective.

    Only that engine's packages are imported: DeepSpeed takes seconds.

    Raises:
        MissingExtraError: DeepSpeed cannot be imported.
    """
    match config.engine:
        case "ddp":
            from sfw_dist.train.strategies.ddp import DDPEngine

            return DDPEngine(model, config, world)
        case "fsdp":
            from sfw_dist.train.strategies.fsdp import FSDPEngine

            return FSDPEngine(model, config, world)
        case "deepspeed":
            from sfw_dist.train.strategies.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(model, config, world)


def check_world(config: Config, world_size: int) -> None:
    """Raise :class:`UserError` where the engine's settings do not fit the number of ranks."""
    parts, batch = config.train.accumulate, config.data.batch_size
    if batch % (world_size * parts):
        step = world_size * parts
        raise UserError(
            f"data.batch_size {batch} cannot be split over world size {world_size} and train.accumulate {parts}: "
            f"write {max(batch // step, 1) * step}, or a train.accumulate that divides {batch // world_size}"
        )
    replicas = config.fsdp.replicas
    if config.engine == "fsdp" and world_size % replicas:
        raise UserError(
            f"fsdp.replicas {replicas} does not divide world size {world_size}: "
            f"write {largest_divisor(world_size, replicas)}, or start a multiple of {replicas} ranks"
        )


def largest_divisor(of: int, at_most: int) -> int:
    return next(number for number in range(min(of, at_most), 0, -1) if of % number == 0)
