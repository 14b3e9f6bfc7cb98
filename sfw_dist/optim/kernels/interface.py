"""What the kernels of the CPU and of a GPU are given, what both of them do, and the codes that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sfw_dist.optim.update import RULES
from sfw_dist.optim.vertex_codec import VertexCodec

# What the compiled code calls types, rescale rules and layouts of a vertex; cpu_step.cpp repeats these numbers.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
RESCALE_CODES = {rescale: code for code, rescale in enumerate(RULES)}
LAYOUT_CODES = {"mask": 0, "indices": 1, "all": 2}


@dataclass(frozen=True)
class KernelShard:
    """What stays fixed of a shard from step to step."""

    parameter: Tensor
    """The whole tensor, of any shape and memory format, float32, bfloat16 or float16."""
    start: int
    """First of the shard's entries, row-major; there are ``codec.n``."""
    codec: VertexCodec
    """Of the vertex: a K-sparse polytope's ("mask", "indices"), or an unconstrained tensor's momentum ("all")."""
    diameter: float
    """L2 diameter of the set."""
    written: Tensor | None
    """uint8 ``(codec.nbytes,)``, where the vertex is written; ``None`` if another rank or other code computes it."""
    read: Tensor
    """uint8 ``(codec.nbytes,)``, where the vertex is read; on one rank the same memory as ``written``."""


class Kernel(Protocol):
    """The step of a fixed list of shards."""

    @staticmethod
    def takes(gradient: Tensor, parameter: Tensor) -> bool:
        """Whether the gradient's type is one that the kernel reads for this parameter; it is not rounded."""

    def compute_vertices(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        options: Sequence[dict[str, Any]],
    ) -> None:
        """Momentum, vertex and statistics of the shards with ``written``, in their order.

        Args:
            gradients: shaped as the parameter, of a type that the kernel takes; ``None``: the shard stays as it is.
            momenta: float32, contiguous, of the shards' own entries; updated. Needed where there is a gradient.
            options: ``lr``, ``momentum``, ``weight_decay``, ``rescale``, ``first`` (whether m becomes g).
        """

    def apply_update(self) -> None:
        """Update every shard's parameter from the vertices in ``read``."""
