"""Train a network: with SFW once for every sparsity, or with SGD for comparison.

    torchrun --nproc-per-node 2 -m sfw_dist.train --config configs/digits_cnn.yaml
    python -m sfw_dist.train --config configs/digits_cnn.yaml --optimizer.lr 0.5 --name digits_lr05
    torchrun --nproc-per-node 4 -m sfw_dist.train --config runs/digits_cnn/config.yaml --resume auto

The number of ranks is free: the global batch, the order and the augmentation do not depend on it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from sfw_dist import checkpoint
from sfw_dist.config import Config, parse_run
from sfw_dist.data import Loader, Normalize, Split, dataset_info, open_loader
from sfw_dist.data.prepare import prepare
from sfw_dist.data.registry import find_dataset
from sfw_dist.distributed import World, any_rank, barrier, gather_floats, joined_world
from sfw_dist.engine import DDPEngine
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.interrupt import Interrupt
from sfw_dist.metrics import Metrics, measure
from sfw_dist.models import build_model
from sfw_dist.optim import SFW
from sfw_dist.progress import Progress, open_progress
from sfw_dist.run import RunFolder
from sfw_dist.schedule import Schedule

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
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


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    config, options = parse_run(
        argv, description="Train a network with SFW, or SGD.", examples=_EXAMPLES, add_options=add_options
    )
    with joined_world() as world:
        return train(config, world, resume=options.resume == "auto")


def add_options(parser: ArgumentParser) -> None:
    """The options of the command beside the configuration."""
    resume_help = "auto: go on from the run's newest checkpoint, if it has one; never: the run must be new."
    parser.add_argument("--resume", choices=["auto", "never"], default="never", help=resume_help)


def train(config: Config, world: World, *, resume: bool = False) -> int:
    """Train to the last epoch, or until interrupted; the exit status. Collective.

    Raises:
        UserError: bad input, before anything is written; or a loss that is not finite.
    """
    # Everything that can be wrong with the input shows here, before the run's folder is made.
    run = check_input(config, world.rank, world.size, resume=resume)
    loaders = open_loaders(config, world.rank, world.size)
    info = dataset_info(config.data)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name, num_classes=len(info.classes), in_channels=info.image_shape[0], width=config.model.width
    )
    engine = DDPEngine(model, config, world)
    schedule = Schedule(engine.optimizer, config.schedule, config.train.epochs)
    normalize = Normalize(info.mean, info.std).to(world.device)

    barrier(world)  # every rank has looked at the folder before rank 0 makes it
    if world.main:
        run.create(config)
    barrier(world)
    position = _restore(run, engine, schedule) or Position()
    if position.epoch == config.train.epochs and run.weights.is_file():
        if world.main:
            print(f"{run.path} is trained to its end already", file=sys.stderr)
        return 0

    with Interrupt() as interrupt, open_progress(run, config, world) as progress:
        progress.start(position.step, position.epoch, sum(p.numel() for p in model.parameters()))
        for epoch in range(position.epoch, config.train.epochs):
            if not _train_epoch(engine, loaders["train"], normalize, position, config, world, interrupt, progress):
                _require_finite(math.fsum(position.loss_sums), epoch)
                path = _save(run, engine, schedule, position, config, world)
                progress.interrupted(path, _how_to_go_on(run, world))
                return _INTERRUPTED
            train_loss = math.fsum(position.loss_sums) / (world.size * position.batch)
            _require_finite(train_loss, epoch)
            rate = engine.optimizer.param_groups[0]["lr"]
            schedule.step(train_loss)
            position.epoch, position.batch, position.loss_sums = epoch + 1, 0, [0.0] * world.size

            validation = None
            if "validation" in loaders:
                validation = _measure(engine, loaders["validation"], normalize, world)
            path = _save(run, engine, schedule, position, config, world, validation)
            progress.epoch_done(epoch + 1, position.step, train_loss, validation, rate)

        # The one look at the test set: nothing is chosen by it.
        test = _measure(engine, loaders["test"], normalize, world)
        if world.main:
            run.save_weights(engine.model.state_dict())
        progress.done(test)
    for loader in loaders.values():
        loader.close()
    barrier(world)
    return 0


def check_input(config: Config, rank: int, world_size: int, *, resume: bool) -> RunFolder:
    """Raise :class:`UserError` for what can be wrong with the run's folder and the data; nothing is written there."""
    run = RunFolder(config.run_dir)
    run.check_free_for(config, resume)
    if find_dataset(config.data.name).embedded:
        prepare(config.data.name, config.data.root)
    # Whether this rank's share is empty shows without FFCV, which takes seconds to compile a pipeline.
    open_loaders(replace(config, data=replace(config.data, backend="torch")), rank, world_size)
    return run


def open_loaders(config: Config, rank: int, world_size: int) -> dict[Split, Loader]:
    """A loader for each split that the run has."""
    splits: list[Split] = ["train", "test"]
    if config.data.validation_fraction > 0:
        splits.append("validation")
    return {
        split: open_loader(config.data, split, seed=config.seed, rank=rank, world_size=world_size) for split in splits
    }


def _train_epoch(
    engine: DDPEngine,
    loader: Loader,
    normalize: Normalize,
    position: Position,
    config: Config,
    world: World,
    interrupt: Interrupt,
    progress: Progress,
) -> bool:
    """The rest of an epoch, from ``position``, which it moves; False when a rank was interrupted before the end."""
    loader.load_state_dict({"epoch": position.epoch, "batch": position.batch})
    loss_sum = torch.tensor(position.loss_sum(world), dtype=torch.float64, device=world.device)
    # On a GPU a vote makes the host wait for the device, so it is held less often.
    votes_every = 1 if world.device.type == "cpu" else config.train.log_every
    finished = True
    progress.epoch_begins(position.epoch, len(loader), position.batch)
    for images, labels in loader:
        # Dropout and the like depend on the step alone, so that a resumed run repeats an uninterrupted one.
        torch.manual_seed(_step_seed(config.seed, position.step, world.rank))
        loss = engine.train_step(normalize(_to(images, world)), _to(labels, world))
        loss_sum += loss
        position.step += 1
        position.batch += 1
        if position.step % config.train.log_every == 0:
            statistics = engine.optimizer.statistics() if isinstance(engine.optimizer, SFW) else {}
            _require_finite(loss.item(), position.epoch)
            progress.step_done(position.step, loss.item(), engine.optimizer.param_groups[0]["lr"], statistics)
        else:
            progress.advance()
        votes = position.batch % votes_every == 0 and position.batch < len(loader)
        if votes and any_rank(interrupt.requested, world):
            finished = False
            break
    position.loss_sums = gather_floats(loss_sum.item(), world)
    return finished


def _measure(engine: DDPEngine, loader: Loader, normalize: Normalize, world: World) -> Metrics:
    engine.before_evaluation()
    return measure(lambda images: engine.forward(normalize(images)), loader, world)


def _save(
    run: RunFolder,
    engine: DDPEngine,
    schedule: Schedule,
    position: Position,
    config: Config,
    world: World,
    validation: Metrics | None = None,
) -> object:
    """Write a checkpoint, and let ``best`` name it if no earlier one has its validation accuracy; collective."""
    best = validation is not None and validation.top1 > position.best_top1
    if validation is not None and best:
        position.best_top1 = validation.top1
    state = {"position": asdict(position), "schedule": schedule.state_dict(), "options": engine.options()}
    path = checkpoint.save(run.checkpoints, engine.tensors(), state, world, epoch=position.epoch, step=position.step)
    if world.main:
        if best:
            checkpoint.point(run.checkpoints, "best", path)
        checkpoint.keep_newest(run.checkpoints, config.train.keep_checkpoints)
    return path


def _restore(run: RunFolder, engine: DDPEngine, schedule: Schedule) -> Position | None:
    """Load the newest complete checkpoint, if there is one."""
    path = checkpoint.newest(run.checkpoints)
    if path is None:
        return None
    tensors, state = checkpoint.load(path)
    engine.load(tensors, state["options"], source=path)
    schedule.load_state_dict(state["schedule"])
    return Position(**state["position"])


def _to(tensor: Tensor, world: World) -> Tensor:
    return tensor.to(world.device, non_blocking=True)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in epoch {epoch + 1}: lower optimizer.lr")


def _how_to_go_on(run: RunFolder, world: World) -> str:
    launcher = f"torchrun --nproc-per-node {world.size}" if world.size > 1 else "python"
    return f"{launcher} -m sfw_dist.train --config {run.config} --resume auto"


if __name__ == "__main__":
    sys.exit(main())
