"""What a fresh run does before its first step: SFW-Init, where the configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from sfw_dist.config import Config
from sfw_dist.data.loading import Loader
from sfw_dist.distributed.world import World, any_rank
from sfw_dist.errors import UserError
from sfw_dist.optim.initialization import sfw_init
from sfw_dist.train.build_optimizer import constrained_groups
from sfw_dist.train.logger import Progress
from sfw_dist.train.signals import Interrupt

Prepare = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From a loader's images and labels, and their number, to what the network and its loss take."""


class HalfBatches:
    """The training batches, epoch by epoch in their order, each cut in two.

    Each of W ranks has every W-th image of a global batch, so that its halves are parts of the global batch's.
    """

    def __init__(self, loader: Loader, prepare: Prepare) -> None:
        self._loader, self._prepare = loader, prepare
        self._epoch, self._count = 0, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._loader.load_state_dict({"epoch": self._epoch, "batch": 0})
        self._epoch += 1
        for images, labels in self._loader:
            inputs, targets = self._prepare(images, labels, self._count)
            self._count += 1
            yield from zip(inputs.contiguous().chunk(2), targets.chunk(2), strict=True)


class _InterruptedError(Exception):
    """A rank was interrupted."""


def learn_scales(
    model: nn.Module, config: Config, world: World, batches: HalfBatches, progress: Progress, interrupt: Interrupt
) -> bool:
    """Scale ``model``, which every rank has whole, on this rank's device; False, and as it was, when interrupted.

    In float32 whatever the run's precision, and a rank's part of a batch at once whatever ``train.accumulate``.
    Collective.
    """
    model.to(world.device)
    # On a GPU a vote makes the host wait once more.
    votes_every = 1 if world.device.type == "cpu" else config.train.log_every

    def note(step: int, loss: float) -> None:
        progress.init_step(step, loss)
        if step < config.init.steps and step % votes_every == 0 and any_rank(interrupt.requested, world):
            raise _InterruptedError

    progress.init_begins(config.init.steps)
    try:
        scales = sfw_init(
            model,
            F.cross_entropy,
            batches,
            constrained_groups(model, config.optimizer),
            lr=config.optimizer.lr,
            rescale=config.optimizer.rescale,
            steps=config.init.steps,
            kappa=config.init.kappa,
            floor_weight=config.init.floor,
            progress=note,
        )
    except _InterruptedError:
        return False
    progress.init_done(scales)
    return True


def check_halves(config: Config, world_size: int) -> None:
    """Raise :class:`UserError` where a rank's part of a batch cannot be cut in two."""
    batch = config.data.batch_size
    if config.init.steps and batch < 2 * world_size:
        raise UserError(
            f"data.batch_size {batch} leaves fewer than two images on each of {world_size} ranks, and init.steps "
            f"needs two: write {2 * world_size}, or init.steps 0"
        )
