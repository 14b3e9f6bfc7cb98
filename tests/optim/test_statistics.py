"""What is kept of the last step, when tensors step in changing company."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfw_dist.constraints import KSparsePolytope
from sfw_dist.optim.shard import Slot
from sfw_dist.optim.statistics import Headers


def slot(name: str) -> Slot:
    return Slot.of(name, nn.Parameter(torch.ones(3)), {}, KSparsePolytope(k=1, radius=1.0), 0, 3)


def table(*gammas: float) -> Tensor:
    return torch.tensor([[gamma, 0.0, 0.0] for gamma in gammas], dtype=torch.float64)


def test_a_tensor_has_the_headers_of_its_last_step_alone() -> None:
    """Fails when a step that was not finite is told again after DDP has laid its buckets out anew."""
    a, b, headers = slot("a"), slot("b"), Headers()
    headers.keep([a, b], table(0.1, torch.nan))
    assert headers.not_finite(wait=False) == {"b"}
    headers.keep([b], table(0.2))
    headers.keep([a], table(0.3))
    assert headers.not_finite(wait=True) == set()
    headers.keep([a, b], table(0.4, 0.5))
    assert [found.gamma for found in headers.statistics([a, b]).values()] == [0.4, 0.5]
