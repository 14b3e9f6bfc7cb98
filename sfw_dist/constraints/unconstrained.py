"""No constraint: momentum SGD."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfw_dist.constraints.base import Constraint, Vertex


class Unconstrained(Constraint):
    """The whole space, over which the optimizer takes momentum-SGD steps instead; it has no LMO.

    Example:
        >>> from sfw_dist import SFW
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SFW([{"params": [p], "constraint": Unconstrained(), "lr": 0.1}])
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p.tolist()
        [0.8999999761581421, 1.899999976158142]
    """

    kind = "unconstrained"
    is_unconstrained: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        raise ValueError("Unconstrained has no LMO: a linear function has no minimum over the whole space")

    def gauge(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=x.device)

    def project(self, x: Tensor) -> Tensor:
        return x.clone()

    def radius(self, n: int) -> float:
        return math.inf

    def diameter(self, n: int) -> float:
        return math.inf

    def bind(self, n: int, initial_norm: float) -> Constraint:
        return self

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}
