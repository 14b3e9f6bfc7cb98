"""What the kernels of :mod:`sfw_dist.optim.kernels.triton_kernels` share: tables, rows of entries, bitmaps, lists of
indices.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803
# Triton derives the types of a kernel's arguments when it is launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sfw_dist.optim.kernels.interface import DTYPE_CODES, LAYOUT_CODES
from sfw_dist.optim.vertex_codec import STATS_BYTES

# Columns of the shards, int64 (shards, COLUMNS).
TYPE = tl.constexpr(0)  # of the parameter
WRITTEN = tl.constexpr(1)  # address of the slot where the vertex is written, 0 if another rank computes it
READ = tl.constexpr(2)  # address of the slot where the vertex is read
N = tl.constexpr(3)
K = tl.constexpr(4)
HOW = tl.constexpr(5)
FIRST_ROW = tl.constexpr(6)  # among the rows of all shards
ROWS = tl.constexpr(7)
RADIUS = tl.constexpr(8)  # bits of a float64
DIAMETER = tl.constexpr(9)  # bits of a float64
COLUMNS = tl.constexpr(10)

# Columns of a step, int64 (shards, STEP); without a gradient all are 0.
GRADIENT = tl.constexpr(0)  # address
GRADIENT_TYPE = tl.constexpr(1)
THETA = tl.constexpr(2)  # address
MOMENTUM = tl.constexpr(3)  # address
LR = tl.constexpr(4)  # bits of a float64
LR_AT = tl.constexpr(5)  # address of a learning rate on the GPU, which then counts instead, or 0
LR_TYPE = tl.constexpr(6)  # of that one
RHO = tl.constexpr(7)  # bits of a float64
WEIGHT_DECAY = tl.constexpr(8)  # bits of a float64
RESCALE = tl.constexpr(9)  # 0 gradient, 1 fast_gradient, 2 diameter, 3 none
FIRST = tl.constexpr(10)  # not 0: m ← g
STEP = tl.constexpr(11)

# Columns of the state, int32 (shards, STATE); all 0 at first.
ARRIVED = tl.constexpr(0)  # programs that are through, 0 between kernels
BROKEN = tl.constexpr(1)  # whether an unconstrained momentum is not finite, 0 between kernels
PREFIX = tl.constexpr(2)  # highest bits of the K-th magnitude, in the end all 31; −1: every nonzero is chosen
WANTED = tl.constexpr(3)  # entries still to choose among those of that prefix, in the end among the ties
STATE = tl.constexpr(4)

# The types of parameters, gradients and learning rates.
FLOAT32 = tl.constexpr(DTYPE_CODES[torch.float32])
FLOAT16 = tl.constexpr(DTYPE_CODES[torch.float16])
BFLOAT16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
FLOAT64 = tl.constexpr(DTYPE_CODES[torch.float64])

# How a vertex is written, see sfw_dist.optim.vertex_codec.
MASK = tl.constexpr(LAYOUT_CODES["mask"])
INDICES = tl.constexpr(LAYOUT_CODES["indices"])
ALL = tl.constexpr(LAYOUT_CODES["all"])
STATS = tl.constexpr(STATS_BYTES)  # bytes of a slot before that

SPAN = tl.constexpr(1024)  # rows that the last program of a shard takes at a time


@triton.jit
def row_of_program(rows, shards, ROW: tl.constexpr):
    """This program's shard, the entry at which its row starts (int64), and how many of the row's entries it has."""
    program = tl.program_id(0)
    shard = tl.load(rows + 2 * program)
    start = tl.load(rows + 2 * program + 1).to(tl.int64) * ROW
    left = tl.minimum(tl.load(shards + shard * COLUMNS + N) - start, ROW)
    return shard, start, left.to(tl.int32)


@triton.jit
def is_last(state, programs):
    """Whether all other programs of the shard have been here; what they wrote before is then visible."""
    tl.debug_barrier()  # all of this program's writes come before its arrival
    last = tl.atomic_add(state + ARRIVED, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(state + ARRIVED, 0)
    return last


@triton.jit
def scan_rows(table, counts, wanted):
    """Of each row's counts (sure entries, ties) makes those before it: (chosen entries, ties)."""
    own = counts + 2 * tl.load(table + FIRST_ROW)
    rows = tl.load(table + ROWS).to(tl.int32)
    chosen_before = tl.zeros((), tl.int32)
    ties_before = tl.zeros((), tl.int32)
    for first in range(0, rows, SPAN):
        row = first + tl.arange(0, SPAN)
        sure = tl.load(own + 2 * row, mask=row < rows, other=0, cache_modifier=".cg")
        ties = tl.load(own + 2 * row + 1, mask=row < rows, other=0, cache_modifier=".cg")
        until = ties_before + tl.cumsum(ties, 0)
        chosen = sure + tl.minimum(until, wanted) - tl.minimum(until - ties, wanted)
        tl.store(own + 2 * row, chosen_before + tl.cumsum(chosen, 0) - chosen, mask=row < rows)
        tl.store(own + 2 * row + 1, until - ties, mask=row < rows)
        chosen_before += tl.sum(chosen, 0)
        ties_before += tl.sum(ties, 0)


@triton.jit
def words_and_lanes(ROW: tl.constexpr):
    """A row in words of 32 entries: words int32 ``(ROW/32,)``, bits uint32 ``(1, 32)``, entries int32 in both."""
    word = tl.arange(0, ROW // 32)
    bit = tl.arange(0, 32)[None, :]
    return word, bit.to(tl.uint32), word[:, None] * 32 + bit


@triton.jit
def pack(flags, bit):
    """``(words, 32)`` → uint32 ``(words,)``, little-endian bits."""
    return tl.sum(flags.to(tl.uint32) << bit, 1)


@triton.jit
def popcount(words):
    """Set bits of each uint32, as int32; written so that the compiler makes one instruction of it."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def popcount_below(words, bit):
    """Set bits below ``bit`` of each uint32, as int32."""
    return popcount(words & ((1 << bit) - 1))


@triton.jit
def set_before(words):
    """Set bits in earlier words: uint32 ``(words,)`` → int32 ``(words,)``."""
    counts = popcount(words)
    return tl.cumsum(counts, 0) - counts


@triton.jit
def signs_address(slot, n):
    """The signs follow the bitmap, aligned to 8 bytes."""
    return slot + STATS + (n + 63) // 64 * 8


@triton.jit
def write_indices(body, words, negatives, index, position):
    """The entries set in ``words``, which begin at ``index``; the first of each goes to ``position``."""
    for bit in range(32):
        stored = tl.where((negatives >> bit) & 1 != 0, -2 - (index + bit), index + bit)
        here = (words >> bit) & 1
        tl.store(body.to(tl.pointer_type(tl.int32)) + position, stored, mask=here != 0)
        position += here.to(tl.int32)


@triton.jit
def search_indices(body, k, index):
    """Whether each ``index`` stands among ``k`` stored ones, ascending and then −1, and whether as negative."""
    stored = body.to(tl.pointer_type(tl.int32))
    step = k
    while step & (step - 1) != 0:  # down to the highest power of two in k
        step = step & (step - 1)
    smaller = index * 0  # stored indices below this one, found bit by bit
    while step > 0:
        until = smaller + step
        entry = tl.load(stored + until - 1, mask=until <= k, other=-1)
        entry = tl.where(entry < -1, -2 - entry, entry)
        smaller = tl.where((entry != -1) & (entry < index), until, smaller)
        step = step >> 1
    entry = tl.load(stored + smaller, mask=smaller < k, other=-1)
    return (entry == index) | (entry == -2 - index), entry < -1


@triton.jit
def double(address):
    """A float64 from its bits in a table."""
    return tl.load(address).to(tl.float64, bitcast=True)


@triton.jit
def learning_rate(step):
    """A number of the host's, or what a tensor on the GPU holds now."""
    lr = double(step + LR)
    at = tl.load(step + LR_AT)
    if at != 0:
        if tl.load(step + LR_TYPE) == FLOAT64:
            lr = tl.load(at.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(at.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def read(address, kind, start, lane, left, ROW: tl.constexpr):
    """Entries ``start + lane`` of a tensor of type ``kind`` as float32, 0 from ``left`` on."""
    if kind == FLOAT32:
        x = _load(address + start * 4, tl.float32, lane, left, ROW)
    elif kind == FLOAT16:
        x = _load(address + start * 2, tl.float16, lane, left, ROW).to(tl.float32)
    else:
        x = _load(address + start * 2, tl.uint16, lane, left, ROW).to(tl.uint32) << 16
        x = x.to(tl.float32, bitcast=True)
    return x


@triton.jit
def write(address, kind, start, lane, left, x, ROW: tl.constexpr):
    """The inverse of :func:`read`, rounded to nearest, ties to even."""
    if kind == FLOAT32:
        _store(address + start * 4, tl.float32, lane, left, x, ROW)
    elif kind == FLOAT16:
        _store(address + start * 2, tl.float16, lane, left, x.to(tl.float16), ROW)
    else:  # By hand: Triton's interpreter rounds to bfloat16 otherwise than a GPU.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        _store(address + start * 2, tl.uint16, lane, left, tl.where(x == x, rounded, 0x7FC0).to(tl.uint16), ROW)


@triton.jit
def _load(address, KIND: tl.constexpr, lane, left, ROW: tl.constexpr):
    """Whole rows that are aligned go four entries at a time, others one by one."""
    WIDTH: tl.constexpr = KIND.primitive_bitwidth // 2
    if (left == ROW) & (address % WIDTH == 0):
        x = tl.load(tl.multiple_of(address.to(tl.pointer_type(KIND)), WIDTH) + lane)
    else:
        x = tl.load(address.to(tl.pointer_type(KIND)) + lane, mask=lane < left, other=0)
    return x


@triton.jit
def _store(address, KIND: tl.constexpr, lane, left, x, ROW: tl.constexpr):
    """See :func:`_load`."""
    WIDTH: tl.constexpr = KIND.primitive_bitwidth // 2
    if (left == ROW) & (address % WIDTH == 0):
        tl.store(tl.multiple_of(address.to(tl.pointer_type(KIND)), WIDTH) + lane, x)
    else:
        tl.store(address.to(tl.pointer_type(KIND)) + lane, x, mask=lane < left)
