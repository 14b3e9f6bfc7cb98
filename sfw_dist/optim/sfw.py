"""Stochastic Frank-Wolfe for 1..N ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future as Task
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sfw_dist.constraints import Constraint, Unconstrained
from sfw_dist.distributed.rank_group import Ranks, agree
from sfw_dist.errors import UserError
from sfw_dist.optim.param_groups import check_group, constraint_of, from_plain, into_the_set, merged, to_plain
from sfw_dist.optim.shard import Slot, momentum_buffer
from sfw_dist.optim.sharding.assignment import Part
from sfw_dist.optim.sharding.dtensors import Shared
from sfw_dist.optim.sharding.grad_reducer import Received, Reducer, Reduction
from sfw_dist.optim.sharding.ownership import plan_owners
from sfw_dist.optim.sharding.replicated import Batch
from sfw_dist.optim.sharding.segment import Segment
from sfw_dist.optim.sharding.sharded import Sharded
from sfw_dist.optim.state_dict import by_place, check_shapes, gather_state, take_shared, take_state
from sfw_dist.optim.statistics import Headers, StepStatistics
from sfw_dist.optim.update import Rescale


class SFW(Optimizer):
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

    A tensor's owner follows from names, sizes and costs alone (:mod:`sfw_dist.optim.sharding.assignment`) and is
    checked by hash. Momentum lives only with the owner. One rank and N ranks give bitwise equal parameters from equal
    gradients, and all replicas stay bitwise equal. An owner without a gradient for a tensor leaves it as it is, on
    every rank.

    DTensors are taken as they are: each rank steps its entries, after at most four small all-reduces for all tensors
    together (:mod:`sfw_dist.optim.sharding.sharded`). The mesh says who shares them.

    Args:
        params: parameters or param groups, as a rule from :func:`~sfw_dist.constrain`. Tensors outside their set are
            scaled into it by their gauge.
        lr: learning rate η > 0.
        momentum: ρ in [0, 1).
        rescale: how the learning rate becomes a step size, see above.
        weight_decay: L2 penalty ≥ 0 of the unconstrained tensors.
        split: tensors of more entries than this may be divided between owners, where one owner would have far more
            work than the mean; ``None``: never. Their LMOs take four small messages more a step, all together.
        replicate_momentum: keep momentum whole on every rank. ``state_dict`` then waits for no other rank, for
            frameworks that call it on the one that saves. Gradients must be all-reduced.
        overlap: with a communication hook (:mod:`sfw_dist.optim.comm_hooks`), start a bucket's LMOs and the exchange
        of its
            vertices when its gradients are reduced, while the backward pass goes on. The answers are the same to the
            bit. Between backward and step nothing may then change the gradients: clipping has no effect, GradScaler is
            refused, and every parameter must get a gradient.
        fused: compiled kernels: on the CPU, where a C++ compiler is at hand, the answers are the same to the bit; on a
            GPU, where Triton is installed, up to the last bit of the step sizes.
        process_group: ranks that share the work; ``None``: the default group if there is one, else this process.

    Raises:
        ValueError: an option outside its domain, a set that is not bound, or ranks whose parameters differ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        rescale: Rescale = "gradient",
        weight_decay: float = 0.0,
        *,
        split: int | None = 65_536,
        replicate_momentum: bool = False,
        overlap: bool = False,
        fused: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group, self._ranks = process_group, Ranks.of(process_group)
        self._split, self._replicate = None if replicate_momentum else split, replicate_momentum
        self._fused, self.overlap = fused, overlap
        self._sets: list[Constraint] = []
        self._slots: list[Slot] = []
        self._parts: tuple[Part, ...] | None = None
        self._batches: dict[tuple[int, ...], Batch] = {}
        self._shared = Shared()
        self._reducer: Reducer | None = None
        self._begun: list[tuple[Batch, Task[None]]] = []
        self._headers = Headers()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "rescale": rescale,
            "weight_decay": weight_decay,
            "constraint": Unconstrained(),
        }
        super().__init__(params, defaults)
        self._make_plan()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; with several ranks all of them add the same group. Owners of earlier tensors stay."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            into_the_set(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if self._parts is not None:  # else __init__ is still adding groups, and plans once at its end
            self._make_plan()

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps its own attributes only; with ours, copies and pickles of an optimizer step on."""
        ours = ["_group", "_ranks", "_split", "_replicate", "_fused", "overlap", "_sets", "_slots", "_parts"]
        ours += ["_shared", "_headers"]
        fresh: dict[str, Any] = {"_batches": {}, "_reducer": None, "_begun": []}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}, **fresh}

    def _make_plan(self) -> None:
        self._sets = self._sets_of_groups()
        self._batches.clear()
        self._headers.clear()
        kept = self._parts or ()
        plan, self._slots = plan_owners(self.param_groups, self._ranks.size, self._split, kept)
        self._parts = plan.parts
        if self._slots:  # with DTensors alone there is no plan, and pipeline stages have optimizers of their own
            agree(bytes.fromhex(plan.fingerprint), self._ranks, {slot.parameter.device for slot in self._slots})
        known = {part.item for part in kept}
        for slot, part in zip(self._slots, plan.parts, strict=True):
            if part.item not in known:
                self._create_state(slot, part)
        self._shared.remake(self.param_groups, self.state)

    def _sets_of_groups(self) -> list[Constraint]:
        return [constraint_of(group, j) for group in self.param_groups for j in range(len(group["params"]))]

    def merge_groups(self) -> None:
        """:func:`~sfw_dist.optim.param_groups.merged`, before an engine takes the groups that steps group by group."""
        self.param_groups = merged(self.param_groups)
        self._parts = None
        self._make_plan()

    def adopt(self, segments: Mapping[int, Sequence[Segment]], process_group: dist.ProcessGroup | None = None) -> None:
        """Go on with an engine's flat tensors, which have taken the place of the groups' parameters; collective.

        Momentum starts anew. From then on :meth:`step` takes the groups that it finds in ``param_groups``, be it all
        or one at a time, and ``state_dict`` holds what this rank has.

        Args:
            segments: by the number of each group, in the order in which they lie in its one flat parameter; every
                rank names every tensor of the group, with length 0 where it has none of it.
            process_group: the ranks that share them; ``None``: the default group.

        Raises:
            ValueError: the ranks do not hold each entry of each tensor once.
        """
        self._ranks = Ranks.of(process_group)
        self._parts, self._slots = (), []
        self._batches.clear()
        self._headers.clear()
        self._shared.adopt(self.param_groups, segments, self._ranks, self.state)

    def _create_state(self, slot: Slot, part: Part) -> None:
        """State is there from the start, so that a checkpoint before the first step has the form of later ones.

        Tensors of other owners have an empty one: torch's distributed checkpoints take an optimizer without any state
        for one that never stepped, and would make this rank step alone.
        """
        state = self.state[slot.parameter]
        if self._replicate or part.owner == self._ranks.rank:
            state["step"] = torch.zeros(())
            if slot.group["momentum"] > 0:
                state["momentum_buffer"] = momentum_buffer(slot)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on every tensor with a gradient; a ``closure`` is evaluated first, with gradients, and returned.

        Raises:
            UserError: a gradient that is not finite, on every rank, with the tensor's name and before any parameter
                has changed; that tensor's momentum starts anew. (On a GPU this is looked at, and raised, by the next
                call of :meth:`statistics`.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.__dict__.pop("grad_scale", None) is not None:
            raise UserError("with overlap the step begins before GradScaler can unscale: take overlap=False, or bf16")
        self._step()
        return loss

    def _step(self) -> None:
        if not self._begun:
            self._follow_the_ranks()
            self._follow_the_groups()
        shared = self._shared.batches(self.param_groups)
        for slot in (*self._slots, *(slot for batch in shared for slot in batch.slots)):
            # By every rank and before any work: an owner that raised alone would hang the others.
            if slot.parameter.grad is not None and slot.parameter.grad.is_sparse:
                raise UserError(f"{slot.name} has a sparse gradient: SFW needs dense ones (nn.Embedding(sparse=False))")
        begun = self._finish_begun() if self._begun else []
        whole = [self._batch_of(tuple(range(len(self._slots))), self._ranks)] if self._slots and not begun else []
        now: list[Batch | Sharded] = [*whole, *shared]
        for batch in now:
            batch.answer(self.state, [slot.parameter.grad for slot in batch.slots])
            batch.exchange()
        for batch in (stepped := [*begun, *now]):
            # Copies, on their device: nothing here waits for a GPU, so that the step can be captured in a CUDA graph.
            self._headers.keep(batch.slots, batch.headers())
        self._check_finite(wait=False)
        for batch in stepped:
            batch.move()

    def _follow_the_ranks(self) -> None:
        """Share the work with ranks that have joined since, as where a framework joins them after the script began."""
        ranks = Ranks.of(self._group)
        if self._slots and ranks.size != self._ranks.size == 1:
            state, self._ranks = self.state_dict(), ranks
            self.load_state_dict(state)

    def _follow_the_groups(self) -> None:
        if not self._shared.flat and any(a is not b for a, b in zip(self._sets, self._sets_of_groups(), strict=True)):
            self._make_plan()  # someone gave a group another set

    def _batch_of(self, indices: tuple[int, ...], ranks: Ranks) -> Batch:
        if indices not in self._batches:
            assert self._parts is not None
            slots, owners = [self._slots[i] for i in indices], [self._parts[i].owner for i in indices]
            self._batches[indices] = Batch(slots, owners, ranks, fused=self._fused, replicate=self._replicate)
        return self._batches[indices]

    def receive(self, bucket: dist.GradBucket, reduction: Reduction) -> torch.futures.Future[Tensor]:
        """For communication hooks: reduce a bucket of gradients and, with ``overlap``, begin the step with them.

        Raises:
            UserError: a parameter that this optimizer does not have, or with ``overlap`` a second backward pass before
                the step.
        """
        assert self._parts is not None
        if self._reducer is None:
            self._reducer = Reducer(self._ranks, bucket.buffer().device)
        if self.overlap and bucket.index() == 0:
            if self._begun:
                raise UserError(
                    "a second backward pass before the step: accumulate under no_sync, or take overlap=False"
                )
            self._follow_the_groups()
        if reduction.to_owners and self._replicate:
            raise UserError("replicate_momentum needs all gradients on every rank: take all_reduce, or leave it out")
        indices, received = Received.of(bucket, self._slots, [part.owner for part in self._parts])
        if not self.overlap:
            return self._reducer.run(received, reduction, None)[0]
        batch = self._batch_of(indices, self._reducer.ranks)

        def begin() -> None:
            batch.answer(self.state, received.gradients)
            batch.exchange()

        reduced, task = self._reducer.run(received, reduction, begin)
        self._begun.append((batch, task))
        return reduced

    def _finish_begun(self) -> list[Batch]:
        """The batches that the backward pass began, when they are done."""
        assert self._reducer is not None
        begun, self._begun = self._begun, []
        self._reducer.finish([task for _, task in begun])
        for slot in (slot for batch, _ in begun for slot in batch.slots):
            if slot.parameter.grad is None:
                raise UserError(f"{slot.name} got no gradient: with unused parameters take overlap=False")
        return [batch for batch, _ in begun]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by ``GradScaler``, which then leaves gradients alone and calls :meth:`step` with ``grad_scale`` set."""
        return self.overlap

    def _check_finite(self, *, wait: bool) -> None:
        bad = self._headers.not_finite(wait=wait)
        if bad:
            batches: list[Batch | Sharded] = [*self._batches.values(), *self._shared.batches(self.param_groups)]
            for batch in batches:
                batch.forget(bad, self.state)  # their momentum starts anew, with the next gradient
            found = [name for name in dict.fromkeys(slot.name for slot in self._all_slots()) if name in bad]
            names = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"the gradient of {names} is not finite: lower the learning rate, or skip such steps with GradScaler"
            )

    def _all_slots(self) -> list[Slot]:
        return [*self._slots, *self._shared.slots]

    def statistics(self) -> dict[str, StepStatistics]:
        """The last step's gap, γ and effective learning rate of each constrained tensor, by name, on every rank.

        They travelled with the vertices. On a GPU this waits for the step. Before the first step all are 0.
        """
        self._check_finite(wait=True)
        return self._headers.statistics(self._all_slots())

    def state_dict(self) -> dict[str, Any]:
        """The whole state, every tensor's momentum included: loads at any number of ranks.

        With several ranks it is collective, but for ``replicate_momentum``: **every** rank calls it. Of DTensors it
        holds DTensors, as any torch optimizer does; ``torch.distributed.checkpoint`` stores those whole.
        Constraints are plain values, so ``torch.load(weights_only=True)`` reads what ``torch.save`` writes.

        Raises:
            RuntimeError: (gloo) not every rank called within five minutes; on rank 0 it names the missing ones.
        """
        local = super().state_dict()
        for group in local["param_groups"]:
            group["constraint"] = to_plain(group["constraint"])
        if self._ranks.size > 1 and self._slots and not self._replicate:
            assert self._parts is not None
            gathered = gather_state(self._parts, self._slots, self.state, self._ranks)
            local["state"] |= dict(zip(self._numbers(), gathered.values(), strict=True))
        return local

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, at this or another number of ranks; each keeps what it owns.

        The groups' options, constraints too, become those that were saved, as in torch. Momentum may be whole tensors
        or DTensors, whatever the parameters are.

        Raises:
            ValueError: other groups or shapes than those saved.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        if not all("constraint" in group for group in groups):
            raise ValueError("the state is another optimizer's (its groups have no constraint): load one of SFW")
        for group in groups:
            group["constraint"] = from_plain(group["constraint"])
        if self._shared.flat:  # as the engine has saved it
            super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
            return
        assert self._parts is not None
        parameters = [p for group in self.param_groups for p in group["params"]]
        everything = by_place(state_dict["state"], groups, len(parameters))
        saved = {i: everything[number] for i, number in enumerate(self._numbers())}
        check_shapes(saved, self._parts, self._slots)  # by every rank and before anything changes
        # torch would cast momentum to the parameter's type, and keep what others own: the tensors go in below.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._parts = None
        self._make_plan()
        assert self._parts is not None
        take_state(saved, self._parts, self._slots, self.state, None if self._replicate else self._ranks.rank)
        for number in self._numbers(of_dtensors=True):
            take_shared(everything[number], self.state[parameters[number]])

    def _numbers(self, *, of_dtensors: bool = False) -> list[int]:
        """Which of all parameters, as state dicts count them, lie whole on every rank, or are DTensors."""
        parameters = (p for group in self.param_groups for p in group["params"])
        return [number for number, p in enumerate(parameters) if isinstance(p, DTensor) == of_dtensors]
