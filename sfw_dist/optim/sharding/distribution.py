"""How an optimizer's tensors are distributed: who owns what, and which distributors step them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.rank_group import RankGroup, verify_agreement
from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import ROW
from sfw_dist.optim.param_groups import (
    Entry,
    bring_in_loaded,
    check_group,
    entries,
    make_feasible,
    refuse_flattened,
    take_first_ranks_radii,
)
from sfw_dist.optim.shard import Shard, State, adjust_state, new_state, step_cost, zero_steps
from sfw_dist.optim.sharding.assignment import ShardSpec, TensorSpec, assign
from sfw_dist.optim.sharding.dtensors import FlatSegment, distributors_of_dtensors, distributors_of_flat_buffers
from sfw_dist.optim.sharding.gradients import verify_first_step
from sfw_dist.optim.sharding.interface import Distributor
from sfw_dist.optim.sharding.replicated import ReplicatedDistributor
from sfw_dist.optim.sharding.sharded import ShardedDistributor
from sfw_dist.optim.update import learning_rate

Groups = Sequence[dict[str, Any]]


_Described = tuple[Tensor, torch.dtype, torch.Size, torch.device, bool]
"""A parameter, and what the plan of its step depends on; last, whether it is a member."""


class Distribution:
    """The distributors of an optimizer's tensors, planned again when its groups or sets change.

    Tensors that every rank has whole are assigned to owners and stepped by one :class:`ReplicatedDistributor`; DTensors
    by a :class:`ShardedDistributor` for each mesh. Flat buffers take the place of both after :meth:`adopt`.

    Members are the tensors that were trainable when they were planned, and those with a state that was loaded. Frozen
    ones are no members: they have no shard and no state, and become members once they are trainable. A member that is
    frozen stays one, with its state, so that nothing moves when it is trained again.

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
        self._members: set[Tensor] = set()
        self._arrived: set[Tensor] = set()
        """Members that have taken no step since they were planned or loaded."""
        self._verified = False
        """Whether the ranks have compared their tensors since the last plan with new ones, or the last load."""
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

    def needed_by(self) -> dict[Tensor, set[int]]:
        """The ranks that need the gradient of each whole tensor: its owners, or all."""
        needed: dict[Tensor, set[int]] = {}
        for shard, owner in zip(self.replicated_shards, self.owners(), strict=True):
            needed.setdefault(shard.parameter, set()).update(range(self.ranks.size) if self.replicate else {owner})
        return needed

    def plan(self, groups: Groups, state: State, *, keep_owners: bool = True) -> None:
        """Assign all tensors, and create the state of new ones; collective.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            keep_owners: whether tensors that are assigned already stay with their owners.

        Raises:
            ValueError: a set that is not bound, or one that needs a tensor whole that is divided; ranks that differ.
        """
        self._agree_on_radii(groups)
        members = [entry for entry in entries(groups) if self._joins(entry.parameter)]
        whole = [entry for entry in members if not isinstance(entry.parameter, DTensor)]
        pinned = self._pinned(whole) if keep_owners else []
        specs, described, shards = assign_shards(whole, self.ranks.size, self._split, pinned)
        if shards:  # DTensors alone need no agreement here: pipeline stages have their own optimizers
            verify_agreement(described, self.ranks, {shard.parameter.device for shard in shards})
        sharded = distributors_of_dtensors(members)
        # From here on nothing can fail, so that a plan that was refused leaves the last one as it was.
        self.specs, self.replicated_shards, self._replicated, self._sharded = specs, shards, None, sharded
        present = {entry.parameter for entry in members}
        self._verified = self._verified and present <= self._members
        self._arrived = (self._arrived | (present - self._members)) & present
        self._members = present
        self._planned = [
            (group, [(p, p.dtype, p.shape, p.device, p in present) for p in group["params"]], group["constraint"])
            for group in groups
        ]
        owned = [s for s, spec in zip(shards, specs, strict=True) if self.replicate or spec.owner == self.ranks.rank]
        self._stepped = [*owned, *(shard for one in sharded for shard in one.shards)]
        for shard in shards:
            state.setdefault(shard.parameter, {})  # of other owners, too, see complete
        self.complete(state)

    def _agree_on_radii(self, groups: Groups) -> None:
        """Of tensors that join, while each rank may have weights of its own; collective."""
        joining = [
            entry
            for entry in entries(groups)
            if entry.parameter.requires_grad
            and entry.parameter not in self._members
            and not isinstance(entry.parameter, DTensor)
        ]
        take_first_ranks_radii(joining, self.ranks)

    def _joins(self, parameter: Tensor) -> bool:
        return parameter.requires_grad or parameter in self._members

    def is_member(self, parameter: Tensor) -> bool:
        """Whether the parameter takes steps, or has taken some before it was frozen."""
        return parameter in self._members

    def admit(self, parameters: Iterable[Tensor]) -> None:
        """Let frozen parameters whose state is loaded be members from the next plan on."""
        self._members.update(parameters)

    def loaded(self, stepped: Iterable[Tensor]) -> None:
        """Note that a state was loaded; these parameters have taken steps before it was saved."""
        self._verified = False
        self._arrived -= set(stepped)

    def begin(self, groups: Groups, *, gradients_are_reduced: bool) -> bool:
        """At the first step after tensors joined or were loaded: compare replicas, bring in what lies outside its set.

        Not before, because DistributedDataParallel sends rank 0's weights, and scripts load weights, after the
        optimizer was built. A step of rate 0, as frameworks take to create state, is no first step. Collective.

        Args:
            groups: the optimizer's.
            gradients_are_reduced: whether all ranks should have the same gradients.

        Returns:
            Whether it was done now.

        Raises:
            UserError: parameters differ between ranks.
        """
        if self._verified or self.is_flat or all(learning_rate(group) == 0 for group in groups):
            return False
        if self.replicated_shards:
            tensors = {shard.name: shard.parameter for shard in self.replicated_shards}
            verify_first_step(tensors, self.ranks, gradients_are_reduced=gradients_are_reduced)
        bring_in_loaded(groups, self._arrived)
        self._arrived, self._verified = set(), True
        return True

    def ranks_that_joined(self) -> RankGroup | None:
        """The ranks that are there now, if this process was alone when its tensors were planned; else ``None``.

        Raises:
            UserError: the ranks of the plan are no longer there.
        """
        now = RankGroup.of(self.ranks.group)
        if (now.rank, now.size) == (self.ranks.rank, self.ranks.size):
            return None
        if self.ranks.size == 1:
            return now
        raise UserError(
            f"the optimizer was built as rank {self.ranks.rank} of {self.ranks.size} and is now rank {now.rank} of "
            f"{now.size}: use it before destroy_process_group(), or load its state_dict into a new one"
        )

    def _pinned(self, whole: Sequence[Entry]) -> list[ShardSpec]:
        """The shards of tensors that were planned before and have kept their size, wherever in the groups they are."""
        places = {entry.parameter: place for place, entry in enumerate(whole)}
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
                    p is q
                    and p.dtype is dtype
                    and p.shape == shape
                    and p.device == device
                    and (member or not p.requires_grad)
                    for p, (q, dtype, shape, device, member) in zip(group["params"], parameters, strict=True)
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
        old = {p for _, parameters, _ in self._planned for p, *_ in parameters}
        present = {p for group in groups for p in group["params"]}
        shapes = {id(group): {p: shape for p, _, shape, *_ in parameters} for group, parameters, _ in self._planned}
        for group in groups:
            check_group(group)
            refuse_flattened(group, shapes.get(id(group), {}))
        new = present - self._members
        for group in groups:
            make_feasible(group, only=new, rounded=True)  # groups that were added have been brought in
        self.plan(groups, state)
        for parameter in old - present:
            state.pop(parameter, None)

    def complete(self, state: State) -> None:
        """Give every shard that this rank steps the state of a tensor that took no step, where it has none.

        State exists from the start, so that a checkpoint before the first step looks like later ones; for the tensors
        of other owners it is empty: torch's distributed checkpoints take an optimizer without any state for one that
        never stepped, and would make this rank step alone.
        """
        for shard in self._stepped:
            own = state.setdefault(shard.parameter, {})
            rows = None if self._flat is None else len(self._flat[shard.parameter])
            if "step" in own:
                adjust_state(shard, own, rows)
            else:
                own.update(new_state(shard, zero_steps(shard, rows)))

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
                self._sharded = distributors_of_dtensors(e for e in entries(groups) if e.parameter in self._members)
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
        self._members, self._arrived = set(), set()
        self._flat = {groups[number]["params"][0]: tensors for number, tensors in segments.items()}
        self._by_groups = {}
        self._sharded = [one for group in groups for one in self._sharded_of([group])]
        self._stepped = self.shards
        state.clear()
        self.complete(state)


def assign_shards(
    whole: Sequence[Entry], world_size: int, split: int | None, pinned: Sequence[ShardSpec] = ()
) -> tuple[tuple[ShardSpec, ...], list[str], list[Shard]]:
    """Owners of tensors that every rank has whole.

    Args:
        whole: the tensors.
        world_size: ranks.
        split: tensors of more entries may be divided; ``None``: none.
        pinned: shards that stay with their owners.

    Returns:
        Who owns what, a description of all that ranks must agree on, and a shard for each owner's part.

    Raises:
        ValueError: a set that is not bound, or one that needs a tensor whole that ``pinned`` divides.
    """
    specs = [_tensor_spec(entry, split) for entry in whole]
    for shard in pinned:
        if shard.stop - shard.start < specs[shard.tensor].entries and specs[shard.tensor].unit == 0:
            raise ValueError(
                f"{specs[shard.tensor].name} is divided between ranks, and its new set needs it whole: "
                "build the optimizer with split=None"
            )
    assignment = assign(specs, world_size, pinned)
    shards = []
    for shard in assignment.shards:
        entry = whole[shard.tensor]
        shards.append(
            Shard.of(entry.name, entry.parameter, entry.group, entry.constraint, start=shard.start, stop=shard.stop)
        )
    described = [f"{spec.name} {spec.description}" for spec in specs]
    return assignment.shards, [*described, f"assignment {assignment.fingerprint}"], shards


def _tensor_spec(entry: Entry, split: int | None) -> TensorSpec:
    parameter, constraint = entry.parameter, entry.constraint
    n = parameter.numel()
    unit = ROW if split is not None and n > split and constraint.divisible else 0
    description = f"{tuple(parameter.shape)} {parameter.dtype} {constraint!r}"
    return TensorSpec(entry.name, step_cost(parameter.shape, constraint), n, description, unit)
