"""Stochastic Frank-Wolfe as a torch optimizer, on one rank or many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Unconstrained
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.optim.constrained_optimizer import ConstrainedOptimizer
from sfw_dist.optim.param_groups import check_group, check_options, make_feasible, merge_param_groups
from sfw_dist.optim.sharding.distribution import Distribution
from sfw_dist.optim.sharding.dtensors import FlatSegment
from sfw_dist.optim.sharding.grad_reducer import BucketGradients, GradReducer
from sfw_dist.optim.sharding.gradients import check_gradients, gradient_of
from sfw_dist.optim.sharding.interface import Distributor
from sfw_dist.optim.sharding.join import StepsForJoined
from sfw_dist.optim.sharding.state_dict import (
    all_ranks_called,
    by_place,
    check_shapes,
    gather_state,
    load_dtensor,
    load_owned,
    steps_of,
    without_own,
)
from sfw_dist.optim.statistics import LastStep, StepStatistics
from sfw_dist.optim.update import RULES, Rescale


class SFW(ConstrainedOptimizer, StepsForJoined):
    """Stochastic Frank-Wolfe with momentum (Lu et al., ICLR 2022, Algorithm 1; Pokutta et al., arXiv 2010.07243).

    A tensor's first step takes ``m ← g``, later ones ``m ← ρ·m + (1−ρ)·g``; then::

        v ← argmin_{v∈C} ⟨v, m⟩        γ ← clamp(lr·f, 0, 1)        θ ← (1 − γ)·θ + γ·v

        rescale     gradient             fast_gradient    diameter    none
        f           ‖m‖₂ / ‖θ − v‖₂      2·‖m‖₂ / D       1 / D       1

    so θ stays in the convex set C. A parameter group without ``constraint``, or with ``Unconstrained()``, takes
    momentum-SGD steps as ``torch.optim.SGD`` does (``g ← g + weight_decay·θ; m ← ρ·m + g; θ ← θ − lr·m``).

    Several ranks share the work; nothing else in a training script changes. With n the entries of all tensors::

        phase                                    each rank                                   bytes sent
        0  gradients all-reduced (by DDP)        all tensors                                 ~ 8·n
           or each reduced to its owner (hook)                                               ~ 4·n
        1  momentum, LMO, step size              the tensors it owns, n / world_size         -
        2  all-gather of the vertices            writes its own segment, reads all           ~ 0.13·n at k_frac 5 %
        3  θ ← (1 − γ)·θ + γ·v                   all tensors, from the same bytes            -

    Groups, parameters and state that a framework or the script has changed are taken in at the next step. Frozen
    parameters (``requires_grad=False``) stay as they are, without state, and join when they are trainable. At the first
    step the ranks compare their parameters and gradients, and weights loaded since are brought into their sets.

    A group may have an ``lr_factor``: its rate is ``lr · lr_factor``, so that a schedule that writes one ``lr`` into
    every group keeps the ratio between sets and, say, biases.

    A tensor's owner follows from names, sizes and costs alone (:mod:`sfw_dist.optim.sharding.assignment`), checked by
    hash. Momentum is kept by the owner only. One rank and N ranks give bitwise equal parameters from equal gradients,
    and all replicas stay bitwise equal. If an owner has no gradient for a tensor, the tensor stays as it is, on every
    rank. DTensors are taken as they are: each rank steps its entries, after a few small all-reduces for all tensors
    together (:mod:`sfw_dist.optim.sharding.sharded`); their mesh says who shares them.

    Args:
        params: parameters or param groups, usually from :func:`~sfw_dist.constrain`. Tensors outside their set are
            divided by their gauge.
        lr: learning rate η ≥ 0, a number or a tensor of one.
        momentum: ρ in [0, 1).
        rescale: how the learning rate becomes a step size, see above.
        weight_decay: L2 penalty ≥ 0 of the unconstrained tensors.
        split: tensors of more entries than this may be divided between owners, where one owner would have far more
            work than the mean; ``None``: never. Their LMOs take a few small messages a step, all together.
        replicate_momentum: keep the momentum of all tensors on every rank. ``state_dict`` then waits for no other rank,
            for frameworks that call it only on the rank that saves. Gradients must be all-reduced.
        fused: compiled kernels: on the CPU, if there is a C++ compiler, the results are the same to the bit; on a GPU,
            if Triton is installed, up to the last bit of the step sizes.
        process_group: ranks that share the work; ``None``: the default group if there is one, else this process.

    Raises:
        ValueError: an option outside its domain, a set that is not bound, or ranks with other parameters or sets; a
            rank outside ``process_group``; parameters of FSDP1.

    Warns:
        UserWarning: no group has a ``constraint``, so that all of them take momentum-SGD steps.

    Example:
        >>> from sfw_dist import SFW, KSparsePolytope, constrain
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = SFW(constrain(net, KSparsePolytope(k=2, tau=15.0)), lr=0.1)
        >>> net(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.statistics())
        ['bias', 'weight']
    """

    options: ClassVar = ("lr", "momentum", "rescale", "weight_decay", "constraint")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        rescale: Rescale = "gradient",
        weight_decay: float = 0.0,
        *,
        split: int | None = 65_536,
        replicate_momentum: bool = False,
        fused: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        StepsForJoined.__init__(self)
        ranks = RankGroup.of(process_group)
        self._distribution = Distribution(ranks, split=split, replicate=replicate_momentum, fused=fused)
        self._grad_reducer: GradReducer | None = None
        self._last_step = LastStep()
        if isinstance(params, Iterator):
            params = list(params)
        plain = isinstance(params, Tensor) or not any(isinstance(g, dict) and "constraint" in g for g in params)
        if plain:
            warnings.warn(
                f"no param group has a constraint, so SFW takes momentum-SGD steps with lr {lr}: give it "
                "constrain(model, KSparsePolytope(…))",
                stacklevel=2,
            )
        options = {"lr": lr, "momentum": momentum, "rescale": rescale, "weight_decay": weight_decay}
        super().__init__(params, {**options, "constraint": Unconstrained()})
        self._plan()

    def _begin(self, group: dict[str, Any]) -> None:
        check_group(group)
        self._moved = [*self._moved, *make_feasible(group)]  # the next step assigns it to owners

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps its own attributes only; with ours, copies and pickles of an optimizer can step."""
        ours = {name: getattr(self, name) for name in ("_distribution", "_last_step", "_join_config")}
        return {**super().__getstate__(), **ours, "_grad_reducer": None}

    def _follow_groups(self) -> None:
        self._complete_groups()
        self._last_step.clear()
        self._distribution.follow(self.param_groups, self.state)

    def _plan(self, *, keep_owners: bool = True) -> None:
        self._last_step.clear()
        self._distribution.plan(self.param_groups, self.state, keep_owners=keep_owners)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on every tensor with a gradient.

        Args:
            closure: evaluated first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            UserError: a gradient that is sparse or not finite, on every rank, with the tensor's name and before any
                parameter has changed; a momentum with such a gradient starts afresh. (On a GPU finiteness is checked,
                and the error raised, by the next call of :meth:`statistics`.)
        """
        Join.notify_join_context(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch._disable_dynamo  # addresses, messages and compiled kernels: there is nothing to trace
    @torch.no_grad()
    def _take_step(self, *, joined: bool = False) -> None:
        """A step; ``joined``: for other ranks' sake, of a rank that has run out of data."""
        distributors = self._distribute()
        received = self._receive_for_joined(joined=joined)
        if self._distribution.begin(self.param_groups, gradients_are_reduced=self._grad_reducer is None):
            self._moved = []
        for distributor in distributors:
            gradients = [received.get(s.parameter, gradient_of(s.parameter)) for s in distributor.shards]
            distributor.compute_vertices(self.state, gradients)
            distributor.all_gather_vertices()
            # A copy, on its device: nothing here waits for a GPU, so that the step can be captured in a CUDA graph.
            self._last_step.record(distributor.shards, distributor.step_stats())
        self._check_finite(wait=False)
        for distributor in distributors:
            distributor.apply_update()

    def _distribute(self) -> list[Distributor]:
        """The distributors of the present groups, after what has changed since the last step is taken in."""
        if self._distribution.replicated_shards and (ranks := self._distribution.ranks_that_joined()):
            # A framework has joined other ranks after the script built its optimizer.
            with self._hooks_unplugged():
                state, self._distribution.ranks = self._whole_state(), ranks
                self._load(state["state"], state["param_groups"])
        if self._distribution.changed(self.param_groups):
            self._follow_groups()
        for group in self.param_groups:
            if group["rescale"] not in RULES:
                check_options(group)
        distributors = self._distribution.distributors(self.param_groups)
        self._distribution.complete(self.state)
        # By every rank and before any work: an owner that raised alone would leave the others waiting.
        check_gradients(self.param_groups, distributors, self._distribution.is_member)
        return distributors

    def _check_finite(self, *, wait: bool) -> None:
        bad = self._last_step.not_finite(wait=wait)
        if bad:
            for distributor in self._distribution.distributors(self.param_groups):
                distributor.reset_momentum(bad, self.state)
            for group in self.param_groups:
                check_options(group)  # a rate that is not finite, set by a scheduler, shows here first
            found = [name for name in dict.fromkeys(s.name for s in self._distribution.shards) if name in bad]
            names = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"the gradient of {names} is not finite: lower the learning rate, or skip such steps with GradScaler"
            )

    def statistics(self) -> dict[str, StepStatistics]:
        """The last step's gap, γ and effective learning rate of each constrained tensor.

        Returns:
            By name, the same on every rank, because they travelled with the vertices. Zeros before the first step. On a
            GPU this waits for the step.

        Raises:
            UserError: a gradient of the last step was not finite.
        """
        self._check_finite(wait=True)
        return self._last_step.statistics(self._distribution.shards)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, every tensor's momentum included: loads at any number of ranks.

        With several ranks it is collective, unless ``replicate_momentum`` is set: **every** rank calls it. After five
        seconds a rank that waits for others says so. For DTensors it holds DTensors, as any torch optimizer's does;
        ``torch.distributed.checkpoint`` stores those whole. Constraints are plain values, so
        ``torch.load(weights_only=True)`` reads what ``torch.save`` writes. Hooks see the whole state.

        Raises:
            RuntimeError: (gloo) not every rank called within five minutes; on rank 0 it names the missing ones.
            UserError: the ranks that hold the rest of the state are no longer in a process group.
        """
        return super().state_dict()

    def _whole_state(self) -> dict[str, Any]:
        distribution = self._distribution
        if distribution.ranks.size == 1 or distribution.replicate or not distribution.replicated_shards:
            return self._local_state()
        distribution.ranks_that_joined()  # raises where the others have gone
        with all_ranks_called(distribution.ranks):
            state = self._local_state()
            if not distribution.replicated_shards:  # a framework has divided all of them since the last step
                return state
            assert distribution.specs is not None
            gathered = gather_state(distribution.specs, distribution.replicated_shards, self.state, distribution.ranks)
            others = without_own(state["state"])
            for number, own in zip(self._numbers(), gathered.values(), strict=True):
                state["state"][number] = {**others.get(number, {}), **own}
        return state

    def _local_state(self) -> dict[str, Any]:
        """What this rank has, after what has changed since the last step is taken in."""
        if self._distribution.changed(self.param_groups, sets_too=False):  # they would give momenta to other tensors
            if self._distribution.replicate:  # this rank may be the only one that saves
                present = {p for group in self.param_groups for p in group["params"]}
                for parameter in [p for p in self.state if isinstance(p, Tensor) and p not in present]:
                    del self.state[parameter]
            else:
                self._follow_groups()
        return super()._whole_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, at this or another number of ranks; each rank keeps what it owns.

        The groups' options, constraints included, become those that were saved, as in torch. Momentum may be whole
        tensors or DTensors, whatever the parameters are.

        Raises:
            ValueError: the state has other groups or shapes, or is another optimizer's. Nothing has changed then.
        """
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def _load(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        distribution = self._distribution
        if distribution.changed(self.param_groups):
            self._follow_groups()
        if distribution.is_flat:  # as the framework saved it
            super()._load(state, groups)
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        everything = by_place(state, groups, len(parameters))
        for group in groups:
            check_options(group)
        check_shapes(everything, self.param_groups)  # before anything changes
        # torch would cast momentum to the parameter's type and keep what others own, so the tensors are loaded below.
        super()._load(without_own(state), groups)
        distribution.admit(p for p, saved in zip(parameters, everything, strict=True) if saved)
        self._plan(keep_owners=False)
        assert distribution.specs is not None
        saved = {i: everything[number] for i, number in enumerate(self._numbers())}
        rank = None if distribution.replicate else distribution.ranks.rank
        load_owned(saved, distribution.specs, distribution.replicated_shards, self.state, rank)
        for number in self._numbers(of_dtensors=True):
            load_dtensor(everything[number], self.state[parameters[number]])
        distribution.loaded(p for p, saved in zip(parameters, everything, strict=True) if steps_of(saved) > 0)

    def _numbers(self, *, of_dtensors: bool = False) -> list[int]:
        """The places, as state dicts number parameters, of the members that are whole on every rank, or DTensors."""
        places: dict[Tensor, int] = {}
        for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            if self._distribution.is_member(parameter) and isinstance(parameter, DTensor) == of_dtensors:
                places.setdefault(parameter, number)
        return list(places.values())

    def on_bucket(
        self, bucket: dist.GradBucket, communication_dtype: torch.dtype | None = None
    ) -> torch.futures.Future[Tensor]:
        """For communication hooks: reduce a bucket of gradients to their owners.

        Raises:
            UserError: a parameter that this optimizer does not have, or ``replicate_momentum``.
        """
        if self._distribution.replicate:
            raise UserError("replicate_momentum needs all gradients on every rank: take no hook, or leave it out")
        if self._grad_reducer is None:
            self._grad_reducer = GradReducer(self._distribution.ranks, bucket.buffer().device)
        shards, owners = self._distribution.replicated_shards, self._distribution.owners()
        return self._grad_reducer.reduce(BucketGradients.of(bucket, shards, owners), communication_dtype)

    def merge_param_groups(self) -> None:
        """Merge groups that differ in their sets alone, for a framework that steps one group after the other."""
        self.param_groups = merge_param_groups(self.param_groups)
        self._plan(keep_owners=False)

    def adopt(
        self, segments: Mapping[int, Sequence[FlatSegment]], process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Continue with a framework's flat tensors, which have replaced the groups' parameters; collective.

        Momentum starts afresh. From then on :meth:`step` takes the groups that it finds in ``param_groups``, whether
        all or one at a time, and ``state_dict`` holds what this rank has.

        Args:
            segments: by the number of each group, in the order in which they lie in its one flat parameter; every
                rank names every tensor of the group, with ``numel`` 0 where it has none of it.
            process_group: the ranks that share them; ``None``: the default group.

        Raises:
            ValueError: the ranks do not hold each entry of each tensor once.
        """
        self._last_step.clear()
        self._moved = []
        self._distribution.adopt(self.param_groups, segments, RankGroup.of(process_group), self.state)
