"""SFW-Init: one scale a tensor, learned so that the loss after the first SFW step is small (Lu et al., Algorithm 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.errors import UserError
from sfw_dist.optim.first_step_loss import Batch, FirstStep, Loss, Start
from sfw_dist.optim.param_groups import constraint_of
from sfw_dist.optim.update import RULES, Rescale, learning_rate
from sfw_dist.pruning.modes import evaluation_mode


def sfw_init(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    groups: Sequence[dict[str, Any]],
    *,
    lr: float = 1.0,
    rescale: Rescale = "gradient",
    steps: int = 390,
    kappa: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    floor_weight: float = 0.01,
    floor_bias: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Multiply each parameter of the groups by a learned scale; call it before training, and before torch.compile.

    With w the tensors as they come and s their scales, 1 at first, ``steps`` times::

        S₀ ← two half batches joined;  S₁ ← the first of them and a new one
        θ  ← s·w
        g  ← ∇L(θ; S₀)
        v  ← LMO(g)
        θ' ← (1 − γ)·θ + γ·v,  γ ← clamp(η·f, 0, 1) as in SFW's first step
        d  ← clamp(∂(L(θ'; S₁)/η)/∂s, −1, 1)         through θ, g and γ; v counts as constant
        s  ← max(s − Adam(d), floor)                 of step size κ, with bias correction and ε = 1e-8

    and finally ``w ← s·w``, with a tensor outside its set divided by its gauge.

    A tensor of zeros keeps its scale, but takes part in the step. So does an unconstrained tensor: its step is SGD's,
    ``θ' ← θ − lr·(g + weight_decay·θ)``, and its scale is learned. Frozen tensors stay as they are.

    BatchNorm uses the statistics of this rank's part of the batch, and its running ones do not change; all else,
    dropout too, is as in evaluation. Several ranks average g, ∂L/∂θ' and d, and learn bitwise the same scales: one
    process's, up to rounding and BatchNorm, where each has an equal part of every batch. A scale on which the loss does
    not depend (of a bias before BatchNorm) drifts by the rounding of its derivative.

    Args:
        model: the same on every rank, and whole; DistributedDataParallel may be around it.
        loss: from the model's output and the targets to their mean loss.
        batches: half batches, used in order, three an iteration, starting over at the end.
        groups: of :func:`~sfw_dist.constrain`, or an SFW's ``param_groups``; their ``lr`` (times
            ``lr_factor``), ``rescale`` and ``weight_decay`` go before ours.
        lr: η > 0, the initial learning rate of the training.
        rescale: how η becomes a step size, as in :class:`~sfw_dist.SFW`.
        steps, kappa, betas: T and κ of the paper, and Adam's.
        floor_weight, floor_bias: the least scale of a tensor, and of one whose name ends in ``bias``.
        process_group: ranks that share the work; ``None``: the default group if there is one, else this process.
        progress: called after each iteration with its number, from 1, and L(θ'; S₁) over all ranks. Whatever raises in
            between, the model is as before.

    Returns:
        The factor on each tensor, by its name in the model.

    Example:
        >>> from sfw_dist import KSparsePolytope, constrain
        >>> net = nn.Linear(3, 2)
        >>> batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
        >>> groups = constrain(net, KSparsePolytope(k=2, tau=15.0))
        >>> sorted(sfw_init(net, nn.functional.cross_entropy, batches, groups, steps=2))
        ['bias', 'weight']

    Raises:
        UserError: an argument outside its domain, a parameter that is not the model's or not whole, no batches, or a
            loss that is not finite.
        RuntimeError: ranks whose parameters differ, or a layer that cannot be differentiated twice.
    """
    _check(lr, rescale, steps, kappa, betas, (floor_weight, floor_bias))
    model = model.module if isinstance(model, DistributedDataParallel) else model
    tensors = _tensors(model, groups, lr, rescale)
    ranks = RankGroup.of(process_group)
    verify_replicas({t.name: t.parameter for t in tensors}, process_group)

    gauges = [max(float(t.constraint.gauge(t.start)), 1e-300) for t in tensors]
    greatest = torch.tensor(gauges, dtype=torch.float64).reciprocal()
    scales = greatest.clamp(max=1)  # SFW's own start is feasible
    floors = [floor_bias if t.name.endswith("bias") else floor_weight for t in tensors]
    least = torch.tensor(floors, dtype=torch.float64)
    learned = torch.tensor([bool(t.start.any()) for t in tensors])
    adam = _Adam(len(tensors), kappa, betas)
    first_step = FirstStep(model, loss, tensors, ranks)
    device = tensors[0].start.device
    half_batches = _endless(batches, device)
    keep_random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # Of the attention kernels only the plain one can be differentiated twice.
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    with evaluation_mode(model, except_for=norms), keep_random_state, sdpa_kernel(SDPBackend.MATH):
        for step in range(1, steps + 1):
            first, second, new = next(half_batches), next(half_batches), next(half_batches)
            after, slopes = first_step.loss_after(scales, _joined(first, second), _joined(first, new))
            if not (math.isfinite(after) and slopes.isfinite().all()):
                raise UserError(f"SFW-Init: the loss after one step is {after} in iteration {step}: lower lr, now {lr}")
            moved = scales - adam.update((slopes / lr).clamp(-1, 1))
            scales = torch.where(learned, moved.maximum(least), scales)
            if progress:
                progress(step, after)
    scales = scales.minimum(greatest)
    for t, scale in zip(tensors, scales.tolist(), strict=True):
        t.parameter.detach().copy_(t.start * scale)
    return {t.name: scale for t, scale in zip(tensors, scales.tolist(), strict=True)}


class _Adam:
    """Kingma and Ba, arXiv 1412.6980, for one number a tensor."""

    def __init__(self, n: int, kappa: float, betas: tuple[float, float]) -> None:
        self._kappa, self._betas, self._count = kappa, betas, 0
        self._mean, self._square = torch.zeros(2, n, dtype=torch.float64)

    def update(self, slopes: Tensor) -> Tensor:
        self._count += 1
        (one, two), count = self._betas, self._count
        self._mean = one * self._mean + (1 - one) * slopes
        self._square = two * self._square + (1 - two) * slopes.square()
        return self._kappa * (self._mean / (1 - one**count)) / ((self._square / (1 - two**count)).sqrt() + 1e-8)


def _tensors(model: nn.Module, groups: Sequence[dict[str, Any]], lr: float, rescale: Rescale) -> list[Start]:
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError("SyncBatchNorm cannot be differentiated twice: call sfw_init before convert_sync_batchnorm")
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        for index, entry in enumerate(group["params"]):
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if parameter not in names:
                raise UserError(
                    f"a parameter of shape {tuple(parameter.shape)} is not the model's: constrain(model, …)"
                )
            if isinstance(parameter, DTensor) or parameter.is_meta:
                raise UserError(
                    f"{names[parameter]} is not whole on this rank: call sfw_init before the model is divided"
                )
            constraint = constraint_of(group, index)
            constraint.diameter(parameter.numel())  # raises for a set that is not bound
            rate = float(learning_rate({"lr": lr, **group}))
            options = rate, group.get("rescale", rescale), group.get("weight_decay", 0.0)
            if parameter.requires_grad:
                start = parameter.detach().clone()
                found.append(Start(names[parameter], parameter, start, constraint, *options))
    if not found:
        raise UserError("the groups have no trainable parameter: give those of constrain(model, …)")
    return found


def _check(lr: float, rescale: str, steps: int, kappa: float, betas: Sequence[float], floors: Sequence[float]) -> None:
    names = ", ".join(RULES)
    for valid, message in (
        (0 < lr < math.inf, f"lr must be > 0, got {lr}: write the training's, 1.0 in the paper"),
        (rescale in RULES, f"rescale must be one of {names}, got {rescale!r}"),
        (steps >= 1, f"steps must be at least 1, got {steps}: the paper has 390"),
        (0 < kappa < math.inf, f"kappa must be > 0, got {kappa}: the paper has 0.001"),
        (all(0 <= beta < 1 for beta in betas), f"betas must be in [0, 1), got {betas}: write (0.9, 0.999)"),
        (
            all(0 <= x < 1 for x in floors),
            f"floor_weight and floor_bias must be in [0, 1), got {floors}: write 0.01, 0",
        ),
    ):
        if not valid:
            raise UserError(message)


def _endless(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    while True:
        empty = True
        for inputs, targets in batches:
            empty = False
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if empty:
            raise UserError("batches has nothing, or nothing more: give a list or a DataLoader, which can start over")


def _joined(one: Batch, other: Batch) -> Batch:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])
