"""How an optimizer's tensors are distributed: who owns what, and which distributors step them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.rank_group import RankGroup, verify_agreement
from sfw_dist.ops.pairwise_sum import ROW
from sfw_dist.optim.param_groups import check_group, constraint_of, make_feasible, name_of
from sfw_dist.optim.shard import Shard, State, new_state, step_cost
from sfw_dist.optim.sharding.assignment import ShardSpec, TensorSpec, assign
from sfw_dist.optim.sharding.dtensors import FlatSegment, distributors_of_dtensors, distributors_of_flat_buffers
from sfw_dist.optim.sharding.interface import Distributor
from sfw_dist.optim.sharding.replicated import ReplicatedDistributor
from sfw_dist.optim.sharding.sharded import ShardedDistributor

Groups = Sequence[dict[str, Any]]


_Described = tuple[Tensor, torch.dtype, torch.Size, torch.device]
"""A parameter, and what the plan of its step depends on."""


class Distribution:
    """The distributors of an optimizer's tensors, planned again when its groups or sets change.

    Tensors that every rank has whole are assigned to owners and stepped by one :class:`ReplicatedDistributor`; DTensors
    by a :class:`ShardedDistributor` for each mesh. Flat buffers take the place of both after :meth:`adopt`.

    Args:
        ranks: who shares the tensors that every rank has whole.
        split: such tensors of more entries may be divided between owners; ``None``: none.
        replicate: whether every rank keeps the momentum of all of them.
        fused: whether compiled kernels are used.
    """

    def __init__(self, ranks: RankGroup, *, split: int | None, replicate: bool, fused: bool) -> None:
        self.ranks, self.replicate = ranks, replicate
        self._split, self._fused = None if replicate else split, fused
        self.specs: tuple[ShardSpec, ...] | None = None
        """Owners of the whole tensors' shards; ``None`` before the first plan."""
        self.replicated_shards: list[Shard] = []
        """Shards of the whole tensors, in the order of ``specs``."""
        self._planned: list[tuple[dict[str, Any], list[_Described], Constraint | tuple[Constraint, ...]]] = []
        """Each group with its parameters and sets, as they were when they were planned."""
        self._stepped: list[Shard] = []
        """Shards whose momentum this rank keeps."""
        self._replicated: ReplicatedDistributor | None = None
        self._sharded: list[ShardedDistributor] | None = None
        self._flat: dict[Tensor, Sequence[FlatSegment]] | None = None
        self._by_groups: dict[tuple[int, ...], tuple[Groups, list[ShardedDistributor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Distributors belong to this process's groups of ranks; a copy or pickle plans its own."""
        return {**self.__dict__, "_replicated": None, "_sharded": None, "_by_groups": {}}

    @property
    def is_flat(self) -> bool:
        """Whether a framework keeps the parameters in flat buffers of its own."""
        return self._flat is not None

    @property
    def shards(self) -> list[Shard]:
        """Of all tensors, whichever groups step now."""
        return [*self.replicated_shards, *(shard for one in self._sharded or () for shard in one.shards)]

    def owners(self) -> list[int]:
        """The rank that owns each of ``replicated_shards``."""
        assert self.specs is not None
        return [spec.owner for spec in self.specs]

    def plan(self, groups: Groups, state: State, *, keep_owners: bool = True) -> None:
        """Assign all tensors, and create the state of new ones; collective.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            keep_owners: whether tensors that are assigned already stay with their owners.

        Raises:
            ValueError: a set that is not bound, or one that needs a tensor whole that is divided; ranks that differ.
        """
        pinned = self._pinned(groups) if keep_owners else []
        specs, fingerprint, shards = assign_shards(groups, self.ranks.size, self._split, pinned)
        if shards:  # DTensors alone need no agreement here: pipeline stages have their own optimizers
            verify_agreement(fingerprint, self.ranks, {shard.parameter.device for shard in shards})
        sharded = distributors_of_dtensors(groups)
        # From here on nothing can fail, so that a plan that was refused leaves the last one as it was.
        self.specs, self.replicated_shards, self._replicated, self._sharded = specs, shards, None, sharded
        self._planned = [
            (group, [(p, p.dtype, p.shape, p.device) for p in group["params"]], group["constraint"]) for group in groups
        ]
        owned = [s for s, spec in zip(shards, specs, strict=True) if self.replicate or spec.owner == self.ranks.rank]
        self._stepped = [*owned, *(shard for one in sharded for shard in one.shards)]
        for shard in shards:
            state.setdefault(shard.parameter, {})  # of other owners, too, see complete
        self.complete(state)

    def _pinned(self, groups: Groups) -> list[ShardSpec]:
        """The shards of tensors that were planned before and have kept their size, wherever in the groups they are."""
        whole = [p for group in groups for p in group["params"] if not isinstance(p, DTensor)]
        places = {p: place for place, p in enumerate(whole)}
        kept = [
            replace(spec, tensor=places[shard.parameter])
            for spec, shard in zip(self.specs or (), self.replicated_shards, strict=True)
            if shard.parameter in places and shard.parameter.numel() == shard.global_numel
        ]
        return sorted(kept, key=lambda spec: (spec.tensor, spec.start))

    def changed(self, groups: Groups, *, sets_too: bool = True) -> bool:
        """Whether groups or parameters are others than those that were planned, or parameters of another type.

        Args:
            groups: the optimizer's now.
            sets_too: whether another set counts as a change.
        """
        return not self.is_flat and not (
            len(groups) == len(self._planned)
            and all(
                group is planned
                and (group["constraint"] is sets or not sets_too)
                and len(group["params"]) == len(parameters)
                and all(
                    p is q and p.dtype is dtype and p.shape == shape and p.device == device
                    for p, (q, dtype, shape, device) in zip(group["params"], parameters, strict=True)
                )
                for group, (planned, parameters, sets) in zip(groups, self._planned, strict=True)
            )
        )

    def follow(self, groups: Groups, state: State) -> None:
        """Plan groups that :meth:`changed`; collective, for every rank has changed them alike.

        Tensors that stayed keep their owners and state, new ones are brought into their sets, and the state of those
        that left is dropped.

        Raises:
            ValueError: a parameter or an option that the optimizer does not take; the last plan stays.
        """
        old = [p for _, parameters, _ in self._planned for p, *_ in parameters]
        for group in groups:
            check_group(group)
            make_feasible(group, leave=old)
        self.plan(groups, state)
        present = {p for group in groups for p in group["params"]}
        for parameter in old:
            if parameter not in present:
                state.pop(parameter, None)

    def complete(self, state: State) -> None:
        """Give every shard that this rank steps the state of a tensor that took no step, where it has none.

        State exists from the start, so that a checkpoint before the first step looks like later ones; for the tensors
        of other owners it is empty: torch's distributed checkpoints take an optimizer without any state for one that
        never stepped, and would make this rank step alone.
        """
        for shard in self._stepped:
            own = state.setdefault(shard.parameter, {})
            buffer: Tensor | None = own.get("momentum_buffer")
            if "step" in own and (buffer is None or shard.holds(buffer)):
                continue
            count = torch.zeros(())
            if self._flat is not None:
                count = torch.zeros(len(self._flat[shard.parameter]), device=shard.parameter.device)
            fresh = new_state(shard, count)
            if "step" in own and buffer is not None and buffer.shape in (shard.parameter.shape, (shard.numel,)):
                # The parameter has another type or device than before: momentum goes with it.
                there = buffer.to(shard.parameter.device, shard.dtype).contiguous()
                fresh = {"step": own["step"], "momentum_buffer": there}
            own.update(fresh)

    def distributors(self, groups: Groups) -> list[Distributor]:
        """What steps the tensors of these groups; collective where it is not planned yet."""
        found: list[Distributor] = []
        if self.replicated_shards:
            if self._replicated is None:
                options = {"fused": self._fused, "replicate": self.replicate}
                self._replicated = ReplicatedDistributor(self.replicated_shards, self.owners(), self.ranks, **options)
            found.append(self._replicated)
        return [*found, *self._sharded_of(groups)]

    def _sharded_of(self, groups: Groups) -> list[ShardedDistributor]:
        if self._flat is None:
            if self._sharded is None:
                self._sharded = distributors_of_dtensors(groups)
            return self._sharded
        # A framework may step group by group, and bring other groups after it has loaded them.
        key = tuple(map(id, groups))
        if key not in self._by_groups:
            self._by_groups[key] = groups, distributors_of_flat_buffers(groups, self._flat, self.ranks)
        return self._by_groups[key][1]

    def adopt(
        self, groups: Groups, segments: Mapping[int, Sequence[FlatSegment]], ranks: RankGroup, state: State
    ) -> None:
        """See :meth:`sfw_dist.SFW.adopt`."""
        self.ranks, self.specs, self.replicated_shards, self._replicated = ranks, (), [], None
        self._flat = {groups[number]["params"][0]: tensors for number, tensors in segments.items()}
        self._by_groups = {}
        self._sharded = [one for group in groups for one in self._sharded_of([group])]
        self._stepped = self.shards
        state.clear()
        self.complete(state)


def assign_shards(
    groups: Groups, world_size: int, split: int | None, pinned: Sequence[ShardSpec] = ()
) -> tuple[tuple[ShardSpec, ...], bytes, list[Shard]]:
    """Owners of the groups' tensors, DTensors left out.

    Args:
        groups: an SFW's.
        world_size: ranks.
        split: tensors of more entries may be divided; ``None``: none.
        pinned: shards that stay with their owners.

    Returns:
        Who owns what, a hash of it, and a shard for each entry.

    Raises:
        ValueError: a set that is not bound, or one that needs a tensor whole that ``pinned`` divides.
    """
    tensors = [
        (group, number, j)
        for number, group in enumerate(groups)
        for j, parameter in enumerate(group["params"])
        if not isinstance(parameter, DTensor)
    ]
    specs = [_tensor_spec(*tensor, split) for tensor in tensors]
    for shard in pinned:
        if shard.stop - shard.start < specs[shard.tensor].entries and specs[shard.tensor].unit == 0:
            raise ValueError(
                f"{specs[shard.tensor].name} is divided between ranks, and its new set needs it whole: "
                "build the optimizer with split=None"
            )
    assignment = assign(specs, world_size, pinned)
    shards = []
    for shard in assignment.shards:
        group, _, j = tensors[shard.tensor]
        place = shard.start, shard.stop
        shards.append(Shard.of(specs[shard.tensor].name, group["params"][j], group, constraint_of(group, j), *place))
    return assignment.shards, bytes.fromhex(assignment.fingerprint), shards


def _tensor_spec(group: dict[str, Any], number: int, index: int, split: int | None) -> TensorSpec:
    parameter, constraint = group["params"][index], constraint_of(group, index)
    n = parameter.numel()
    unit = ROW if split is not None and n > split and constraint.divisible else 0
    description = f"{tuple(parameter.shape)} {parameter.dtype} {constraint!r}"
    return TensorSpec(name_of(group, number, index), step_cost(parameter.shape, constraint), n, description, unit)
