"""Where ZeRO keeps the entries of a model's tensors, and how to gather whole tensors and load them.

ZeRO, stages 1 and 2, lays the tensors of a param group into one flat buffer, pads it, and cuts it into one partition a
rank; the optimizer gets the float32 copy of this rank's. The model's parameters are views of the buffer: from them
alone follows where each tensor lies, in whatever order and with whatever padding. (The maps that DeepSpeed itself
attaches to parameters, and its ``safe_get_*`` that read them, are wrong with ``round_robin_gradients``.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.constraints import Constraint, Unconstrained
from sfw_dist.optim.param_groups import names_by_number
from sfw_dist.optim.sharding.dtensors import FlatSegment

# The same things by the names that DeepSpeed's two ZeRO optimizers give them.
_FIELDS = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
}
_LAST_READ = "0.19.8"


@dataclass(frozen=True)
class Group:
    """One param group: what this rank steps, and where the model's parameters lie in it."""

    master: Tensor
    """float32, this rank's partition."""
    parameters: list[Tensor]
    """The model's, in the order of their places."""
    segments: list[FlatSegment]
    """This rank's part of each of them."""

    def entries(self, segment: FlatSegment, flat: Tensor) -> Tensor:
        """A segment's place in this partition, or in another tensor laid out as it."""
        return flat.detach()[segment.offset : segment.offset + segment.numel]


def groups_of(engine: Any) -> list[Group]:
    """Where this rank's part of every tensor lies; from the views alone, whatever order and padding ZeRO chose."""
    zero = engine.optimizer
    kind = next((name for name in _FIELDS if name in [cls.__name__ for cls in type(zero).__mro__]), None)
    if kind is None:
        raise _unlike(f"has its ZeRO in a {type(zero).__name__}")
    everyone, flats, masters = (private(zero, field) for field in _FIELDS[kind])
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    rank = dist.get_rank(private(zero, "dp_process_group"))
    groups = []
    for options, parameters, flat, master in zip(
        engine.basic_optimizer.param_groups, everyone, flats, masters, strict=True
    ):
        begin = {p: p.storage_offset() - flat.storage_offset() for p in parameters}
        ordered = sorted(parameters, key=begin.__getitem__)
        size = flat.numel() // dist.get_world_size(private(zero, "dp_process_group"))
        sets = _sets(options, parameters, names)
        segments = []
        for p in ordered:
            start = min(max(begin[p], rank * size), begin[p] + p.numel())
            stop = max(start, min(begin[p] + p.numel(), (rank + 1) * size))
            offset = min(max(start - rank * size, 0), size)
            segments.append(FlatSegment(names[p], p.shape, sets[p], start - begin[p], stop - start, offset))
        _check_view(flat, master, ordered, size)
        groups.append(Group(master, ordered, segments))
    return groups


def _check_view(flat: Tensor, master: Tensor, parameters: Sequence[Tensor], size: int) -> None:
    """Raises ``RuntimeError`` if the parameters are not views of ``flat``, or its parts not of the master's size."""
    storage = flat.untyped_storage().data_ptr()
    views = all(p.untyped_storage().data_ptr() == storage and p.is_contiguous() for p in parameters)
    apart = all(p.storage_offset() + p.numel() <= q.storage_offset() for p, q in itertools.pairwise(parameters))
    if not (views and apart) or master.numel() != size or master.dtype != torch.float32:
        raise _unlike(f"does not lay a group's parameters into one buffer with float32 partitions of {size} entries")


def _sets(
    options: Mapping[str, Any], parameters: Sequence[Tensor], names: Mapping[Tensor, str]
) -> dict[Tensor, Constraint]:
    """Each parameter's set. A group names frozen parameters too, which ZeRO has left out."""
    sets, known = options.get("constraint", Unconstrained()), options.get("param_names", [])
    if isinstance(sets, Constraint):
        return dict.fromkeys(parameters, sets)
    places = [known.index(names[p]) if names[p] in known else None for p in parameters]
    if None in places:
        if len(sets) != len(parameters):
            raise ValueError("a group with frozen parameters has no names to tell them by: make groups with constrain")
        places = list(range(len(parameters)))
    return {p: sets[place] for p, place in zip(parameters, places, strict=True) if place is not None}


def verify(groups: Sequence[Group], process_group: dist.ProcessGroup) -> None:
    """Raise ``RuntimeError``, on every rank, where the partitions do not hold what the segments say; collective."""
    counts, wrong = [], []
    for group in groups:
        for parameter, segment in zip(group.parameters, group.segments, strict=True):
            mine = parameter.detach().view(-1)[segment.global_offset : segment.global_offset + segment.numel]
            counts.append(segment.numel)
            wrong.append(not torch.equal(group.entries(segment, group.master).to(mine), mine))
    device = groups[0].master.device
    sums = torch.tensor([counts, wrong], dtype=torch.int64, device=device)
    dist.all_reduce(sums, group=process_group)
    expected = [segment.shape.numel() for group in groups for segment in group.segments]
    names = [segment.name for group in groups for segment in group.segments]
    for name, n, count, differs in zip(names, expected, *sums.tolist(), strict=True):
        if differs or count != n:
            found = "has other values" if differs else f"has {count} of {n} entries"
            raise _unlike(f"{found} of {name} in its partitions")


def whole(segment: FlatSegment, entries: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """A tensor from all ranks' entries; collective. As integers, whose sums keep every bit, the sign of 0 too."""
    bits = torch.zeros(segment.shape.numel(), dtype=torch.int32, device=entries.device)
    bits[segment.global_offset : segment.global_offset + segment.numel] = entries.view(torch.int32)
    dist.all_reduce(bits, group=process_group)
    return bits.view(torch.float32).view(segment.shape)


@torch.no_grad()
def gather_tensors(engine: Any) -> dict[str, Tensor]:
    """Everything that training resumes from, whole and on the CPU, the same on every rank; collective.

    ``model.NAME`` as :func:`gather_model` has them, ``optimizer.momentum_buffer.NAME`` and ``optimizer.step.NAME``.
    """
    optimizer = engine.basic_optimizer
    tensors = {f"model.{name}": tensor for name, tensor in gather_model(engine).items()}
    if engine.optimizer is optimizer:
        state = optimizer.state_dict()
        names = names_by_number(state["param_groups"])
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):  # SGD's momentum is None before the first step
                    tensors[f"optimizer.{key}.{names[index]}"] = _apart(value)
        return tensors
    process_group = private(engine.optimizer, "dp_process_group")
    for group in groups_of(engine):
        state = optimizer.state[group.master]
        for i, segment in enumerate(group.segments):
            if "step" in state:  # SGD counts none
                tensors[f"optimizer.step.{segment.name}"] = _apart(state["step"][i])
            if state.get("momentum_buffer") is not None:
                momentum = whole(segment, group.entries(segment, state["momentum_buffer"]), process_group)
                tensors[f"optimizer.momentum_buffer.{segment.name}"] = momentum.cpu()
    return tensors


@torch.no_grad()
def gather_model(engine: Any) -> dict[str, Tensor]:
    """The whole network on the CPU: float32 weights, frozen parameters and buffers as they are; collective."""
    weights: dict[Tensor, Tensor] = {}
    if engine.optimizer is not engine.basic_optimizer:
        process_group = private(engine.optimizer, "dp_process_group")
        for group in groups_of(engine):
            for parameter, segment in zip(group.parameters, group.segments, strict=True):
                weights[parameter] = whole(segment, group.entries(segment, group.master), process_group).cpu()
    own = engine.module.state_dict(keep_vars=True).items()
    return {name: weights[tensor] if tensor in weights else _apart(tensor) for name, tensor in own}


def _apart(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which training does not change."""
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def load_tensors(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take what :func:`gather_tensors`, or another engine, gave, at any number of ranks and any stage; collective.

    Raises:
        ValueError: the tensors are another model's; nothing has changed then.
    """
    optimizer = engine.basic_optimizer
    own = engine.module.state_dict(keep_vars=True)
    for name, tensor in own.items():
        found = tuple(tensors[f"model.{name}"].shape) if f"model.{name}" in tensors else "absent"
        if found != tuple(tensor.shape):
            raise ValueError(f"{name} is {found} among the tensors, {tuple(tensor.shape)} here: load the same model's")
    # In bf16 these are rounded; the trained weights are restored from the float32 copies below.
    for name, tensor in own.items():
        tensor.copy_(tensors[f"model.{name}"])
    if engine.optimizer is optimizer:
        state = optimizer.state_dict()
        names = names_by_number(state["param_groups"])
        state["state"] = {index: _state_of(name, tensors) for index, name in names.items()}
        optimizer.load_state_dict(state)
        return
    for group in groups_of(engine):
        state = optimizer.state[group.master]
        named = {parameter: name for name, parameter in own.items()}
        for i, (parameter, segment) in enumerate(zip(group.parameters, group.segments, strict=True)):
            stop = segment.global_offset + segment.numel
            values = tensors[f"model.{named[parameter]}"].reshape(-1)[segment.global_offset : stop]
            group.entries(segment, group.master).copy_(values)
            saved = _state_of(segment.name, tensors)
            momentum = saved.get("momentum_buffer")
            if "step" in state:  # saved without momentum, it starts with the next gradient
                state["step"][i] = 0.0 if momentum is None and "momentum_buffer" in state else saved.get("step", 0.0)
            elif momentum is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(group.master)  # SGD makes it in the first step
            if momentum is not None and state.get("momentum_buffer") is not None:
                entries = momentum.reshape(-1)[segment.global_offset : stop]
                group.entries(segment, state["momentum_buffer"]).copy_(entries)
    engine.optimizer.update_lp_params()


def _state_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = ("step", "momentum_buffer")
    return {key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors}


def private(owner: Any, field: str) -> Any:
    """A field that DeepSpeed does not document, or an error that tells which version lacks it."""
    try:
        return getattr(owner, field)
    except AttributeError:
        raise _unlike(f"has no {type(owner).__name__}.{field}") from None


def _unlike(what: str) -> RuntimeError:
    return RuntimeError(f"DeepSpeed {version('deepspeed')} {what}: install deepspeed=={_LAST_READ}")
