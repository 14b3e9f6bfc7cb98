"""SFW-Init, the stage before a new run's first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from sfw_dist.config import Config
from sfw_dist.data.loading import Loader
from sfw_dist.distributed.world import World, any_rank
from sfw_dist.errors import UserError
from sfw_dist.optim.initialization import sfw_init
from sfw_dist.pruning.outputs import logits_of
from sfw_dist.train.build_optimizer import constrained_groups, norm_rule
from sfw_dist.train.logger import Logger
from sfw_dist.train.signals import SignalHandler

PrepareBatch = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From a loader's images and labels, and the batch's number, to what the network and its loss take."""


class HalfBatches:
    """The training batches, epoch by epoch in their order, each split in two.

    Each of W ranks has every W-th image of a global batch, so that the ranks' halves together are the halves of the
    global batch, whatever W is.
    """

    def __init__(self, loader: Loader, prepare_batch: PrepareBatch) -> None:
        self._loader, self._prepare_batch = loader, prepare_batch
        self._epoch, self._count = 0, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._loader.load_state_dict({"epoch": self._epoch, "batch": 0})
        self._epoch += 1
        for images, labels in self._loader:
            inputs, targets = self._prepare_batch(images, labels, self._count)
            self._count += 1
            yield from zip(inputs.contiguous().chunk(2), targets.chunk(2), strict=True)


class _StoppedError(Exception):
    """A rank got a signal to stop."""


def run_sfw_init(
    model: nn.Module, config: Config, world: World, batches: HalfBatches, logger: Logger, signals: SignalHandler
) -> bool:
    """Learn a scale for each tensor of ``model`` and apply it; collective.

    Computes in float32 whatever the run's precision, and with a rank's whole part of a batch whatever
    ``train.accumulate``.

    Args:
        model: complete on every rank; moved to this rank's device.
        batches: the training batches in halves.

    Returns:
        False if a rank got a signal to stop; the model is then as it was.
    """
    model.to(world.device)
    # On a GPU, asking all ranks makes the host wait for the device, so it is done less often.
    votes_every = 1 if world.device.type == "cpu" else config.train.log_every

    def step_done(step: int, loss: float) -> None:
        logger.init_step(step, loss)
        if step < config.init.steps and step % votes_every == 0 and any_rank(signals.stop_requested, world):
            raise _StoppedError

    logger.init_begins(config.init.steps)
    try:
        scales = sfw_init(
            model,
            lambda output, labels: F.cross_entropy(logits_of(output), labels),
            batches,
            constrained_groups(model, config.optimizer, norm_rule(config)),
            lr=config.optimizer.lr,
            rescale=config.optimizer.rescale,
            steps=config.init.steps,
            kappa=config.init.kappa,
            floor_weight=config.init.floor,
            progress=step_done,
        )
    except _StoppedError:
        return False
    logger.init_done(scales)
    return True


def check_half_batches(config: Config, world_size: int) -> None:
    """Check that a rank's part of a batch can be split in two.

    Raises:
        UserError: a rank has fewer than two images of a batch.
    """
    batch = config.data.batch_size
    if config.init.steps and batch < 2 * world_size:
        raise UserError(
            f"data.batch_size {batch} leaves fewer than two images on each of {world_size} ranks, and init.steps "
            f"needs two: write {2 * world_size}, or init.steps 0"
        )
