"""Sparse-training methods: GMP, CrAM and sampled sparsities.

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

from sfw_dist.config import Config, CramConfig, GMPConfig
from sfw_dist.errors import UserError
from sfw_dist.pruning import Masks, Pruner, PruningOptions, prune
from sfw_dist.train.strategies import Strategy

PREFIX = "method."
"""Beginning of the names under which a checkpoint holds a method's tensors."""

_DRAW_STREAM = 0xC4A3
"""Separates the draws of sparsities from other random numbers made from seed and step."""


class TrainingMethod:
    """The strategy's steps and nothing else (``method: plain``); the base of the sparse-training methods."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Take one training step; collective.

        Args:
            images: this rank's part of a batch, as the network takes it.
            labels: class indices ``(batch,)`` or class probabilities ``(batch, classes)``.
            step: the step's number, from 0.

        Returns:
            The mean loss of this rank's part, detached.
        """
        return self._strategy.train_step(images, labels)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold to resume a run, by names that begin with ``PREFIX``."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned; other names are ignored."""

    def log_values(self) -> dict[str, float]:
        """Return what an epoch's record in metrics.jsonl holds of this method."""
        return {}


def gmp_sparsity(config: GMPConfig, step: int, steps: int) -> float:
    """Return the sparsity that GMP has reached after a step (Zhu and Gupta, arXiv 1710.01878, equation 1).

    ``s_f + (s_i − s_f)·(1 − t)³``, with t rising from 0 at ``begin`` to 1 at ``end``; 0 before ``begin``.

    Args:
        config: ``sparsity`` s_f, ``initial`` s_i, and ``begin`` and ``end`` as fractions of the training.
        step: steps taken.
        steps: of the whole training.

    Example:
        >>> config = GMPConfig(sparsity=0.8, initial=0.0, begin=0.0, end=0.5)
        >>> [round(gmp_sparsity(config, step, steps=100), 3) for step in (0, 25, 50, 100)]
        [0.0, 0.7, 0.8, 0.8]
    """
    if step < config.begin * steps:
        return 0.0
    t = min(1.0, (step - config.begin * steps) / ((config.end - config.begin) * steps))
    return config.sparsity + (config.initial - config.sparsity) * (1 - t) ** 3


class GMP(TrainingMethod):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): weights are removed while the others train.

    Every ``config.every`` steps the smallest weights are set to zero, as many as :func:`gmp_sparsity` says. After each
    step, whatever the optimizer did to them, the removed weights are set to zero again. Being zero they are the
    smallest at the next pruning, so none comes back.
    """

    def __init__(self, strategy: Strategy, config: GMPConfig, steps: int) -> None:
        super().__init__(strategy)
        self._config, self._steps = config, steps
        self._begin, self._end = math.ceil(config.begin * steps), math.ceil(config.end * steps)
        self._masks: dict[str, Tensor] = {}

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = super().train_step(images, labels, step)
        self._update_masks(step + 1)
        self._apply_masks()
        return loss

    def _update_masks(self, done: int) -> None:
        regular = (done - self._begin) % self._config.every == 0
        # The last pruning, which reaches the final sparsity, need not fall on a multiple.
        if self._begin <= done <= self._end and (regular or done == self._end):
            sparsity = gmp_sparsity(self._config, done, self._steps)
            with _nan_blamed_on_lr():
                masks = Pruner(self._strategy.model, PruningOptions(ranking=self._config.ranking)).at(sparsity)
            assert isinstance(masks, Masks)
            self._masks = dict(masks)

    @torch.no_grad()
    def _apply_masks(self) -> None:
        parameters = dict(self._strategy.model.named_parameters())
        for name, mask in self._masks.items():
            parameters[name].masked_fill_(~mask, 0)

    def tensors(self) -> dict[str, Tensor]:
        # The zeros of the weights do not tell: a weight that is zero by chance may still move.
        return {f"{PREFIX}mask.{name}": mask for name, mask in self._masks.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        prefix, parameters = f"{PREFIX}mask.", dict(self._strategy.model.named_parameters())
        named = {name.removeprefix(prefix): mask for name, mask in tensors.items() if name.startswith(prefix)}
        self._masks = {name: mask.to(parameters[name].device) for name, mask in named.items()}

    def log_values(self) -> dict[str, float]:
        total = sum(mask.numel() for mask in self._masks.values())
        kept = sum(int(mask.count_nonzero()) for mask in self._masks.values())
        return {"sparsity": (total - kept) / total if total else 0.0}


class _DrawsSparsity(TrainingMethod):
    """A method that draws a sparsity for each step."""

    def __init__(self, strategy: Strategy, sparsities: Sequence[float], seed: int) -> None:
        super().__init__(strategy)
        self._sparsities, self._seed = sparsities, seed

    def sparsity(self, step: int) -> float:
        """Return the fraction removed in a step: a hash of seed and step, so equal on all ranks and after a resume."""
        number = int(np.random.SeedSequence([self._seed, step, _DRAW_STREAM]).generate_state(1)[0])
        return self._sparsities[number % len(self._sparsities)]


class CrAM(_DrawsSparsity):
    """Compression-aware minimization (Peste et al., ICLR 2023, arXiv 2207.14200), in its form with sparse gradients.

    Let C be global magnitude pruning to a sparsity drawn for the step, and M its mask::

        g ← ∇L(θ)        h ← M ⊙ ∇L(C(θ + ρ·g))        a step of the optimizer on h + g (CrAM⁺), or on h alone

    A step takes two forward and backward passes. BatchNorm's running statistics are those of the dense network.
    """

    def __init__(self, strategy: Strategy, config: CramConfig, seed: int) -> None:
        super().__init__(strategy, config.sparsities, seed)
        self._config = config

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        strategy, model = self._strategy, self._strategy.model
        loss = strategy.gradients(images, labels)
        dense = _gradients(model)
        with _restored(model):
            with torch.no_grad():
                for name, gradient in dense.items():
                    model.get_parameter(name).add_(gradient, alpha=self._config.rho)
            masks = _prune(model, self.sparsity(step))
            strategy.gradients(images, labels)
        _mask_gradients(model, masks)
        if self._config.dense:
            for name, gradient in _gradients(model).items():
                gradient.add_(dense[name])
        strategy.optimizer.step()
        return loss


class SampledSparsity(_DrawsSparsity):
    """Each step trains the network pruned to a sparsity drawn for it: one gradient, where CrAM⁺ takes two.

    With M the mask of global magnitude pruning to the sparsity drawn, which may be 0::

        g ← M ⊙ ∇L(M ⊙ θ)        a step of the optimizer on g

    This is CrAM's sparse gradient without its perturbation (ρ = 0), alternating with the dense gradient instead of
    added to it, as universally slimmable networks sample their widths (Yu and Huang, ICCV 2019, arXiv 1903.05134).
    BatchNorm's running statistics are those of the dense network, from the steps that draw 0. The loss that a step
    returns is that of the network it drew.
    """

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        strategy, model = self._strategy, self._strategy.model
        sparsity = self.sparsity(step)
        if sparsity == 0:
            return super().train_step(images, labels, step)
        with _restored(model):
            masks = _prune(model, sparsity)
            loss = strategy.gradients(images, labels)
        _mask_gradients(model, masks)
        strategy.optimizer.step()
        return loss


def build_training_method(strategy: Strategy, config: Config, steps: int) -> TrainingMethod:
    """Build the method that the configuration names.

    Args:
        strategy: takes the steps.
        config: ``method`` and its section.
        steps: of the whole training.
    """
    match config.method:
        case "plain":
            return TrainingMethod(strategy)
        case "gmp":
            return GMP(strategy, config.gmp, steps)
        case "sampled":
            return SampledSparsity(strategy, config.sampled.sparsities, config.seed)
        case "cram":
            return CrAM(strategy, config.cram, config.seed)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore parameters and buffers at the end, also when the step fails or is interrupted.

    A pruned network's statistics are not averaged in.
    """
    everything = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in everything]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(everything, before, strict=True):
                tensor.copy_(value)


def _prune(model: nn.Module, sparsity: float) -> Mapping[str, Tensor]:
    with _nan_blamed_on_lr():
        return prune(model, sparsity)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, gradient in _gradients(model).items():
        if name in masks:
            gradient.masked_fill_(~masks[name], 0)


@contextmanager
def _nan_blamed_on_lr() -> Iterator[None]:
    """Replace the remedy of a pruning error: the configuration was checked, so in training only NaN stops pruning."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(error).partition(':')[0]}: lower optimizer.lr") from None
