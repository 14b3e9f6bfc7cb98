"""What goes on around an optimizer's steps: nothing, sampled sparsities, gradual pruning, or compression-aware steps.

They need the whole network, and all of its gradients, on every rank. Replicas that are equal before a step are equal
after it: every rank has the same gradients, and from equal weights the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sfw_dist.config import Config, CramConfig, GradualConfig
from sfw_dist.errors import UserError
from sfw_dist.pruning.masks import magnitude_masks
from sfw_dist.pruning.one_shot import prune
from sfw_dist.train.strategies import Engine

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


class _Drawing(Method):
    """What each step draws a sparsity for."""

    def __init__(self, engine: Engine, sparsities: Sequence[float], seed: int) -> None:
        super().__init__(engine)
        self._sparsities, self._seed = sparsities, seed

    def sparsity(self, step: int) -> float:
        """What is removed in a step: a hash of seed and step chooses, on all ranks alike, and when a run goes on."""
        number = int(np.random.SeedSequence([self._seed, step, _DRAW]).generate_state(1)[0])
        return self._sparsities[number % len(self._sparsities)]


class CompressionAware(_Drawing):
    """CrAM: steps that make the network good where magnitude pruning would take it (Peste et al., ICLR 2023).

    With C the global magnitude pruning to a sparsity that each step draws from a few, M its mask, ρ how far to look::

        g ← ∇L(θ)        h ← M ⊙ ∇L(C(θ + ρ·g))        a step of the optimizer on h + g (CrAM⁺), or on h alone

    arXiv 2207.14200, in its form with sparse gradients. A step takes two forward and backward passes. BatchNorm's
    running statistics are those of the dense network.
    """

    def __init__(self, engine: Engine, config: CramConfig, seed: int) -> None:
        super().__init__(engine, config.sparsities, seed)
        self._config = config

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        engine, model = self._engine, self._engine.model
        loss = engine.gradients(images, labels)
        dense = _gradients(model)
        with _restored(model):
            with torch.no_grad():
                for name, gradient in dense.items():
                    model.get_parameter(name).add_(gradient, alpha=self._config.rho)
            masks = _cut(model, self.sparsity(step))
            engine.gradients(images, labels)
        _mask_gradients(model, masks)
        if self._config.dense:
            for name, gradient in _gradients(model).items():
                gradient.add_(dense[name])
        engine.optimizer.step()
        return loss


class SampledSparsity(_Drawing):
    """Each step trains the network at a sparsity drawn for it: one gradient, where CrAM⁺ takes two.

    With M the mask of global magnitude pruning to the sparsity drawn, which may be 0::

        g ← M ⊙ ∇L(M ⊙ θ)        a step of the optimizer on g

    CrAM's sparse gradient without its perturbation (ρ = 0), alternating with the dense network's in place of adding
    it; as universally slimmable networks sample their widths (Yu and Huang, ICCV 2019, arXiv 1903.05134). BatchNorm's
    running statistics are those of the dense network, from the steps that draw 0. A step's loss is of what it drew.
    """

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        engine, model = self._engine, self._engine.model
        sparsity = self.sparsity(step)
        if sparsity == 0:
            return super().train_step(images, labels, step)
        with _restored(model):
            masks = _cut(model, sparsity)
            loss = engine.gradients(images, labels)
        _mask_gradients(model, masks)
        engine.optimizer.step()
        return loss


_DRAW = 0xC4A3
"""Keeps this draw apart from others that are made of seed and step."""


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards parameters and buffers are what they were: a pruned network's statistics are not averaged in."""
    everything = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in everything]
    yield
    with torch.no_grad():
        for tensor, value in zip(everything, before, strict=True):
            tensor.copy_(value)


def _cut(model: nn.Module, sparsity: float) -> Mapping[str, Tensor]:
    with _blaming_the_rate():
        return prune(model, sparsity)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, gradient in _gradients(model).items():
        if name in masks:
            gradient.masked_fill_(~masks[name], 0)


def open_method(engine: Engine, config: Config, steps: int) -> Method:
    """The method that the configuration asks for; ``steps``: of the whole training."""
    match config.method:
        case "plain":
            return Method(engine)
        case "gradual":
            return GradualPruning(engine, config.gradual, steps)
        case "sampled":
            return SampledSparsity(engine, config.sampled.sparsities, config.seed)
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
