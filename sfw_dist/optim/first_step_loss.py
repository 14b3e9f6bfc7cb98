"""The loss after SFW's first step and its derivatives by one scale a tensor, for SFW-Init."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.optim.shard import step_dtype
from sfw_dist.optim.update import Rescale, rescale_ratio

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""
Loss = Callable[[Any, Tensor], Tensor]
"""From the model's output and the targets to a scalar, the mean over the batch."""


@dataclass
class Start:
    """A tensor before its first step, and all that the step depends on except the gradient."""

    name: str
    parameter: Tensor
    start: Tensor
    """The parameter as it came."""
    constraint: Constraint
    lr: float
    rescale: Rescale
    weight_decay: float

    def after_step(self, theta: Tensor, g: Tensor) -> Tensor:
        """θ' as a differentiable function of θ and g: what :mod:`sfw_dist.optim.update` makes of them without
        momentum.
        """
        if self.constraint.is_unconstrained:
            return theta - self.lr * (g + self.weight_decay * theta)
        dtype = step_dtype(theta)
        v = self.constraint.lmo(g.detach().to(dtype))
        gamma = self._step_size(theta.to(dtype), g.to(dtype), v).to(dtype)
        return ((1 - gamma) * theta.to(dtype) + gamma * v).to(theta.dtype)

    def _step_size(self, theta: Tensor, g: Tensor, v: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(g, dtype=torch.float64)
        distance = torch.linalg.vector_norm(theta - v, dtype=torch.float64)
        ratio = rescale_ratio(self.rescale, norm, distance, self.constraint.diameter(theta.numel()))
        numerator, denominator = self.lr * ratio[0], torch.as_tensor(ratio[1], dtype=norm.dtype, device=norm.device)
        # Not clamp(numerator / denominator): where θ = v its derivative would be 0·∞.
        full = numerator >= denominator
        return torch.where(norm == 0, 0.0, torch.where(full, 1.0, numerator / torch.where(full, 1.0, denominator)))


@dataclass
class FirstStep:
    """L(θ'; S₁) as a function of the scales."""

    model: nn.Module
    loss: Loss
    tensors: list[Start]
    ranks: RankGroup

    def loss_after(self, scales: Tensor, s0: Batch, s1: Batch) -> tuple[float, Tensor]:
        """The loss over all ranks, and its derivatives by the scales, float64 ``(tensors,)`` on the host; collective.

        The chain rule in three pieces, so that between them the ranks' means can be taken, and that no more than one
        graph through the model is kept besides the one in use.
        """
        theta = [(t.start * scale).requires_grad_() for t, scale in zip(self.tensors, scales.tolist(), strict=True)]
        g = grad(self._loss(theta, s0), theta, create_graph=True, allow_unused=True, materialize_grads=True)

        # θ' and its derivatives by θ and g: the same on every rank.
        at = [x.detach().requires_grad_() for x in theta]
        mean_g = [x.requires_grad_() for x in self._means([x.detach().clone() for x in g])]
        moved = [t.after_step(x, y) for t, x, y in zip(self.tensors, at, mean_g, strict=True)]

        there = [x.detach().requires_grad_() for x in moved]
        after = self._loss(there, s1)
        u = self._means(list(grad(after, there, allow_unused=True, materialize_grads=True)))
        pulled = grad(moved, [*at, *mean_g], u, allow_unused=True, materialize_grads=True)
        direct, through_g = pulled[: len(theta)], pulled[len(theta) :]

        # ∂g/∂θ, a Hessian, is this rank's own until the products with it are averaged.
        bent = [(x, c) for x, c in zip(g, through_g, strict=True) if x.requires_grad]
        hessian = [torch.zeros_like(x) for x in theta]
        if bent:
            outputs, cotangents = zip(*bent, strict=True)
            hessian = list(grad(outputs, theta, cotangents, allow_unused=True, materialize_grads=True))
        parts = zip(self.tensors, direct, hessian, strict=True)
        slopes = [torch.sum(t.start * (a + h), dtype=torch.float64) for t, a, h in parts]
        (totals,) = self._means([torch.stack([after.detach().double(), *slopes])])
        totals = totals.cpu()
        return float(totals[0]), totals[1:]

    def _loss(self, theta: list[Tensor], batch: Batch) -> Tensor:
        # BatchNorm counts in its buffers: in copies, one for each pass.
        tensors = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        tensors |= {t.name: x for t, x in zip(self.tensors, theta, strict=True)}
        return self.loss(functional_call(self.model, tensors, (batch[0],)), batch[1])

    def _means(self, tensors: list[Tensor]) -> list[Tensor]:
        """Over the ranks, in place where their memory allows."""
        if self.ranks.size == 1:
            return tensors
        tensors = [x.contiguous() for x in tensors]
        works = [dist.all_reduce(x, group=self.ranks.group, async_op=True) for x in tensors]
        for work in works:
            work.wait()
        return [x.div_(self.ranks.size) for x in tensors]
