"""The training loop."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfw_dist.config import Config
from sfw_dist.data.loading import Loader, Split
from sfw_dist.distributed.world import World, any_rank, barrier, gather_floats
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.models.check import check_network
from sfw_dist.optim.sfw import SFW
from sfw_dist.train import checkpoint
from sfw_dist.train.init_stage import HalfBatches, run_sfw_init
from sfw_dist.train.inputs import BatchPreparation, check_input, open_loaders
from sfw_dist.train.k_schedule import KSchedule
from sfw_dist.train.logger import Logger, open_logger
from sfw_dist.train.lr_schedule import LRSchedule
from sfw_dist.train.metrics import Metrics, measure
from sfw_dist.train.run_folder import RunFolder, exclusive_lock
from sfw_dist.train.signals import SignalHandler
from sfw_dist.train.sparse_training import PREFIX as METHOD_PREFIX
from sfw_dist.train.sparse_training import build_training_method
from sfw_dist.train.strategies import build_strategy

INTERRUPTED = 130
"""Exit status of a training that a signal stopped: 128 + SIGINT, as shells have it."""


def train(config: Config, world: World, *, resume: bool = False, signals: SignalHandler | None = None) -> int:
    """Train a run to its last epoch, or until a signal stops it; collective.

    Args:
        config: the run.
        world: this rank and the others.
        resume: whether an existing run may be resumed, from its newest checkpoint.
        signals: a handler that the caller has entered already; by default one is entered at the first step.

    Returns:
        The exit status: 0, or ``INTERRUPTED``.

    Raises:
        UserError: bad input, before anything is written; or a loss that is not finite.
    """
    # Everything that can be wrong with the input shows here, before the run's folder is made.
    run = check_input(config, world.rank, world.size, resume=resume)
    loaders = open_loaders(config, world)
    batches = BatchPreparation(config, world.device)
    begins = checkpoint.newest(run.checkpoints) is None
    # DeepSpeed compares the sets, whose radii follow from the weights that a run begins with.
    reads_start = begins or config.engine == "deepspeed"
    model, called = _network(config, batches, world, reads_start)
    if reads_start:
        run.check_same_start(config)
    if config.init.steps and begins:
        half_batches = HalfBatches(loaders["train"], batches.training)
        with exclusive_lock(run, world), _entered(signals) as handler:
            if world.main:
                run.create(config, batches.data)
            barrier(world)
            if not _initialize(model, run, config, world, half_batches, handler):
                return INTERRUPTED
    trainer = Trainer(model, config, world, run, loaders, batches, called)
    with exclusive_lock(run, world):
        trainer.restore()
        with _entered(signals) as handler:
            return trainer.fit(handler)


def _network(
    config: Config, batches: BatchPreparation, world: World, reads_start: bool
) -> tuple[nn.Module, set[nn.Module]]:
    """The run's network with its initial weights, unless a checkpoint's take their place, and the modules it calls.

    Raises:
        UserError: there is no such network, or it does not fit the images and classes.
    """
    torch.manual_seed(config.seed)
    settings, image_shape, classes = config.model, batches.image_shape, batches.classes
    model = build_model(
        settings.name,
        num_classes=classes,
        in_channels=image_shape[0],
        width=settings.width,
        kwargs=settings.kwargs,
        pretrained=reads_start and settings.pretrained,
        tell=lambda line: print(f"note: {line}", file=sys.stderr) if world.main else None,
    )
    called = check_network(model, settings.name, image_shape=image_shape, num_classes=classes, device=world.device)
    return model, called


def _entered(signals: SignalHandler | None) -> AbstractContextManager[SignalHandler]:
    return nullcontext(signals) if signals else SignalHandler()


def _initialize(
    model: nn.Module, run: RunFolder, config: Config, world: World, batches: HalfBatches, signals: SignalHandler
) -> bool:
    """Run SFW-Init while every rank has the whole network; False if a signal stopped it, and then nothing is kept."""
    with open_logger(run, config, world) as logger:
        complete = run_sfw_init(model, config, world, batches, logger, signals)
        if not complete:
            logger.interrupted(None, run.resume_command(config, world.size))
    return complete


@dataclass
class Position:
    """How far a run has come. A checkpoint holds it with the tensors, the param groups and the schedule."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sums: list[float] = field(default_factory=lambda: [0.0])
    """This epoch's sum of batch losses, by rank."""
    best_top1: float = -1.0

    def loss_sum(self, world: World) -> float:
        """Return this rank's sum; at another number of ranks than it was saved with, rank 0 continues the mean."""
        if len(self.loss_sums) == world.size:
            return self.loss_sums[world.rank]
        return math.fsum(self.loss_sums) / len(self.loss_sums) * world.size if world.main else 0.0

    def begin_epoch(self, epoch: int, world: World) -> None:
        """Go to the first batch of an epoch."""
        self.epoch, self.batch, self.loss_sums = epoch, 0, [0.0] * world.size


class Trainer:
    """A run, ready to train: :meth:`restore` loads the newest checkpoint, :meth:`fit` trains. Collective.

    Args:
        model: the same on every rank.
        config: the run.
        world: this rank and the others.
        run: the run's folder.
        loaders: this rank's, by split.
        batches: how a loader's batch is prepared for the network.
        called: the modules that the network calls.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        world: World,
        run: RunFolder,
        loaders: dict[Split, Loader],
        batches: BatchPreparation,
        called: set[nn.Module],
    ) -> None:
        self.config, self.world, self.run, self.loaders, self.batches = config, world, run, loaders, batches
        epochs = config.train.epochs
        self.strategy = build_strategy(model, config, world, called)
        self.strategy.warm_up(batches.image_shape)
        self.lr_schedule = LRSchedule(self.strategy.optimizer, config.schedule, epochs)
        self.k_schedule = KSchedule(self.strategy.optimizer, config.optimizer, epochs)
        self.method = build_training_method(self.strategy, config, epochs * len(loaders["train"]))
        self.position = Position()

    def restore(self) -> None:
        """Load the newest complete checkpoint, if there is one; make the run's folder if it is missing."""
        latest = checkpoint.newest(self.run.checkpoints)
        if latest is not None:
            tensors, state = checkpoint.load(latest, lambda stored: self._allocate(stored, latest))
            self.method.load(tensors)
            self.strategy.load(tensors, state["options"], source=latest)
            self.lr_schedule.load_state_dict(state["schedule"])
            self.position = Position(**state["position"])
        if self.world.main:
            self.run.create(self.config, self.batches.data)
        barrier(self.world)

    def _allocate(self, stored: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
        of_method = {name: tensor for name, tensor in stored.items() if name.startswith(METHOD_PREFIX)}
        others = {name: tensor for name, tensor in stored.items() if name not in of_method}
        return self.strategy.allocate(others, source) | checkpoint.allocate_on_cpu(of_method)

    def fit(self, signals: SignalHandler) -> int:
        """Train from the position to the last epoch, or until a signal stops it; the exit status."""
        position, config, world = self.position, self.config, self.world
        if position.epoch == config.train.epochs and self.run.weights.is_file():
            if world.main:
                print(f"{self.run.path} is trained to its end already", file=sys.stderr)
            return 0
        with open_logger(self.run, config, world) as logger:
            description = self.loaders["train"].description
            logger.start(position.step, position.epoch, self.strategy.parameters, description)
            while position.epoch < config.train.epochs:
                if any_rank(signals.stop_requested, world):  # it came while the last epoch was measured and saved
                    return self._stop(checkpoint.newest(self.run.checkpoints), logger)
                complete = self._train_epoch(signals, logger)
                loss = math.fsum(position.loss_sums) / (world.size * position.batch)
                _require_finite(loss, position.epoch)
                if not complete:
                    return self._stop(self.save(), logger)
                self._end_epoch(loss, logger)
            self._finish(logger)
        for loader in self.loaders.values():
            loader.close()
        barrier(world)
        return 0

    def _train_epoch(self, signals: SignalHandler, logger: Logger) -> bool:
        """Train the rest of the epoch and move the position; False if a signal stopped it before the last batch."""
        position, world, loader = self.position, self.world, self.loaders["train"]
        loader.load_state_dict({"epoch": position.epoch, "batch": position.batch})
        self.k_schedule.begin_epoch(position.epoch)
        loss_sum = torch.tensor(position.loss_sum(world), dtype=torch.float64, device=world.device)
        # On a GPU, asking all ranks makes the host wait for the device, so it is done less often.
        votes_every = 1 if world.device.type == "cpu" else self.config.train.log_every
        complete = True
        logger.epoch_begins(position.epoch, len(loader), position.batch)
        for images, labels in loader:
            loss_sum += self._train_step(images, labels, logger)
            vote = position.step % votes_every == 0 and position.batch < len(loader)
            if vote and any_rank(signals.stop_requested, world):
                complete = False
                break
        position.loss_sums = gather_floats(loss_sum.item(), world)
        return complete

    def _train_step(self, images: Tensor, labels: Tensor, logger: Logger) -> Tensor:
        """Train on one batch; the mean loss of this rank's part, detached."""
        position, log_every, verify_every = (
            self.position,
            self.config.train.log_every,
            self.config.train.verify_replicas,
        )
        # Dropout and the like depend on the step only, so that a resumed run repeats an uninterrupted one.
        torch.manual_seed(_step_seed(self.config.seed, position.step, self.world.rank))
        inputs, targets = self.batches.training(images, labels, position.step)
        loss = self.method.train_step(inputs, targets, position.step)
        position.step += 1
        position.batch += 1
        if verify_every and position.step % verify_every == 0:
            self.strategy.verify_replicas()
        if position.step % log_every == 0:
            self._log_step(loss.item(), logger)
        else:
            logger.advance()
        return loss

    def _log_step(self, loss: float, logger: Logger) -> None:
        _require_finite(loss, self.position.epoch)
        optimizer = self.strategy.optimizer
        statistics = optimizer.statistics() if isinstance(optimizer, SFW) else {}
        logger.step_done(self.position.step, loss, optimizer.param_groups[0]["lr"], statistics)

    def _end_epoch(self, loss: float, logger: Logger) -> None:
        """Set the next epoch's learning rate, measure on the validation set, save, and log the epoch."""
        position = self.position
        rate, log_values = self.strategy.optimizer.param_groups[0]["lr"], self._log_values()
        self.lr_schedule.step(loss)
        position.begin_epoch(position.epoch + 1, self.world)
        validation = self.measure("validation") if "validation" in self.loaders else None
        self.save(validation)
        logger.epoch_done(position.epoch, position.step, loss, validation, rate, log_values)

    def _log_values(self) -> dict[str, float]:
        """What changes from epoch to epoch in addition to the learning rate, in the present epoch."""
        k_frac = {"k_frac": self.k_schedule.k_frac(self.position.epoch)} if self.k_schedule.changes else {}
        return k_frac | self.method.log_values()

    def _finish(self, logger: Logger) -> None:
        """Measure on the test set, once: nothing is chosen by it. Write the trained weights."""
        test = self.measure("test")
        weights = self.strategy.weights()
        if self.world.main:
            self.run.save_weights(weights)
        logger.done(test)

    def _stop(self, saved: Path | None, logger: Logger) -> int:
        logger.interrupted(saved, self.run.resume_command(self.config, self.world.size))
        return INTERRUPTED

    def measure(self, split: Split) -> Metrics:
        """Measure loss and accuracy on a split; collective."""
        self.strategy.before_evaluation()
        return measure(
            lambda images: self.strategy.forward(self.batches.evaluation(images)),
            self.loaders[split],
            self.world,
            lockstep=self.strategy.lockstep,
        )

    def save(self, validation: Metrics | None = None) -> Path:
        """Write a checkpoint, and let ``best`` name it if no earlier one has its validation accuracy; collective."""
        position, folder = self.position, self.run.checkpoints
        best = validation is not None and validation.top1 > position.best_top1
        if validation is not None and best:
            position.best_top1 = validation.top1
        state = {
            "position": asdict(position),
            "schedule": self.lr_schedule.state_dict(),
            "options": self.strategy.options(),
        }
        tensors = self.strategy.tensors() | self.method.tensors()
        path = checkpoint.save(folder, tensors, state, self.world, epoch=position.epoch, step=position.step, best=best)
        if self.world.main:
            checkpoint.keep_newest(folder, self.config.train.keep_checkpoints)
        return path


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in epoch {epoch + 1}: lower optimizer.lr")
