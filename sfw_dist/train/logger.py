"""What a run reports while it trains: metrics.jsonl, TensorBoard, the heartbeat, and a progress bar or lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from sfw_dist.config import Config
from sfw_dist.distributed.world import World
from sfw_dist.optim.statistics import StepStatistics
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder, environment


class Logger:
    """Writes a run's records on rank 0; on the other ranks every method does nothing."""

    def __init__(
        self, run: RunFolder, config: Config, world: World, bar: Bar | None, board: SummaryWriter | None
    ) -> None:
        self._run, self._config, self._world, self._bar, self._board = run, config, world, bar, board
        self._task = bar.add_task("", total=None) if bar else None
        self._epoch, self._step = 0, 0
        self._epoch_began = self._window_began = time.perf_counter()
        self._window_steps = 0

    def start(self, step: int, epoch: int, parameters: int, loader: str) -> None:
        """Record that training starts, or resumes if ``step`` is not 0.

        Args:
            step: steps taken.
            epoch: epochs trained.
            parameters: entries of all parameters.
            loader: description of how the data is read.
        """
        if not self._board:
            return
        self._step, engine = step, self._config.engine
        if step:
            self._run.log("resume", step=step, epoch=epoch, engine=engine, loader=loader, environment=environment())
            self._say(f"resuming {self._run.path} after epoch {epoch}, step {step}")
        else:
            self._run.log("start", world_size=self._world.size, engine=engine, parameters=parameters, loader=loader)
            self._say(f"training {self._run.path}: {parameters:,} parameters, {self._world.size} rank(s), {engine}")
        self._say(f"data: {loader}")

    def init_begins(self, steps: int) -> None:
        """Show a progress bar of SFW-Init."""
        if self._bar and self._task is not None:
            self._bar.reset(self._task, total=steps, description="SFW-Init")

    def init_step(self, step: int, loss: float) -> None:
        """Record an iteration of SFW-Init; ``loss`` is that after one step of SFW, over all ranks."""
        self.advance()
        if self._board and step % self._config.train.log_every == 0:
            self._run.log("init", step=step, loss=loss)
            self._run.beat(step=0, epoch=0, loss=loss)
            self._board.add_scalar("init/loss", loss, step)

    def init_done(self, scales: Mapping[str, float]) -> None:
        """Record the learned scale of each tensor."""
        if self._board:
            self._run.log("init", step=self._config.init.steps, scales=dict(scales))
            least, greatest = (f"{pick(scales.values()):.4g}" for pick in (min, max))
            self._say(f"SFW-Init: {len(scales)} tensors scaled by {least} to {greatest}")

    def epoch_begins(self, epoch: int, batches: int, done: int) -> None:
        """Start the epoch's clock and progress bar; ``done`` of its ``batches`` were trained before a resume."""
        self._epoch = epoch
        self._epoch_began = self._window_began = time.perf_counter()
        self._window_steps = 0
        if self._bar and self._task is not None:
            description = f"epoch {epoch + 1}/{self._config.train.epochs}"
            self._bar.reset(self._task, total=batches, completed=done, description=description)

    def advance(self) -> None:
        """Count a step that is not logged."""
        self._window_steps += 1
        if self._bar and self._task is not None:
            self._bar.advance(self._task)

    def step_done(self, step: int, loss: float, rate: float, statistics: dict[str, StepStatistics]) -> None:
        """Record a step.

        Args:
            step: steps taken.
            loss: mean over rank 0's part of the batch.
            rate: learning rate of the first param group.
            statistics: of SFW's step, by tensor; empty for other optimizers.
        """
        self.advance()
        if not self._board:
            return
        self._step = step
        now = time.perf_counter()
        throughput = self._window_steps * self._config.data.batch_size / (now - self._window_began)
        self._window_began, self._window_steps = now, 0
        record = {"loss": loss, "lr": rate, "images_per_second": round(throughput, 1)}
        if statistics:
            # The constraint is a product of sets, one a tensor, so the gaps add up to the network's.
            record["gap"] = sum(s.gap for s in statistics.values())
            record["gamma"] = sum(s.gamma for s in statistics.values()) / len(statistics)
            record["effective_lr"] = sum(s.effective_lr for s in statistics.values()) / len(statistics)
        self._run.log("train", step=step, epoch=self._epoch + 1, **record)
        self._run.beat(step=step, epoch=self._epoch + 1, images_per_second=record["images_per_second"], loss=loss)
        for key, value in record.items():
            self._board.add_scalar(f"train/{key}", value, step)
        for name, tensor_statistics in statistics.items():
            for key, value in tensor_statistics._asdict().items():
                self._board.add_scalar(f"{key}/{name}", value, step)

    def epoch_done(
        self,
        epoch: int,
        step: int,
        train_loss: float,
        validation: Metrics | None,
        rate: float,
        log_values: Mapping[str, float],
    ) -> None:
        """Record an epoch.

        Args:
            epoch: epochs trained.
            step: steps taken.
            train_loss: mean over the epoch's batches and all ranks.
            validation: ``None`` if nothing is held out.
            rate: learning rate of the first param group during the epoch.
            log_values: what else changes from epoch to epoch, by name.
        """
        if not self._board:
            return
        seconds = round(time.perf_counter() - self._epoch_began, 3)
        record = {"train_loss": train_loss, "lr": rate, "seconds": seconds, **log_values}
        text = f"epoch {epoch:3d}/{self._config.train.epochs}  loss {train_loss:.4f}"
        if validation:
            record |= {f"validation_{key}": value for key, value in asdict(validation).items()}
            text += f"  validation top-1 {100 * validation.top1:.2f} %"
        self._run.log("epoch", epoch=epoch, step=step, **record)
        self._run.beat(step=step, epoch=epoch, loss=train_loss, seconds_per_epoch=seconds)
        for key, value in record.items():
            self._board.add_scalar(f"epoch/{key}", value, epoch)
        self._say(f"{text}  lr {rate:.4g}  {seconds:.1f} s")

    def interrupted(self, checkpoint: Path | None, command: str) -> None:
        """Record a stop, and print how to resume.

        Args:
            checkpoint: from which the run will resume; ``None`` if nothing is saved yet.
            command: the command line that resumes.
        """
        if self._board:
            self._run.log("interrupted", checkpoint=str(checkpoint) if checkpoint else None)
            what = f"interrupted: saved {checkpoint}" if checkpoint else "interrupted before the first checkpoint"
            how = "resume with" if checkpoint else "start again with"
            self._say(f"{what}\n{how}: {command}")

    def done(self, test: Metrics) -> None:
        """Record the metrics of the trained network on the test set."""
        if self._board:
            self._run.log("eval", split="test", sparsity=0.0, **asdict(test))
            self._say(f"trained {self._run.path}: test top-1 {100 * test.top1:.2f} % ({test.samples} images)")

    def _say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def open_logger(run: RunFolder, config: Config, world: World) -> Iterator[Logger]:
    """Open a :class:`Logger`, with a progress bar if stderr is a terminal and lines of text if not, and close it."""
    if not world.main:
        yield Logger(run, config, world, None, None)
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=console, transient=True) if console.is_terminal else None
    board = SummaryWriter(str(run.tensorboard))
    try:
        if bar:
            bar.start()
        yield Logger(run, config, world, bar, board)
    finally:
        if bar:
            bar.stop()
        board.close()
