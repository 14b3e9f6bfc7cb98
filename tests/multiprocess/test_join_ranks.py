"""Ranks with unequally many batches: torch's Join, as for DistributedDataParallel and ZeroRedundancyOptimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.optim.comm_hooks import reduce_to_owner
from tests.support.ranks import error_of, run_on_ranks

BATCHES = (5, 0, 3)
"""Of each rank."""
SET = KSparsePolytope(k_frac=0.1, radius=0.05)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 3))


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(8, 12, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(BATCHES[rank])
    ]


def rate(step: int) -> float:
    return 0.0 if step == 0 else 0.2 / step  # a warm-up begins at 0


def joined(rank: int, options: dict[str, Any]) -> list[torch.Tensor]:
    net = network()
    optimizer = SFW(constrain(net, SET), lr=rate(0), **options)
    model = DistributedDataParallel(net)
    with Join([model, optimizer]):
        for step, (inputs, targets) in enumerate(batches(rank)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    hooked = DistributedDataParallel(network())
    with_hook = SFW(constrain(hooked.module, SET))
    hooked.register_comm_hook(with_hook, reduce_to_owner)
    inputs, targets = batches(0)[0]
    F.cross_entropy(hooked(inputs), targets).backward()
    assert "without reduce_to_owner" in error_of(ValueError, Join, [hooked, with_hook])
    return [p.detach().clone() for p in net.parameters()]


def one_process() -> list[torch.Tensor]:
    """The same steps on one process: the mean of all ranks' gradients, 0 of those that have no batch left."""
    net = network()
    optimizer = SFW(constrain(net, SET), lr=1.0)
    everyone = [batches(rank) for rank in range(len(BATCHES))]
    for step in range(max(BATCHES)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        for own in everyone:
            if step < len(own):
                (F.cross_entropy(net(own[step][0]), own[step][1]) / len(BATCHES)).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("options", [{}, {"replicate_momentum": True}], ids=["owners", "replicated"])
def test_ranks_without_data_step_for_the_others(options: dict[str, Any]) -> None:
    """Fails when a rank that ran out of data leaves the others waiting, or steps from its last gradients or rate."""
    torch.set_num_threads(1)
    ranks = run_on_ranks(joined, 3, options)
    for p, q, r, wanted in zip(*ranks, one_process(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5)
