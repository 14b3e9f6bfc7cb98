"""Baselines that keep each tensor in its convex set: Frank-Wolfe with AdaGrad's metric, and projected SGD.

They take the same param groups as :class:`~sfw_dist.SFW`, sets from :func:`~sfw_dist.constrain` included. Their work is
not divided over ranks: after DistributedDataParallel's all-reduce every rank has the same gradients and does the same,
and sums have a fixed form (:mod:`sfw_dist.ops.pairwise_sum`), so replicas stay equal whatever each rank's number of
threads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint, Unconstrained
from sfw_dist.distributed.rank_group import RankGroup, verify_agreement
from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import inner_product, row_sums, tree_sum
from sfw_dist.optim.constrained_optimizer import ConstrainedOptimizer
from sfw_dist.optim.param_groups import (
    Entry,
    Moved,
    bring_in_loaded,
    check_group,
    constraint_of,
    entries,
    make_feasible,
    take_first_ranks_radii,
)
from sfw_dist.optim.sharding.gradients import verify_first_step
from sfw_dist.optim.update import learning_rate

_SQUARES = "sum_of_squares"
"""The name of AdaGradSFW's S in the state."""


class WholeTensorOptimizer(ConstrainedOptimizer):
    """Steps every tensor by itself, in its group's set. State is kept in the parameters' types, as torch's SGD does.

    Frozen tensors stay as they are.

    Raises:
        ValueError: an option outside its domain, a set that is not bound, or DTensors.
    """

    _process_group: dist.ProcessGroup | None = None
    _verified = False
    """Whether the ranks have compared their tensors. A copy, or what was unpickled, compares again."""

    def _begin(self, group: dict[str, Any]) -> None:
        check_group(group)
        if any(isinstance(parameter, DTensor) for parameter in group["params"]):
            raise ValueError(f"{type(self).__name__} takes whole tensors, got a DTensor: divide none, or take SFW")
        self._moved = [*self._moved, *self._enter(group)]

    def _enter(self, group: dict[str, Any]) -> list[Moved]:
        """A feasible start of the trainable tensors."""
        return make_feasible(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on every tensor with a gradient; a ``closure`` is evaluated first, with gradients, and returned.

        Raises:
            UserError: a sparse gradient, before any parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch._disable_dynamo  # a compiled step would round otherwise than the ranks' that are not compiled
    @torch.no_grad()
    def _take_step(self) -> None:
        self._complete_groups()
        self._verify()
        stepping = [entry for entry in self._trainable() if entry.parameter.grad is not None]
        for entry in stepping:
            if entry.parameter.grad is not None and entry.parameter.grad.is_sparse:
                raise UserError(f"{entry.name} has a sparse gradient: take dense ones (nn.Embedding(sparse=False))")
        self._before_steps(stepping)
        for entry in stepping:
            assert entry.parameter.grad is not None
            self._move(entry.parameter, entry.parameter.grad, entry.group, entry.constraint)

    def _verify(self) -> None:
        """At the first step that moves something, the ranks compare parameters, sets and gradients; collective."""
        if self._verified or all(learning_rate(group) == 0 for group in self.param_groups):
            return
        self._verified, self._moved, ranks = True, [], RankGroup.of(self._process_group)
        take_first_ranks_radii(self._trainable(), ranks)
        found = self._trainable()
        if found:
            described = [f"{e.name} {tuple(e.parameter.shape)} {e.parameter.dtype} {e.constraint!r}" for e in found]
            verify_agreement(described, ranks, {entry.parameter.device for entry in found})
            verify_first_step({e.name: e.parameter for e in found}, ranks, gradients_are_reduced=True)

    def _trainable(self) -> list[Entry]:
        return [entry for entry in entries(self.param_groups) if entry.parameter.requires_grad]

    def _before_steps(self, stepping: Sequence[Entry]) -> None:
        """Whatever is to be done before these tensors step."""

    @abstractmethod
    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], constraint: Constraint) -> None:
        """One tensor's step, in place."""

    def _momentum(self, parameter: Tensor, gradient: Tensor, rho: float, new: float) -> Tensor:
        """``m ← g`` on the first step, ``ρ·m + new·g`` afterwards; with ρ = 0 it is ``g``, and nothing is kept."""
        if rho == 0:
            return gradient
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = gradient.detach().clone(memory_format=torch.preserve_format)
        else:
            state["momentum_buffer"].mul_(rho).add_(gradient, alpha=new)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _descend(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """A step of momentum SGD with weight decay, as ``torch.optim.SGD`` takes it."""
        if group["weight_decay"] != 0:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        parameter.add_(self._momentum(parameter, gradient, group["momentum"], 1.0), alpha=-float(learning_rate(group)))


class AdaGradSFW(WholeTensorOptimizer):
    """Frank-Wolfe steps on AdaGrad's quadratic model (Combettes, Spiegel, Pokutta, arXiv 2009.14114, Algorithm 1).

    With momentum as in Pokutta et al., arXiv 2010.07243; products of tensors are entry by entry::

        m ← g on a tensor's first step, ρ·m + (1 − ρ)·g afterwards
        S ← S + m²        H ← √S + δ        y ← θ
        inner_steps times:
            q ← m + H·(y − θ)/lr              the gradient at y of ⟨m, y − θ⟩ + ‖y − θ‖²_H / (2·lr)
            v ← argmin_{v∈C} ⟨v, q⟩           γ ← clamp(lr·⟨q, y − v⟩ / ‖y − v‖²_H, 0, 1)
            y ← y + γ·(v − y)                 the best point between y and v
        θ ← y

    The papers write S as a sum of squared gradients; the published implementation adds squares of the *momentum*, and
    so do we (``tests/golden/variants.npz``). A group without ``constraint``, or with ``Unconstrained()``, takes
    momentum-SGD steps with its own ``lr`` and ``weight_decay``, as in SFW.

    Args:
        params: parameters or param groups. Tensors outside their set are scaled into it by their gauge.
        lr: learning rate ≥ 0.
        momentum: ρ in [0, 1).
        inner_steps: LMOs a step, at least 1.
        delta: δ > 0, which keeps H positive.
        weight_decay: L2 penalty ≥ 0 of the unconstrained tensors.
        process_group: ranks that hold replicas, which they compare at the first step; ``None``: the default group.

    Raises:
        ValueError: an option outside its domain, a set that is not bound, or DTensors.

    Example:
        >>> from sfw_dist import KSparsePolytope, constrain
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = AdaGradSFW(constrain(net, KSparsePolytope(k=2, tau=15.0)), lr=0.01)
        >>> net(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
    """

    options: ClassVar = ("lr", "momentum", "inner_steps", "delta", "weight_decay", "constraint")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        inner_steps: int = 2,
        delta: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._process_group = process_group
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "inner_steps": inner_steps,
            "delta": delta,
            "weight_decay": weight_decay,
            "constraint": Unconstrained(),
        }
        super().__init__(params, defaults)

    def _begin(self, group: dict[str, Any]) -> None:
        if group["inner_steps"] != int(group["inner_steps"]) or group["inner_steps"] < 1:
            raise ValueError(f"inner_steps must be a whole number from 1, got {group['inner_steps']}: write 2")
        if not group["delta"] > 0:
            raise ValueError(f"delta must be > 0, got {group['delta']}: write 1e-8")
        super()._begin(group)

    def _before_steps(self, stepping: Sequence[Entry]) -> None:
        bring_in_loaded(self.param_groups, {e.parameter for e in stepping if _SQUARES not in self.state[e.parameter]})

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], constraint: Constraint) -> None:
        if constraint.is_unconstrained:
            self._descend(parameter, gradient, group)
            return
        lr, rho, state = float(learning_rate(group)), group["momentum"], self.state[parameter]
        m = self._momentum(parameter, gradient, rho, 1 - rho)
        if _SQUARES not in state:
            state[_SQUARES] = torch.zeros_like(parameter)
        metric = state[_SQUARES].addcmul_(m, m).sqrt().add_(group["delta"])
        if lr == 0:  # the model of a step of length 0 is 0/0
            return
        y = parameter.clone()
        for _ in range(group["inner_steps"]):
            q = m + metric * (y - parameter) / lr
            difference = y - constraint.lmo(q)
            length = tree_sum(row_sums(_weighted_square, metric.reshape(-1), difference.reshape(-1)))
            gamma = (lr * inner_product(q, difference) / length).clamp(0, 1)
            # Where y = v the quotient is 0/0; a gradient that is not finite, though, stays to be seen.
            gamma = torch.where(length == 0, torch.zeros_like(gamma), gamma)
            y.sub_(difference * gamma.to(y.dtype))
        parameter.copy_(y)


class ProjectedSGD(WholeTensorOptimizer):
    """Momentum SGD whose every step ends with the Euclidean projection onto the set::

        g ← g + weight_decay·θ        m ← g on a tensor's first step, ρ·m + g afterwards
        θ ← argmin_{y∈C} ‖y − (θ − lr·m)‖₂

    With ``Unconstrained()`` it is ``torch.optim.SGD``. With ``LpBall(2, …)`` it is the SGD under an L2 bound that
    Pokutta et al. compare with (arXiv 2010.07243).

    Args:
        params: parameters or param groups, with sets that have a projection. Tensors outside are projected at once.
        lr: learning rate ≥ 0.
        momentum: ρ in [0, 1).
        weight_decay: L2 penalty ≥ 0 of all tensors.
        process_group: ranks that hold replicas, which they compare at the first step; ``None``: the default group.

    Raises:
        ValueError: an option outside its domain, a set without a projection, or DTensors.

    Example:
        >>> from sfw_dist import LpBall, constrain
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = ProjectedSGD(constrain(net, LpBall(2, tau=2.0)), lr=0.05)
        >>> net(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
    """

    options: ClassVar = ("lr", "momentum", "weight_decay", "constraint")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._process_group = process_group
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "constraint": Unconstrained()}
        super().__init__(params, defaults)

    @torch.no_grad()
    def _enter(self, group: dict[str, Any]) -> list[Moved]:
        entered = []
        for index, parameter in enumerate(group["params"]):
            constraint = constraint_of(group, index)
            if constraint.is_unconstrained or not parameter.requires_grad:
                continue
            try:
                projected = constraint.project(parameter)
            except ValueError:
                raise ValueError(
                    f"{constraint!r} has no Euclidean projection: give ProjectedSGD LpBall(2, …), or take SFW"
                ) from None
            if not torch.equal(parameter, projected):
                before = parameter.detach().clone()
                parameter.copy_(projected)
                entered.append(
                    Moved("", parameter, float(constraint.gauge(before)), before, parameter.detach().clone())
                )
        return entered

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], constraint: Constraint) -> None:
        self._descend(parameter, gradient, group)
        if not constraint.is_unconstrained:
            parameter.copy_(constraint.project(parameter))


def _weighted_square(weight: Tensor, x: Tensor) -> Tensor:
    return weight.double() * x.double().square()
