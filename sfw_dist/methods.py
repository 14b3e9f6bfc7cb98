"""What goes on around an optimizer's steps: nothing, gradual magnitude pruning, or compression-aware steps.

They need the whole network, and all of its gradients, on every rank. Replicas that are equal before a step are equal
after it: every rank has the same gradients, and from equal weights the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sfw_dist.config import Config, CramConfig, GradualConfig
from sfw_dist.engine import Engine
from sfw_dist.errors import UserError
from sfw_dist.prune import magnitude_masks, prune

PREFIX = "method."
"""Of the names under which a checkpoint holds what a method keeps."""


class Method:
    """Plain steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Step number ``step``, from 0, on this rank's part of a batch; the mean loss of that part; collective."""
        return self._engine.train_step(images, labels)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for a run to go on, by names that begin with ``PREFIX``."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`tensors` gave; other names are passed over."""

    def notes(self) -> dict[str, float]:
        """What an epoch's record tells of it."""
        return {}


class GradualPruning(Method):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): weights are removed while the others train.

    After every so many steps the smallest weights are set to zero, up to the sparsity
    ``s_f + (s_i − s_f)·(1 − t)³``, with t from 0 to 1 between begin and end; and after each step, whatever it did to
    them, those removed are zero again. Being zero they are the smallest at the next pruning, so none comes back.
    """

    def __init__(self, engine: Engine, config: GradualConfig, steps: int) -> None:
        super().__init__(engine)
        self._config, self._steps = config, steps
        self._begin, self._end = math.ceil(config.begin * steps), math.ceil(config.end * steps)
        self._masks: dict[str, Tensor] = {}

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = super().train_step(images, labels, step)
        self._prune(step + 1)
        self._apply()
        return loss

    def _prune(self, done: int) -> None:
        regular = (done - self._begin) % self._config.every == 0
        # The last one, on which the sparsity is what was asked for, need not fall on a multiple.
        if self._begin <= done <= self._end and (regular or done == self._end):
            sparsity = self._config.target(done, self._steps)
            with _blaming_the_rate():
                self._masks = dict(magnitude_masks(self._engine.model, sparsity, kind=self._config.kind))

    @torch.no_grad()
    def _apply(self) -> None:
        parameters = dict(self._engine.model.named_parameters())
        for name, mask in self._masks.items():
            parameters[name].masked_fill_(~mask, 0)

    def tensors(self) -> dict[str, Tensor]:
        # Not only the zeros: a weight that is zero by chance may still move.
        return {f"{PREFIX}mask.{name}": mask for name, mask in self._masks.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        prefix, parameters = f"{PREFIX}mask.", dict(self._engine.model.named_parameters())
        named = {name.removeprefix(prefix): mask for name, mask in tensors.items() if name.startswith(prefix)}
        self._masks = {name: mask.to(parameters[name].device) for name, mask in named.items()}

    def notes(self) -> dict[str, float]:
        kept, total = (sum(count(m) for m in self._masks.values()) for count in (_kept, Tensor.numel))
        return {"sparsity": (total - kept) / total if total else 0.0}


class CompressionAware(Method):
    """CrAM: steps that make the network good where magnitude pruning would take it (Peste et al., ICLR 2023).

    With C the global magnitude pruning to a sparsity that each step draws from a few, M its mask, ρ how far to look::

        g ← ∇L(θ)        h ← M ⊙ ∇L(C(θ + ρ·g))        a step of the optimizer on h + g (CrAM⁺), or on h alone

    arXiv 2207.14200, in its form with sparse gradients. A step takes two forward and backward passes. BatchNorm's
    running statistics are those of the dense network.
    """

    def __init__(self, engine: Engine, config: CramConfig, seed: int) -> None:
        super().__init__(engine)
        self._config, self._seed = config, seed

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        engine, model = self._engine, self._engine.model
        loss = engine.gradients(images, labels)
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        dense = {name: cast(Tensor, p.grad) for name, p in trained.items()}
        everything = [*model.parameters(), *model.buffers()]
        before = [tensor.detach().clone() for tensor in everything]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.add_(dense[name], alpha=self._config.rho)
        with _blaming_the_rate():
            masks = prune(model, self.sparsity(step))
        # Buffers as they were: the second pass would average the pruned network's statistics in.
        engine.gradients(images, labels)
        with torch.no_grad():
            for tensor, value in zip(everything, before, strict=True):
                tensor.copy_(value)
            for name, parameter in trained.items():
                assert parameter.grad is not None
                if name in masks:
                    parameter.grad.masked_fill_(~masks[name], 0)
                if self._config.dense:
                    parameter.grad.add_(dense[name])
        engine.optimizer.step()
        return loss

    def sparsity(self, step: int) -> float:
        """What is removed in a step: a hash of seed and step chooses, on all ranks alike, and when a run goes on."""
        number = int(np.random.SeedSequence([self._seed, step, _DRAW]).generate_state(1)[0])
        return self._config.sparsities[number % len(self._config.sparsities)]


_DRAW = 0xC4A3
"""Keeps this draw apart from others that are made of seed and step."""


def open_method(engine: Engine, config: Config, steps: int) -> Method:
    """The method that the configuration asks for; ``steps``: of the whole training."""
    match config.method:
        case "plain":
            return Method(engine)
        case "gradual":
            return GradualPruning(engine, config.gradual, steps)
        case "cram":
            return CompressionAware(engine, config.cram, config.seed)


@contextmanager
def _blaming_the_rate() -> Iterator[None]:
    """The configuration has been checked, so what stops pruning in a training is weights that are NaN."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(error).partition(':')[0]}: lower optimizer.lr") from None


def _kept(mask: Tensor) -> int:
    return int(mask.count_nonzero())
