"""A rank's part of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfw_dist.constraints import Constraint, Unconstrained
from sfw_dist.distributed.dtensor import local
from sfw_dist.optim.vertex_codec import VertexFormat


@dataclass
class Slot:
    """A tensor or, where several ranks share one, the entries ``[start, stop)`` of it, row-major.

    Where an engine keeps only a part of a parameter here (a DTensor), or several in one, they count in what is here.
    """

    name: str
    parameter: Tensor
    group: dict[str, Any]
    dtype: torch.dtype
    """In which momentum is kept and the step computed: float32, or float64 for float64 parameters."""
    constraint: Constraint
    """Of the whole tensor."""
    start: int
    stop: int
    n: int
    """Entries of the whole tensor, of which an engine may have put others elsewhere."""
    format: VertexFormat
    """Of these entries."""

    @classmethod
    def of(
        cls, name: str, parameter: Tensor, group: dict[str, Any], constraint: Constraint, start: int, stop: int
    ) -> Slot:
        """Raises ``ValueError`` if the set is not bound."""
        n = parameter.numel()
        dtype = step_dtype(parameter)
        radius = constraint.radius(n) if constraint.signs_only else None
        support = min(constraint.nonzeros(parameter.shape), stop - start)
        return cls(
            name,
            parameter,
            group,
            dtype,
            constraint,
            start,
            stop,
            n,
            VertexFormat(stop - start, support, dtype, radius),
        )

    @property
    def whole(self) -> bool:
        """Whether these are all entries of the tensor."""
        return self.stop - self.start == self.n

    def entries(self, x: Tensor) -> Tensor:
        """These entries of a tensor shaped as the parameter, ``(stop − start,)``; a view where its memory allows."""
        return local(x).reshape(-1)[self.start : self.stop]

    def theta(self) -> Tensor:
        """The parameter's entries in the step's type: a view of them, or a copy."""
        return self.entries(self.parameter.detach()).to(self.dtype)


def step_dtype(parameter: Tensor) -> torch.dtype:
    """In which a parameter's step is computed."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def cost(shape: torch.Size, constraint: Constraint) -> float:
    """Of the owner's work on a tensor of this shape, in memory passes times entries.

    3 passes for the momentum (m in and out, g); for a constrained tensor 2 more for the step size (m, θ), and the LMO.
    """
    if isinstance(constraint, Unconstrained):
        return 3.0 * shape.numel()
    return 5.0 * shape.numel() + constraint.work(shape)


def momentum_buffer(slot: Slot) -> Tensor:
    """Zeros of the parameter's shape or, of a part of one, ``(stop − start,)``; row-major."""
    shape = slot.parameter.shape if slot.whole else (slot.stop - slot.start,)
    return torch.zeros(shape, dtype=slot.dtype, device=slot.parameter.device)
