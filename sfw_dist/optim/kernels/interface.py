"""What the kernels of the CPU and of a GPU are given, and what both of them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sfw_dist.optim.vertex_codec import VertexFormat


@dataclass(frozen=True)
class Piece:
    """What is fixed of a tensor, or of the part of one, from step to step."""

    parameter: Tensor
    """The whole tensor, of any shape and memory format, float32, bfloat16 or float16."""
    start: int
    """First of the piece's entries, row-major; there are ``format.n``."""
    format: VertexFormat
    """Of the vertex: of a K-sparse polytope's ("mask", "indices"), or an unconstrained tensor's momentum ("all")."""
    diameter: float
    """L2 diameter of the set."""
    written: Tensor | None
    """uint8 ``(format.nbytes,)``, where the answer goes; ``None`` if another rank gives it, or other code."""
    read: Tensor
    """uint8 ``(format.nbytes,)``, where the answer is found; for one rank the same memory as ``written``."""


class Kernel(Protocol):
    """The step of a fixed list of pieces."""

    def answer(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        options: Sequence[dict[str, Any]],
    ) -> None:
        """Momentum, vertex and header of the pieces with ``written``, in their order.

        Args:
            gradients: shaped as the parameter; ``None``: the piece stays as it is.
            momenta: float32, contiguous, of the pieces' own entries; moved on. Where there is a gradient.
            options: ``lr``, ``momentum``, ``weight_decay``, ``rescale``, ``first`` (of which m is g).
        """

    def move(self) -> None:
        """Every piece's parameter after the step, from the answers that are there to read."""
