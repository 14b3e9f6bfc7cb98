"""Stochastic Frank-Wolfe for 1..N ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future as Task
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sfw_dist.batch import Batch, Ranks
from sfw_dist.constraints import KSparsePolytope, Unconstrained, constraint_from_spec
from sfw_dist.errors import UserError
from sfw_dist.groups import check_group, into_the_set
from sfw_dist.plan import Item, Part, make_plan
from sfw_dist.reducer import Received, Reducer, Reduction, strided_as
from sfw_dist.reduction import ROW
from sfw_dist.state import check_shapes, gather_state, take_state
from sfw_dist.step import Rescale, Slot, cost, momentum_buffer
from sfw_dist.wire import HEADER


class StepStatistics(NamedTuple):
    """What the last step did to one constrained tensor."""

    gap: float
    """Frank-Wolfe gap ``⟨m, θ − v⟩ ≥ 0`` of the momentum; of a full gradient it is 0 just at stationary points."""
    gamma: float
    """Step size γ in [0, 1]: the fraction of the way from θ to the vertex."""
    effective_lr: float
    """``γ·‖θ − v‖₂ / ‖m‖₂``: the learning rate with which SGD would have moved the tensor as far."""


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

    A tensor's owner follows from names, sizes and costs alone (:mod:`sfw_dist.plan`) and is checked by hash. Momentum
    lives only with the owner. One rank and N ranks give bitwise equal parameters from equal gradients, and all replicas
    stay bitwise equal. An owner without a gradient for a tensor leaves it as it is, on every rank.

    Args:
        params: parameters or param groups, as a rule from :func:`~sfw_dist.constrain`. Tensors outside their set are
            scaled into it by their gauge.
        lr: learning rate η > 0.
        momentum: ρ in [0, 1).
        rescale: how the learning rate becomes a step size, see above.
        weight_decay: L2 penalty ≥ 0 of the unconstrained tensors.
        split: tensors of more entries than this may be divided between owners, where one owner would have far more
            work than the mean; ``None``: never. Their LMOs take five small messages more a step, all together.
        overlap: with a communication hook (:mod:`sfw_dist.comm_hook`), start a bucket's LMOs and the exchange of its
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
        overlap: bool = False,
        fused: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._ranks = Ranks.of(process_group)
        self._split, self._fused, self.overlap = split, fused, overlap
        self._slots: list[Slot] = []
        self._parts: tuple[Part, ...] | None = None
        self._batches: dict[tuple[int, ...], Batch] = {}
        self._reducer: Reducer | None = None
        self._begun: list[tuple[Batch, tuple[int, ...], Task[None]]] = []
        self._headers = torch.zeros(0, HEADER, dtype=torch.float64)
        self._headers_of: list[int] = []
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
        ours = ("_ranks", "_split", "_fused", "overlap", "_slots", "_parts", "_headers", "_headers_of")
        fresh: dict[str, Any] = {"_batches": {}, "_reducer": None, "_begun": []}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}, **fresh}

    def _make_plan(self) -> None:
        kept = self._parts or ()
        tensors = [(group, i, j) for i, group in enumerate(self.param_groups) for j in range(len(group["params"]))]
        items = [self._item(*tensor) for tensor in tensors]
        for part in kept:
            if part.stop - part.start < items[part.item].entries and items[part.item].unit == 0:
                raise ValueError(
                    f"{items[part.item].name} is divided between ranks, and its new set needs it whole: "
                    "build the optimizer with split=None"
                )
        plan = make_plan(items, self._ranks.size, kept)
        self._parts = plan.parts
        self._slots = []
        for part in plan.parts:
            group, _, j = tensors[part.item]
            self._slots.append(Slot.of(items[part.item].name, group["params"][j], group, part.start, part.stop))
        self._headers = torch.zeros(len(self._slots), HEADER, dtype=torch.float64)
        self._headers_of = list(range(len(self._slots)))
        self._batches.clear()
        self._check_agreement(plan.fingerprint)
        known = {part.item for part in kept}
        for slot, part in zip(self._slots, plan.parts, strict=True):
            if part.item not in known:
                self._create_state(slot, part)

    def _item(self, group: dict[str, Any], group_index: int, index: int) -> Item:
        parameter, constraint = group["params"][index], group["constraint"]
        n = parameter.numel()
        name = group["param_names"][index] if "param_names" in group else f"group{group_index}.param{index}"
        divisible = isinstance(constraint, KSparsePolytope | Unconstrained)
        unit = ROW if self._split is not None and n > self._split and divisible else 0
        description = f"{tuple(parameter.shape)} {parameter.dtype} {constraint!r}"
        return Item(name, cost(n, constraint), n, description, unit)

    def _owns(self, index: int) -> bool:
        assert self._parts is not None
        return self._parts[index].owner == self._ranks.rank

    def _create_state(self, slot: Slot, part: Part) -> None:
        """State is there from the start, so that a checkpoint before the first step has the form of later ones.

        Tensors of other owners have an empty one: torch's distributed checkpoints take an optimizer without any state
        for one that never stepped, and would make this rank step alone.
        """
        state = self.state[slot.parameter]
        if part.owner == self._ranks.rank:
            state["step"] = torch.zeros(())
            if slot.group["momentum"] > 0:
                state["momentum_buffer"] = momentum_buffer(slot)

    def _check_agreement(self, fingerprint: str) -> None:
        if self._ranks.size == 1 or not self._slots:
            return
        mine = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8, device=self._device())
        gathered = mine.new_empty(self._ranks.size * mine.numel())
        dist.all_gather_into_tensor(gathered, mine, group=self._ranks.group)
        everyone = gathered.view(self._ranks.size, -1)
        differing = everyone.ne(everyone[0]).any(1).nonzero().view(-1).tolist()
        if differing:
            raise ValueError(
                f"ranks {differing} have other parameters or constraints than rank 0: "
                "build the same model and param groups, in the same order, on every rank"
            )

    def _device(self) -> torch.device:
        devices = {slot.parameter.device for slot in self._slots}
        if len(devices) > 1:
            raise ValueError(f"the parameters lie on {sorted(map(str, devices))}: with several ranks use one each")
        return devices.pop()

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
        if self._slots:
            self._step()
        return loss

    def _step(self) -> None:
        for slot in self._slots:  # by every rank and before any work: an owner that raised alone would hang the others
            if slot.parameter.grad is not None and slot.parameter.grad.is_sparse:
                raise UserError(f"{slot.name} has a sparse gradient: SFW needs dense ones (nn.Embedding(sparse=False))")
        if self._begun:
            parts = self._finish_begun()
        else:
            self._follow_the_groups()
            everything = tuple(range(len(self._slots)))
            batch = self._batch_of(everything, self._ranks)
            batch.answer(self.state, [slot.parameter.grad for slot in self._slots])
            batch.exchange()
            parts = [(batch, everything)]
        # One copy, on their device: nothing here waits for a GPU, so that the step can be captured in a CUDA graph.
        self._headers = torch.cat([batch.headers() for batch, _ in parts])
        self._headers_of = [i for _, indices in parts for i in indices]
        if self._headers.device.type == "cpu" and not self._headers[:, 0].isfinite().all():
            self._check_finite(self._read_headers())
        for batch, _ in parts:
            batch.move()

    def _follow_the_groups(self) -> None:
        if any(slot.constraint is not slot.group["constraint"] for slot in self._slots):
            self._make_plan()  # someone gave a group another set

    def _batch_of(self, indices: tuple[int, ...], ranks: Ranks) -> Batch:
        if indices not in self._batches:
            assert self._parts is not None
            slots, owners = [self._slots[i] for i in indices], [self._parts[i].owner for i in indices]
            self._batches[indices] = Batch(slots, owners, ranks, fused=self._fused)
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
        gradients = {p: strided_as(p, g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        indices = tuple(i for i, slot in enumerate(self._slots) if slot.parameter in gradients)
        if len({self._slots[i].parameter for i in indices}) < len(gradients):
            raise UserError("DDP reduces parameters that SFW does not have: give it all of them, or take no hook")
        slots = [self._slots[i] for i in indices]
        received = Received(
            bucket.buffer(),
            slots,
            [self._parts[i].owner for i in indices],
            [gradients[slot.parameter] for slot in slots],
            bucket.index(),
        )
        if not self.overlap:
            return self._reducer.run(received, reduction, None)[0]
        batch = self._batch_of(indices, self._reducer.ranks)

        def begin() -> None:
            batch.answer(self.state, received.gradients)
            batch.exchange()

        reduced, task = self._reducer.run(received, reduction, begin)
        self._begun.append((batch, indices, task))
        return reduced

    def _finish_begun(self) -> list[tuple[Batch, tuple[int, ...]]]:
        """The batches that the backward pass began, when they are done."""
        assert self._reducer is not None
        begun, self._begun = self._begun, []
        self._reducer.finish([task for _, _, task in begun])
        for _, indices, _ in begun:
            for i in indices:
                if self._slots[i].parameter.grad is None:
                    raise UserError(f"{self._slots[i].name} got no gradient: with unused parameters take overlap=False")
        return [(batch, indices) for batch, indices, _ in begun]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by ``GradScaler``, which then leaves gradients alone and calls :meth:`step` with ``grad_scale`` set."""
        return self.overlap

    def _read_headers(self) -> Tensor:
        """The last step's, float64 ``(slots, 3)`` in the order of the slots, on the CPU."""
        headers = torch.zeros(len(self._slots), HEADER, dtype=torch.float64)
        headers[self._headers_of] = self._headers.cpu()
        return headers

    def _check_finite(self, headers: Tensor) -> None:
        bad = headers[:, 0].isfinite().logical_not().nonzero().view(-1).tolist()
        for i in bad:
            if self._owns(i):
                self.state[self._slots[i].parameter]["step"].zero_()  # its momentum starts anew, with the next gradient
        if bad:
            found = list(dict.fromkeys(self._slots[i].name for i in bad))
            names = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"the gradient of {names} is not finite: lower the learning rate, or skip such steps with GradScaler"
            )

    def statistics(self) -> dict[str, StepStatistics]:
        """The last step's gap, γ and effective learning rate of each constrained tensor, by name, on every rank.

        They travelled with the vertices. On a GPU this waits for the step. Before the first step all are 0.
        """
        headers = self._read_headers()
        self._check_finite(headers)
        return {
            slot.name: StepStatistics(gap=gap, gamma=gamma, effective_lr=effective)
            for slot, (gamma, gap, effective) in zip(self._slots, headers.tolist(), strict=True)
            if not isinstance(slot.constraint, Unconstrained)
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole state, every tensor's momentum included: loads at any number of ranks.

        With several ranks it is collective: **every** rank calls it and gets the same. Constraints are plain values,
        so ``torch.load(weights_only=True)`` reads what ``torch.save`` writes.

        Raises:
            RuntimeError: (gloo) not every rank called within five minutes; on rank 0 it names the missing ones.
        """
        local = super().state_dict()
        for group in local["param_groups"]:
            group["constraint"] = group["constraint"].spec()
        if self._ranks.size > 1 and self._slots:
            assert self._parts is not None
            local["state"] = gather_state(self._parts, self._slots, self.state, self._ranks)
        return local

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, at this or another number of ranks; each keeps what it owns.

        The groups' options, constraints too, become those that were saved, as in torch.

        Raises:
            ValueError: other groups or shapes than those saved.
        """
        assert self._parts is not None
        check_shapes(state_dict["state"], self._parts, self._slots)  # by every rank and before anything changes
        groups = [dict(group) for group in state_dict["param_groups"]]
        if not all("constraint" in group for group in groups):
            raise ValueError("the state is another optimizer's (its groups have no constraint): load one of SFW")
        for group in groups:
            group["constraint"] = constraint_from_spec(group["constraint"])
        # torch would cast momentum to the parameter's type, and keep what others own: the tensors go in below.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._parts = None
        self._make_plan()
        assert self._parts is not None
        take_state(state_dict["state"], self._parts, self._slots, self.state, self._ranks.rank)
