"""The training loop."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sfw_dist.config import Config, load_config
from sfw_dist.data.datasets.registry import find_dataset
from sfw_dist.data.loading import Loader, MixUpCutMix, Normalize, Split, dataset_info, open_loader, rank_sampler
from sfw_dist.data.prepare import prepare
from sfw_dist.distributed.world import World, any_rank, barrier, gather_floats
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder
from sfw_dist.models import build_model
from sfw_dist.optim.sfw import SFW
from sfw_dist.train import checkpoint
from sfw_dist.train.init_stage import HalfBatches, check_halves, learn_scales
from sfw_dist.train.k_schedule import KSchedule
from sfw_dist.train.logger import Progress, open_progress
from sfw_dist.train.lr_schedule import Schedule
from sfw_dist.train.metrics import Metrics, measure
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.signals import Interrupt
from sfw_dist.train.sparse_training import PREFIX as METHOD_PREFIX
from sfw_dist.train.sparse_training import Method, open_method
from sfw_dist.train.strategies import Engine, check_world, open_engine

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass
class Position:
    """How far a run has come; all that a checkpoint holds beside tensors, learning rates and the schedule."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sums: list[float] = field(default_factory=lambda: [0.0])
    """This epoch's sum of batch losses, by rank."""
    best_top1: float = -1.0

    def loss_sum(self, world: World) -> float:
        """This rank's part of the sum; at another number of ranks rank 0 takes it over, as a mean over the ranks."""
        if len(self.loss_sums) == world.size:
            return self.loss_sums[world.rank]
        return math.fsum(self.loss_sums) / len(self.loss_sums) * world.size if world.main else 0.0

    def begin_epoch(self, epoch: int, world: World) -> None:
        self.epoch, self.batch, self.loss_sums = epoch, 0, [0.0] * world.size


def train(config: Config, world: World, *, resume: bool = False, interrupt: Interrupt | None = None) -> int:
    """Train to the last epoch, or until interrupted; the exit status, 130 when interrupted. Collective.

    ``interrupt`` is one that the caller has entered already; else signals are noted from the first step on.

    Raises:
        UserError: bad input, before anything is written; or a loss that is not finite.
    """
    # Everything that can be wrong with the input shows here, before the run's folder is made.
    run = check_input(config, world.rank, world.size, resume=resume)
    loaders = open_loaders(config, world)
    info = dataset_info(config.data)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name, num_classes=len(info.classes), in_channels=info.image_shape[0], width=config.model.width
    )
    normalize = Normalize(info.mean, info.std).to(world.device)
    mix = MixUpCutMix(
        len(info.classes),
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        label_smoothing=config.data.label_smoothing,
        seed=config.seed,
    )

    def prepare_batch(images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return mix(normalize(images.to(world.device)), labels.to(world.device), number)

    if config.init.steps and checkpoint.newest(run.checkpoints) is None:
        half_batches = HalfBatches(loaders["train"], prepare_batch)
        with _alone(run, world), nullcontext(interrupt) if interrupt else Interrupt() as noted:
            if not _initialize(model, run, config, world, half_batches, noted):
                return _INTERRUPTED
    engine = open_engine(model, config, world)
    engine.warm_up(info.image_shape)
    schedule = Schedule(engine.optimizer, config.schedule, config.train.epochs)
    k_schedule = KSchedule(engine.optimizer, config.optimizer, config.train.epochs)
    method = open_method(engine, config, config.train.epochs * len(loaders["train"]))
    with _alone(run, world):
        training = _Training(config, world, run, loaders, normalize, mix, engine, schedule, k_schedule, method)
        training.restore()
        with nullcontext(interrupt) if interrupt else Interrupt() as noted:
            return _train(training, config, world, noted)


def _initialize(
    model: nn.Module, run: RunFolder, config: Config, world: World, batches: HalfBatches, interrupt: Interrupt
) -> bool:
    """SFW-Init, while every rank has the whole network; False when interrupted, and then nothing of it is kept."""
    if world.main:
        run.create(config)
    barrier(world)
    with open_progress(run, config, world) as progress:
        whole = learn_scales(model, config, world, batches, progress, interrupt)
        if not whole:
            progress.interrupted(None, _how_to_go_on(run, config, world))
    return whole


def _train(training: _Training, config: Config, world: World, interrupt: Interrupt) -> int:
    if training.finished:
        if world.main:
            print(f"{training.run.path} is trained to its end already", file=sys.stderr)
        return 0
    position = training.position
    with open_progress(training.run, config, world) as progress:
        data = training.loaders["train"].description
        progress.start(position.step, position.epoch, training.engine.parameters, data)
        while position.epoch < config.train.epochs:
            if any_rank(interrupt.requested, world):  # it came while the last epoch was measured and saved
                progress.interrupted(
                    checkpoint.newest(training.run.checkpoints), _how_to_go_on(training.run, config, world)
                )
                return _INTERRUPTED
            whole = training.epoch(interrupt, progress)
            loss = math.fsum(position.loss_sums) / (world.size * position.batch)
            _require_finite(loss, position.epoch)
            if not whole:
                progress.interrupted(training.save(), _how_to_go_on(training.run, config, world))
                return _INTERRUPTED
            rate, notes = training.engine.optimizer.param_groups[0]["lr"], training.notes()
            training.schedule.step(loss)
            position.begin_epoch(position.epoch + 1, world)
            validation = training.measure("validation") if "validation" in training.loaders else None
            training.save(validation)
            progress.epoch_done(position.epoch, position.step, loss, validation, rate, notes)

        # The one look at the test set: nothing is chosen by it.
        test = training.measure("test")
        weights = training.engine.weights()
        if world.main:
            training.run.save_weights(weights)
        progress.done(test)
    for loader in training.loaders.values():
        loader.close()
    barrier(world)
    return 0


@dataclass
class _Training:
    """The parts of a run, ready to train, and what is done with all of them."""

    config: Config
    world: World
    run: RunFolder
    loaders: dict[Split, Loader]
    normalize: Normalize
    mix: MixUpCutMix
    engine: Engine
    schedule: Schedule
    k_schedule: KSchedule
    method: Method
    position: Position = field(default_factory=Position)

    def restore(self) -> None:
        """Go to the newest complete checkpoint, if there is one; and have the folder there."""
        latest = checkpoint.newest(self.run.checkpoints)
        if latest is not None:
            tensors, state = checkpoint.load(latest, lambda stored: self._room(stored, latest))
            self.method.load(tensors)
            self.engine.load(tensors, state["options"], source=latest)
            self.schedule.load_state_dict(state["schedule"])
            self.position = Position(**state["position"])
        if self.world.main:
            self.run.create(self.config)
        barrier(self.world)

    def _room(self, stored: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
        of_method = {name: tensor for name, tensor in stored.items() if name.startswith(METHOD_PREFIX)}
        others = {name: tensor for name, tensor in stored.items() if name not in of_method}
        return self.engine.room(others, source) | checkpoint.on_cpu(of_method)

    def notes(self) -> dict[str, float]:
        """What changes from epoch to epoch beside the learning rate, in the present one."""
        k_frac = {"k_frac": self.k_schedule.k_frac(self.position.epoch)} if self.k_schedule.changes else {}
        return k_frac | self.method.notes()

    @property
    def finished(self) -> bool:
        return self.position.epoch == self.config.train.epochs and self.run.weights.is_file()

    def epoch(self, interrupt: Interrupt, progress: Progress) -> bool:
        """The rest of the epoch, from the position, which it moves; False when a rank was interrupted in it."""
        position, world, loader = self.position, self.world, self.loaders["train"]
        loader.load_state_dict({"epoch": position.epoch, "batch": position.batch})
        self.k_schedule.begin_epoch(position.epoch)
        loss_sum = torch.tensor(position.loss_sum(world), dtype=torch.float64, device=world.device)
        # On a GPU a vote makes the host wait for the device, so it is held less often.
        votes_every = 1 if world.device.type == "cpu" else self.config.train.log_every
        whole = True
        progress.epoch_begins(position.epoch, len(loader), position.batch)
        for images, labels in loader:
            # Dropout and the like depend on the step alone, so that a resumed run repeats an uninterrupted one.
            torch.manual_seed(_step_seed(self.config.seed, position.step, world.rank))
            images, labels = images.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
            inputs, targets = self.mix(self.normalize(images), labels, position.step)
            loss = self.method.train_step(inputs, targets, position.step)
            loss_sum += loss
            position.step += 1
            position.batch += 1
            checks = self.config.train.verify_replicas
            if checks and position.step % checks == 0:
                self.engine.verify_replicas()
            if position.step % self.config.train.log_every == 0:
                self._log(loss.item(), progress)
            else:
                progress.advance()
            vote = position.step % votes_every == 0 and position.batch < len(loader)
            if vote and any_rank(interrupt.requested, world):
                whole = False
                break
        position.loss_sums = gather_floats(loss_sum.item(), world)
        return whole

    def _log(self, loss: float, progress: Progress) -> None:
        _require_finite(loss, self.position.epoch)
        optimizer = self.engine.optimizer
        statistics = optimizer.statistics() if isinstance(optimizer, SFW) else {}
        progress.step_done(self.position.step, loss, optimizer.param_groups[0]["lr"], statistics)

    def measure(self, split: Split) -> Metrics:
        """Collective."""
        self.engine.before_evaluation()
        return measure(
            lambda images: self.engine.forward(self.normalize(images)),
            self.loaders[split],
            self.world,
            lockstep=self.engine.lockstep,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; collective."""
        return self.engine.tensors() | self.method.tensors()

    def save(self, validation: Metrics | None = None) -> Path:
        """Write a checkpoint, and let ``best`` name it if no earlier one has its validation accuracy; collective."""
        position, world, folder = self.position, self.world, self.run.checkpoints
        best = validation is not None and validation.top1 > position.best_top1
        if validation is not None and best:
            position.best_top1 = validation.top1
        state = {
            "position": asdict(position),
            "schedule": self.schedule.state_dict(),
            "options": self.engine.options(),
        }
        path = checkpoint.save(
            folder, self.tensors(), state, world, epoch=position.epoch, step=position.step, best=best
        )
        if world.main:
            checkpoint.keep_newest(folder, self.config.train.keep_checkpoints)
        return path


@contextmanager
def _alone(run: RunFolder, world: World) -> Iterator[None]:
    """Keep a second process out of the run's folder; the lock ends with its process, however that ends."""
    barrier(world)  # every rank has looked at the folder before rank 0 makes it
    lock = FileLock(run.lock)
    taken = False
    if world.main:
        make_folder(run.path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = True
    try:
        if any_rank(taken, world):
            raise UserError(f"{run.path} is being trained by another process: wait for it, or choose another --name")
        yield
    finally:
        lock.release()


def check_input(config: Config, rank: int, world_size: int, *, resume: bool) -> RunFolder:
    """Raise :class:`UserError` for what can be wrong with the run's folder, the data, and the number of ranks.

    Nothing is written to the run's folder.
    """
    run = RunFolder(config.run_dir)
    run.check_free_for(config, resume)
    if find_dataset(config.data.name).embedded:
        prepare(config.data.name, config.data.root)
    for split in splits(config):
        rank_sampler(config.data, split, seed=config.seed, rank=rank, world_size=world_size)
    check_world(config, world_size)
    check_halves(config, world_size)
    return run


def splits(config: Config) -> list[Split]:
    """The splits that the run has."""
    return ["train", "test", "validation"] if config.data.validation_fraction > 0 else ["train", "test"]


def open_loaders(config: Config, world: World) -> dict[Split, Loader]:
    """A loader for each split that the run has."""
    return {
        split: open_loader(
            config.data, split, seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
        )
        for split in splits(config)
    }


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in epoch {epoch + 1}: lower optimizer.lr")


def _how_to_go_on(run: RunFolder, config: Config, world: World) -> str:
    launcher = f"torchrun --nproc-per-node {world.size}" if world.size > 1 else "python"
    # The folder keeps the configuration that the run began with.
    engine = "" if load_config(run.config).engine == config.engine else f" --engine {config.engine}"
    return f"{launcher} -m sfw_dist.train --config {shlex.quote(str(run.config))}{engine} --resume auto"
