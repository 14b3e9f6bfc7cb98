"""The ways to train that benchmarks between hosts compare, and a loss whose backward pass computes next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.models import build_model
from sfw_dist.optim.comm_hooks import reduce_to_owner, reduce_to_owner_bf16

K_FRAC, K_MIN, TAU = 0.05, 10, 15.0
BASELINE = "sgd"


@dataclass(frozen=True)
class Contender:
    """One way to train, and what we want of it in comparison with DDP + SGD."""

    title: str
    hook: Callable[..., Any] | None = None
    """How gradients travel, if not by DDP's all-reduce."""
    wanted: dict[str, float] = field(default_factory=dict)
    """Greatest ratio by quantity."""


_OWNER = {"sent": 0.56, "communication": 0.85, "state": 1.15}
CONTENDERS = {
    "sgd": Contender("DDP + SGD"),
    "sfw": Contender("DDP + SFW, all_reduce", wanted={"sent": 1.08, "state": 1.15}),
    "reduce_to_owner": Contender("DDP + SFW, reduce_to_owner", reduce_to_owner, _OWNER),
    "reduce_to_owner_bf16": Contender("DDP + SFW, reduce_to_owner_bf16", reduce_to_owner_bf16, _OWNER),
}


class GivenGradients(nn.Module):
    """A loss Σ⟨θ, g⟩ over the parameters of ``model``, whose gradients are the given g."""

    def __init__(self, model: nn.Module, gradients: Sequence[Tensor]) -> None:
        super().__init__()
        # Without BatchNorm's buffers, which DDP would send in the forward pass, which is not measured.
        self._parameters_of_model = nn.ParameterList(model.parameters())
        self._gradients = gradients

    def forward(self) -> Tensor:
        pairs = zip(self._parameters_of_model, self._gradients, strict=True)
        return torch.stack([torch.dot(p.flatten(), g.flatten()) for p, g in pairs]).sum()


def build(
    contender: Contender, model_name: str, bucket_mb: float | None = None
) -> tuple[DistributedDataParallel, Optimizer]:
    """The contender's replica and optimizer on this rank, the same on every rank but for the gradients."""
    model = build_model(model_name, num_classes=10)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    gradients = [1e-3 * torch.randn(p.shape, generator=generator) for p in model.parameters()]
    optimizer: Optimizer
    if contender is CONTENDERS[BASELINE]:
        optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = SFW(constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU)), lr=1e-3, momentum=0.9)
    replica = DistributedDataParallel(GivenGradients(model, gradients), bucket_cap_mb=bucket_mb)
    if contender.hook:
        replica.register_comm_hook(optimizer, contender.hook)
    return replica, optimizer
