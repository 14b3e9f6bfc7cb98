"""Whole steps of two optimizers: one by the kernels for a GPU, wherever those run, and one by torch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sfw_dist import SFW, KSparsePolytope, LpBall, Unconstrained
from sfw_dist.errors import UserError

ROW = 64
"""Entries that a program handles here: small tensors have several rows."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
STATS_BYTES = 24

MASK, INDICES = KSparsePolytope(k_frac=0.1, radius=0.3), KSparsePolytope(k_frac=0.02, radius=0.3)
GROUPS: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
    ((5, 4, 4, 4), torch.float32, {"constraint": MASK}),
    ((13, 11), torch.bfloat16, {"constraint": MASK, "rescale": "fast_gradient"}),
    ((3 * ROW,), torch.float16, {"constraint": INDICES, "rescale": "diameter", "lr": 0.3}),
    ((9, 15), torch.float32, {"constraint": INDICES, "rescale": "none", "momentum": 0.5}),
    ((40,), torch.float32, {"constraint": KSparsePolytope(k=40, radius=0.1), "momentum": 0.0}),
    ((7, 6), torch.float32, {"constraint": LpBall(2, radius=1.0)}),
    ((50,), torch.float64, {"constraint": MASK}),
    ((2, 6, 3, 3), torch.float32, {"weight_decay": 0.01}),
    ((70,), torch.bfloat16, {"momentum": 0.0, "weight_decay": 0.1}),
    ((1,), torch.float16, {}),
]


@contextmanager
def kernels(row: int | None) -> Iterator[None]:
    """Batches that are made meanwhile take the kernels for a GPU."""
    from sfw_dist.optim.kernels.cuda import _ROW, CUDAKernel

    with mock.patch(
        "sfw_dist.optim.sharding.replicated.kernel_for", lambda device: partial(CUDAKernel, row=row or _ROW)
    ):
        yield


def optimizer(device: str, groups: Any = GROUPS, *, fused: bool, channels_last: bool = False, **options: Any) -> SFW:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, dtype, group in groups:
        x = (0.1 * torch.randn(shape, generator=generator)).to(device, dtype)
        if channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        made.append({"params": [nn.Parameter(x)], "constraint": Unconstrained(), **group})
    return SFW(made, **{"lr": 0.05, **options}, fused=fused)


def parameters(optimizer: SFW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: SFW, step: int) -> None:
    """In memory of their own, as after ``zero_grad(set_to_none=True)``."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters(optimizer):
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


class Twins:
    """Both optimizers, on ``device``; after each step they are compared."""

    def __init__(self, device: str = "cpu", row: int | None = ROW, **options: Any) -> None:
        self.row = row
        self.fused, self.plain = (optimizer(device, fused=fused, **options) for fused in (True, False))
        self.both = (self.fused, self.plain)

    def step(self) -> None:
        with kernels(self.row):
            self.fused.step()
        self.plain.step()
        self.compare()

    def run(self, steps: range, change: Callable[[SFW], None] = lambda optimizer: None) -> None:
        for step in steps:
            for either in self.both:
                set_gradients(either, step)
                change(either)
            self.step()

    def compare(self) -> None:
        """Momentum and vertices bit for bit, statistics to 1e-12; parameters bit for bit where γ is, in float32."""
        from sfw_dist.optim.kernels.cuda import CUDAKernel

        mine, theirs = (either._distribution.distributors(either.param_groups)[0] for either in self.both)
        assert isinstance(mine._kernel, CUDAKernel) and theirs._kernel is None
        for i, slot in enumerate(self.plain._distribution.replicated_shards):
            p, q = self.fused._distribution.replicated_shards[i].parameter, slot.parameter
            for key, value in self.plain.state[q].items():
                assert same_bits(self.fused.state[p][key], value), f"{key} of {slot.name}"
            a, b = mine._read[i].cpu(), theirs._read[i].cpu()
            assert torch.equal(a[STATS_BYTES:], b[STATS_BYTES:]), f"vertex of {slot.name}"
            a, b = a[:STATS_BYTES].view(torch.float64), b[:STATS_BYTES].view(torch.float64)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
            assert p.stride() == q.stride()
            if torch.equal(a[0].float(), b[0].float()) and torch.equal((1 - a[0]).float(), (1 - b[0]).float()):
                assert same_bits(p, q), f"{slot.name} in {int((p != q).sum())} entries"
            else:
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
                q.data.copy_(p)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(*(t.detach().contiguous().view(BITS[t.element_size()]) for t in (x, y)))


def run_mixed(twins: Twins) -> None:
    twins.run(range(3))


def run_missing(twins: Twins) -> None:
    """No gradient in the first step, for some in a later one."""

    def drop(optimizer: SFW) -> None:
        for p in parameters(optimizer)[::2]:
            p.grad = None

    for either in twins.both:
        for p in parameters(either):
            p.grad = None
    twins.step()
    twins.run(range(1))
    twins.run(range(1, 2), drop)
    twins.run(range(2, 3))


def run_not_finite(twins: Twins) -> None:
    """On the CPU both refuse the step; the next one goes on."""
    twins.run(range(1))
    for either in twins.both:
        set_gradients(either, 1)
        for i in (0, 2, 7):
            grad = parameters(either)[i].grad
            assert grad is not None
            grad.view(-1)[-1] = math.nan
    before = [p.detach().clone() for p in parameters(twins.fused)]
    told = []
    for either in twins.both:
        with kernels(twins.row), pytest.raises(UserError, match="not finite") as caught:
            either.step()
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert all(torch.equal(p, b) for p, b in zip(parameters(twins.fused), before, strict=True))
    twins.run(range(2, 4))


def run_schedules(twins: Twins) -> None:
    """Momentum goes and comes again, the learning rate lies in a tensor on the device, and memory moves."""
    for step, momentum in enumerate((0.9, 0.9, 0.0, 0.0, 0.8, 0.8)):

        def schedule(optimizer: SFW, step: int = step, momentum: float = momentum) -> None:
            for group in optimizer.param_groups:
                group["momentum"] = momentum
                dtype = torch.float64 if step % 2 else torch.float32
                group["lr"] = torch.tensor(0.05 / (1 + step), dtype=dtype, device=group["params"][0].device)
            if step == 4:
                for p in parameters(optimizer):
                    p.data = p.data.clone()

        twins.run(range(step, step + 1), schedule)
    for either in twins.both:
        for group in either.param_groups:
            group["lr"] = 0.02
        either.load_state_dict(either.state_dict())
    twins.run(range(9, 11))
