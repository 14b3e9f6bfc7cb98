"""A shard: the entries of one tensor that this rank holds, and all that its step depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.dtensor import to_local
from sfw_dist.errors import UserError
from sfw_dist.optim.vertex_codec import VertexCodec

State = dict[Tensor, dict[str, Any]]
"""An optimizer's state: by parameter, ``step`` and ``momentum_buffer``."""


@dataclass
class Shard:
    """Some entries of one tensor, or all of them.

    ``parameter`` is where they lie in memory: the whole tensor, a DTensor, or a flat buffer in which a framework keeps
    several tensors. There they are entries ``start`` to ``stop`` (of what this rank has of it, row-major); in the whole
    tensor they begin at ``global_offset``::

        whole tensor      |---------------|######################|--------|   global_numel
                          0               global_offset
        parameter         |----|######################|----|
                          0    start                  stop
    """

    name: str
    parameter: Tensor
    group: dict[str, Any]
    """The param group, which holds the options."""
    constraint: Constraint
    """Of the whole tensor, bound."""
    dtype: torch.dtype
    """Type in which momentum is kept and the step computed: float32, or float64 for float64 parameters."""
    global_numel: int
    global_offset: int
    start: int
    stop: int
    codec: VertexCodec
    """How the vertex of these entries is written."""
    global_indices: Callable[[], Tensor] | None = None
    """Where the entries lie in the whole tensor, int64 ``(numel,)``, if they are not consecutive there."""
    state_row: int | None = None
    """Which entry of the state's ``step`` counts this tensor's steps, where one parameter holds several tensors."""

    @classmethod
    def of(
        cls,
        name: str,
        parameter: Tensor,
        group: dict[str, Any],
        constraint: Constraint,
        start: int = 0,
        stop: int | None = None,
    ) -> Shard:
        """Entries ``start`` to ``stop`` of a tensor that this rank has whole; by default all.

        Raises:
            ValueError: the set is not bound.
        """
        n = parameter.numel()
        stop = n if stop is None else stop
        dtype = step_dtype(parameter)
        radius = constraint.radius(n) if constraint.signs_only else None
        support = min(constraint.nonzeros(parameter.shape), stop - start)
        codec = VertexCodec(stop - start, support, dtype, radius)
        return cls(name, parameter, group, constraint, dtype, n, start, start, stop, codec)

    @property
    def numel(self) -> int:
        """Entries of the shard."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether these are all entries of the tensor."""
        return self.numel == self.global_numel

    def entries(self, x: Tensor) -> Tensor:
        """The shard's entries of a tensor laid out as the parameter, ``(numel,)``; a view where its memory allows."""
        return to_local(x).reshape(-1)[self.start : self.stop]

    def theta(self) -> Tensor:
        """The parameter's entries in the step's type, ``(numel,)``: a view of them, or a copy."""
        return self.entries(self.parameter.detach()).to(self.dtype)

    def momentum_entries(self, buffer: Tensor) -> Tensor:
        """The shard's entries of its momentum buffer, ``(numel,)``, a view; the buffer has these alone, or is laid out
        as the parameter.
        """
        local = to_local(buffer).view(-1)
        return local if local.numel() == self.numel else local[self.start : self.stop]

    def holds(self, buffer: Tensor) -> bool:
        """Whether a momentum buffer has the shape, type and device that the step expects, and lies row by row."""
        fits = buffer.shape == self.parameter.shape or buffer.shape == (self.numel,)
        return (
            fits
            and buffer.dtype == self.dtype
            and buffer.device == self.parameter.device
            and (buffer.is_contiguous() or isinstance(buffer, DTensor))
        )

    def steps_taken(self, state: State) -> Tensor:
        """How many steps this tensor has taken, a scalar; a view of the state."""
        step: Tensor = state[self.parameter]["step"]
        return step if self.state_row is None else step[self.state_row]


def step_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which a parameter's step is computed."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def step_cost(shape: torch.Size, constraint: Constraint) -> float:
    """The owner's work on a tensor of this shape, in memory passes times entries.

    3 passes for the momentum (m in and out, g); for a constrained tensor 2 more for the step size (m, θ), and the LMO.
    """
    if constraint.is_unconstrained:
        return 3.0 * shape.numel()
    return 5.0 * shape.numel() + constraint.work(shape)


def new_momentum(shard: Shard) -> Tensor:
    """Zeros in the step's type: laid out as a DTensor or flat buffer is, else row-major for the shard's entries."""
    parameter = shard.parameter
    if isinstance(parameter, DTensor) or shard.state_row is not None:
        return torch.zeros_like(parameter, dtype=shard.dtype)
    shape = parameter.shape if shard.is_whole else (shard.numel,)
    return torch.zeros(shape, dtype=shard.dtype, device=parameter.device)


def new_state(shard: Shard, step: Tensor) -> dict[str, Tensor]:
    """The state of a tensor that has taken no step; ``step`` is its counter."""
    momentum = {"momentum_buffer": new_momentum(shard)} if shard.group["momentum"] > 0 else {}
    return {"step": step.zero_(), **momentum}


def zero_steps(shard: Shard, rows: int | None) -> Tensor:
    """A count of steps, 0: a scalar, or ``(rows,)`` for the tensors of a flat buffer."""
    return torch.zeros(()) if rows is None else torch.zeros(rows, device=shard.parameter.device)


def adjust_state(shard: Shard, own: dict[str, Any], rows: int | None) -> None:
    """Let the state be one that the step can use, whatever a script or a framework has put there.

    A momentum of another type or on another device goes with its parameter; one that does not fit starts afresh, and so
    does one that is ``None``, as in torch.

    Args:
        shard: a shard.
        own: its ``step`` and ``momentum_buffer``; changed.
        rows: see :func:`zero_steps`.

    Raises:
        UserError: a momentum that is no tensor.
    """
    if own.get("momentum_buffer", own) is None:
        del own["momentum_buffer"]
    step, buffer = own["step"], own.get("momentum_buffer")
    shape = () if rows is None else (rows,)
    if not (
        isinstance(step, Tensor) and step.shape == shape and step.dtype == torch.float32 and not step.requires_grad
    ):
        start = zero_steps(shard, rows)
        taken = torch.as_tensor(0.0 if step is None else step, dtype=torch.float32, device=start.device)
        own["step"] = start + taken.detach().reshape(shape)
    if buffer is None or (isinstance(buffer, Tensor) and shard.holds(buffer)):
        return
    if not isinstance(buffer, Tensor):
        raise UserError(f"the momentum_buffer of {shard.name} is a {type(buffer).__name__}: give a tensor, or none")
    if buffer.shape in (shard.parameter.shape, (shard.numel,)):
        own["momentum_buffer"] = buffer.to(shard.parameter.device, shard.dtype).contiguous()
    else:
        own.update(new_state(shard, zero_steps(shard, rows)))
