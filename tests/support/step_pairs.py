"""The same tensors stepped by torch's operations on the CPU and by the kernels for a GPU, wherever those run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfw_dist.constraints import Constraint, KSparsePolytope, Unconstrained
from sfw_dist.optim.kernels.interface import KernelShard
from sfw_dist.optim.shard import Shard
from sfw_dist.optim.update import apply_update, compute_vertex
from sfw_dist.optim.vertex_codec import STATS

RESCALES = ("gradient", "fast_gradient", "diameter", "none")
STATS_BYTES = 8 * STATS
GUARD = 8
"""Bytes before each slot that must stay as they are."""
ROW = 64
"""Entries that a program handles here: small tensors have several rows."""
ENTRY_TYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def sparse(k: int) -> KSparsePolytope:
    return KSparsePolytope(k=k, radius=0.7)


def tensor(n: int, constraint: Constraint, dtype: torch.dtype = torch.float32, **options: Any) -> Shard:
    """A parameter of ``n`` entries with the options of its group."""
    group = {"lr": 0.8, "momentum": 0.9, "rescale": "gradient", "weight_decay": 0.0, "constraint": constraint}
    parameter = torch.nn.Parameter((torch.randn(n) * 0.1).to(dtype))
    return Shard.of("tensor", parameter, {**group, **options}, constraint, 0, n)


def parts(n: int, constraint: Constraint, starts: Sequence[int], **options: Any) -> list[Shard]:
    """A tensor of ``n`` entries in parts that begin at ``starts``; each is stepped as if it were a tensor."""
    whole = tensor(n, constraint, **options)
    edges = zip(starts, [*starts[1:], n], strict=True)
    return [Shard.of("part", whole.parameter, whole.group, constraint, *of) for of in edges]


def mixed() -> list[Shard]:
    """Both ways in which vertices are written, unconstrained tensors, all types, and every size that is special."""
    half, brain = torch.float16, torch.bfloat16
    return [
        tensor(5 * ROW, sparse(16)),
        tensor(2 * ROW + 1, sparse(17), brain, rescale="fast_gradient"),
        tensor(3 * ROW - 1, sparse(3), half, rescale="diameter", lr=0.3),  # indices
        tensor(2 * ROW, sparse(2), rescale="none", lr=0.01, momentum=0.5),  # indices
        tensor(2 * ROW + 5, sparse(2 * ROW + 5), lr=0.2),  # K = n
        tensor(ROW, sparse(1), brain),
        tensor(1, sparse(1)),
        tensor(2 * ROW + 3, Unconstrained(), momentum=0.9, lr=0.05),
        tensor(ROW, Unconstrained(), brain, weight_decay=0.03, lr=0.1),
        tensor(7, Unconstrained(), half, momentum=0.0, weight_decay=0.1, lr=0.2),
        tensor(33, sparse(20), momentum=0.0),
    ]


class Pair:
    """The same tensors stepped by torch's operations on the CPU and by the kernels on ``device``."""

    def __init__(self, slots: Sequence[Shard], device: str = "cpu", row: int = ROW, misaligned: bool = False) -> None:
        from sfw_dist.optim.kernels.cuda import CUDAKernel

        self.slots = slots
        self.states = [{"step": torch.zeros(()), "momentum_buffer": torch.zeros(s.codec.n)} for s in slots]
        starts = [0]
        for slot in slots:
            starts.append(starts[-1] + GUARD + slot.codec.nbytes)
        self.buffer = torch.randint(0, 256, (starts[-1] + GUARD,), dtype=torch.uint8).to(device)
        self.guards = [self.buffer[start:][:GUARD] for start in starts]
        self.guarded = [guard.clone() for guard in self.guards]

        def copy(x: Tensor) -> Tensor:
            """Elsewhere, if so wanted at an address that is a multiple of the entries' size and of nothing more."""
            there = torch.cat([x.new_zeros(int(misaligned)), x.detach().flatten()]).to(device)
            return there[int(misaligned) :]

        parameters = {slot.parameter: copy(slot.parameter) for slot in slots}
        self.momenta = [copy(state["momentum_buffer"]) for state in self.states]
        self.shards = []
        for slot, start in zip(slots, starts, strict=False):
            memory = self.buffer[start + GUARD :][: slot.codec.nbytes]
            diameter = slot.constraint.diameter(slot.codec.n)
            self.shards.append(
                KernelShard(parameters[slot.parameter], slot.start, slot.codec, diameter, written=memory, read=memory)
            )
        self.copy = copy
        self.kernel = CUDAKernel(self.shards, row)

    def options(self) -> list[dict[str, Any]]:
        return [
            slot.group | {"first": slot.group["momentum"] == 0 or bool(state["step"] == 0)}
            for slot, state in zip(self.slots, self.states, strict=True)
        ]

    def given(self, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Copies of gradients, and the momenta that go with them."""
        there = [None if g is None else self.copy(g) for g in gradients]
        return there, [None if g is None else m for g, m in zip(there, self.momenta, strict=True)]

    def compute_vertices(self, gradients: Sequence[Tensor | None]) -> None:
        """Both answer; momentum, support and signs are equal bit for bit, statistics to 1e-12."""
        self.kernel.compute_vertices(*self.given(gradients), self.options())
        self.compare_answers(gradients)

    @torch.no_grad()
    def compare_answers(self, gradients: Sequence[Tensor | None]) -> None:
        for slot, state, shard, m, gradient in zip(
            self.slots, self.states, self.shards, self.momenta, gradients, strict=True
        ):
            keeps = slot.group["momentum"] > 0
            stats, vertex = compute_vertex(slot, state if keeps else {"step": state["step"]}, gradient)
            if gradient is not None and not keeps:
                state["momentum_buffer"].copy_(m)  # without momentum it is memory to work in
            exactly(m, state["momentum_buffer"], f"momentum of {slot.codec}")
            actual = shard.read.cpu()
            torch.testing.assert_close(stats_of(actual), stats, rtol=1e-12, atol=1e-15, equal_nan=True)
            if stats.isfinite().all():
                expected = actual.clone()
                slot.codec.encode(stats, vertex, expected)
                exactly(actual[STATS_BYTES:], expected[STATS_BYTES:], f"vertex of {slot.codec}")
        for guard, guarded in zip(self.guards, self.guarded, strict=True):
            exactly(guard, guarded.cpu(), "bytes between the slots")

    def apply_update(self) -> None:
        self.kernel.apply_update()
        self.compare_moves()

    @torch.no_grad()
    def compare_moves(self) -> None:
        """Parameters are equal bit for bit, if torch too moves by the bytes in the slots."""
        for slot, shard in zip(self.slots, self.shards, strict=True):
            stats, vertex = slot.codec.decode(shard.read.cpu())
            apply_update(slot, stats[0], vertex)
        for slot, shard in zip(self.slots, self.shards, strict=True):
            entries = ENTRY_TYPES[shard.parameter.dtype]
            exactly(shard.parameter.view(entries), slot.parameter.detach().view(entries), f"θ of {slot.codec}")

    def gradients(self) -> list[Tensor | None]:
        """One a slot, of its whole tensor."""
        return [torch.randn(slot.parameter.numel()).to(slot.parameter.dtype) for slot in self.slots]


def stats_of(slot: Tensor) -> Tensor:
    return slot[:STATS_BYTES].view(torch.float64)


def exactly(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=0, atol=0, equal_nan=True, msg=lambda difference: f"{what}: {difference}"
    )


def run_steps(pair: Pair) -> None:
    """Three steps of anything; tensors of their own hold each step's gradients."""
    for _ in range(3):
        pair.compute_vertices(pair.gradients())
        pair.apply_update()


def run_ties(pair: Pair) -> None:
    """Momenta of few magnitudes; ρ = 1/2 keeps them so."""
    levels = (
        torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]),
        torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e-45, -1e-39]),
    )
    for of_step in levels:
        pair.compute_vertices([of_step[torch.randint(len(of_step), (slot.codec.n,))] for slot in pair.slots])
        pair.apply_update()


def tied() -> list[Shard]:
    ks = (1, 7, 100, 3 * ROW + 3)
    return [tensor(3 * ROW + 3, sparse(k), momentum=0.5, lr=0.1) for k in ks]


def run_missing(pair: Pair) -> None:
    """No gradient in the first step, in a later one, and for half of the tensors."""
    gradients = pair.gradients()
    every = range(len(gradients))
    for present in ((), every, every[::2], every[1::2]):
        pair.compute_vertices([g if i in present else None for i, g in enumerate(gradients)])
        pair.apply_update()


def run_not_finite(pair: Pair, value: float) -> None:
    """A bad entry in every second tensor, then steps of all of them."""
    pair.compute_vertices(pair.gradients())
    pair.apply_update()
    before = [m.clone() for m in pair.momenta]
    gradients = pair.gradients()
    for gradient in gradients[::2]:
        assert gradient is not None
        gradient[gradient.numel() // 2] = value
    pair.compute_vertices(gradients)
    for i, (shard, state, m, momentum) in enumerate(zip(pair.shards, pair.states, pair.momenta, before, strict=True)):
        assert stats_of(shard.read)[0].isnan().item() == (i % 2 == 0)
        if i % 2 == 0:  # as the optimizer does: it raises, and the momentum starts anew
            state["step"].zero_()
            shard.read.zero_()
            assert not torch.equal(momentum, m)
    pair.apply_update()
    pair.compute_vertices(pair.gradients())


def run_ranks(pair: Pair) -> None:
    """Two ranks own every second tensor each, and read what is gathered of both."""
    from sfw_dist.optim.kernels.cuda import CUDAKernel

    written = [torch.zeros_like(shard.read) for shard in pair.shards]
    copies = [{shard.parameter: shard.parameter.clone() for shard in pair.shards} for _ in range(2)]
    ranks = [
        [
            replace(shard, parameter=copies[rank][shard.parameter], written=written[i] if i % 2 == rank else None)
            for i, shard in enumerate(pair.shards)
        ]
        for rank in range(2)
    ]
    kernels = [CUDAKernel(shards, pair.kernel._row) for shards in ranks]
    for _ in range(2):
        gradients, options = pair.gradients(), pair.options()
        there, momenta = pair.given(gradients)
        for rank, kernel in enumerate(kernels):
            kernel.compute_vertices(there[rank::2], momenta[rank::2], options[rank::2])
        for shard, memory in zip(pair.shards, written, strict=True):
            shard.read.copy_(memory)
        pair.compare_answers(gradients)
        for kernel in kernels:
            kernel.apply_update()
        pair.apply_update()
        for mine, other, expected in zip(*ranks, pair.shards, strict=True):
            assert torch.equal(mine.parameter, expected.parameter) and torch.equal(other.parameter, expected.parameter)
