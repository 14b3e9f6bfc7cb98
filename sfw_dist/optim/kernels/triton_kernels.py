"""The kernels of :mod:`sfw_dist.optim.kernels.cuda`: the step of all tensors together, in Triton.

A program handles one row, ``ROW`` entries of one shard, and reads in tables of which. The last program of a shard to
arrive makes of what all of them left what the next kernel needs, so that no kernel waits for another or for the host.

Bytes moved for an entry of a constrained float32 tensor; half precision has 2 for each of g and θ:

    momentum    12    m in and out, g in
    histogram    8    m in, in two launches: for the middle and for the lowest bits of the K-th magnitude
    count        4    m in
    encode       8    m and θ in, and 0.13 out
    count_mask   0.13 in
    move         8    θ in and out, and 0.13 in

40 in all, of which the 16 that read m again come from the L2 cache as far as m fits there. An unconstrained tensor
moves 16 in ``momentum`` and 12 in ``move``. Products are rounded before they are added, as by torch's operations one
after another: launch the kernels with ``enable_fp_fusion=False``.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from sfw_dist.optim.kernels.triton_layout import (
    ALL,
    BROKEN,
    COLUMNS,
    DIAMETER,
    FIRST,
    FIRST_ROW,
    FLOAT32,
    GRADIENT,
    GRADIENT_TYPE,
    HOW,
    MASK,
    MOMENTUM,
    PREFIX,
    RADIUS,
    READ,
    RESCALE,
    RHO,
    ROWS,
    SPAN,
    STATE,
    STATS,
    STEP,
    THETA,
    TYPE,
    WANTED,
    WEIGHT_DECAY,
    WRITTEN,
    K,
    N,
    double,
    is_last,
    learning_rate,
    pack,
    popcount,
    popcount_below,
    read,
    row_of_program,
    scan_rows,
    search_indices,
    set_before,
    signs_address,
    words_and_lanes,
    write,
    write_indices,
)

# Magnitudes are compared by the 31 bits of |m|, which are ordered as |m| is: first 11 of them, then 10, then 10.
HIGH_BINS = tl.constexpr(2048)
LOW_BINS = tl.constexpr(1024)
HIGH_SHIFT = tl.constexpr(20)
LOW_BITS = tl.constexpr(10)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def momentum_kernel(rows, shards, steps, state, histogram, ROW: tl.constexpr):
    """``m ← ρ·m + (1 − ρ)·g`` and the highest bits of the K-th magnitude; all of an unconstrained shard's part."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    step = steps + shard * STEP
    state += shard * STATE
    histogram += shard * HIGH_BINS
    lane = tl.arange(0, ROW)
    constrained = tl.load(table + HOW) != ALL
    slot = tl.load(table + WRITTEN)
    gradient = tl.load(step + GRADIENT)
    if gradient != 0:
        m = read(gradient, tl.load(step + GRADIENT_TYPE), start, lane, left, ROW)
        weight_decay = double(step + WEIGHT_DECAY).to(tl.float32)
        if (weight_decay != 0) & (not constrained):
            theta = read(tl.load(step + THETA), tl.load(table + TYPE), start, lane, left, ROW)
            m = m + theta * weight_decay
        momentum = tl.load(step + MOMENTUM)
        if tl.load(step + FIRST) == 0:
            rho = double(step + RHO)
            share = tl.where(constrained, 1 - rho, 1.0).to(tl.float32)
            before = read(momentum, FLOAT32, start, lane, left, ROW)
            m = before * rho.to(tl.float32) + m * share
        write(momentum, FLOAT32, start, lane, left, m, ROW)
        bits = m.to(tl.int32, bitcast=True) & MAGNITUDE
        if constrained:
            counts = tl.histogram(bits >> HIGH_SHIFT, HIGH_BINS, mask=bits > 0)  # zeros are never chosen
            tl.atomic_add(histogram + tl.arange(0, HIGH_BINS), counts, mask=counts > 0, sem="relaxed")
        else:
            write(slot + STATS, FLOAT32, start, lane, left, m, ROW)
            if tl.max(bits, 0) >= INFINITY:
                tl.atomic_or(state + BROKEN, 1, sem="relaxed")
    elif not constrained:
        write(slot + STATS, FLOAT32, start, lane, left, tl.zeros((ROW,), tl.float32), ROW)

    if is_last(state, tl.load(table + ROWS)):
        if constrained:
            place, wanted = _find(histogram, tl.load(table + K).to(tl.int32), HIGH_BINS)
            tl.store(state + PREFIX, place)
            tl.store(state + WANTED, wanted)
        else:
            broken = tl.load(state + BROKEN, cache_modifier=".cg") != 0
            tl.store(state + BROKEN, 0)
            poison = tl.where(broken, float("nan"), 0.0).to(tl.float64)
            lr = learning_rate(step)  # 0 without a gradient
            _write_stats(slot, lr + poison, poison, lr)


@triton.jit
def histogram_kernel(rows, shards, steps, state, histogram, ROW: tl.constexpr, SHIFT: tl.constexpr):
    """Ten more bits of the K-th magnitude, those from bit ``SHIFT`` on."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    state += shard * STATE
    histogram += shard * HIGH_BINS
    prefix = tl.load(state + PREFIX)
    if prefix >= 0:
        m = read(tl.load(steps + shard * STEP + MOMENTUM), FLOAT32, start, tl.arange(0, ROW), left, ROW)
        bits = m.to(tl.int32, bitcast=True) & MAGNITUDE
        inside = bits >> (SHIFT + LOW_BITS) == prefix
        counts = tl.histogram((bits >> SHIFT) & (LOW_BINS - 1), LOW_BINS, mask=inside)
        tl.atomic_add(histogram + tl.arange(0, LOW_BINS), counts, mask=counts > 0, sem="relaxed")
        if is_last(state, tl.load(table + ROWS)):
            place, wanted = _find(histogram, tl.load(state + WANTED), LOW_BINS)
            tl.store(state + PREFIX, (prefix << LOW_BITS) | place)
            tl.store(state + WANTED, wanted)


@triton.jit
def count_kernel(rows, shards, steps, state, counts, ROW: tl.constexpr):
    """How many entries are chosen before each row, and how many tie; and a slot empty of signs or indices."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    state += shard * STATE
    lane = tl.arange(0, ROW)
    prefix = tl.load(state + PREFIX)
    momentum = tl.load(steps + shard * STEP + MOMENTUM)
    m = read(momentum, FLOAT32, start, lane, tl.where(momentum != 0, left, 0), ROW)
    bits = m.to(tl.int32, bitcast=True) & MAGNITUDE
    own = counts + 2 * (tl.load(table + FIRST_ROW) + start // ROW)
    tl.store(own, tl.sum((bits > tl.maximum(prefix, 0)).to(tl.int32), 0))
    tl.store(own + 1, tl.sum((bits == prefix).to(tl.int32), 0))

    k = tl.load(table + K)
    slot = tl.load(table + WRITTEN)
    if tl.load(table + HOW) == MASK:
        byte = start // 8 + tl.arange(0, ROW // 8)
        signs = signs_address(slot, tl.load(table + N)).to(tl.pointer_type(tl.uint8))
        tl.store(signs + byte, tl.zeros((ROW // 8,), tl.uint8), mask=byte < (k + 7) // 8)
    else:
        indices = (slot + STATS).to(tl.pointer_type(tl.int32))
        tl.store(indices + start + lane, tl.full((ROW,), -1, tl.int32), mask=start + lane < k)

    if is_last(state, tl.load(table + ROWS)):
        scan_rows(table, counts, tl.load(state + WANTED))


@triton.jit
def encode_kernel(rows, shards, steps, state, counts, sums, ROW: tl.constexpr):
    """The vertex and, of it and θ and m, the sums from which the statistics follow."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    step = steps + shard * STEP
    state += shard * STATE
    row = tl.load(table + FIRST_ROW) + start // ROW
    word, bit, lane = words_and_lanes(ROW)
    slot = tl.load(table + WRITTEN)
    present = tl.load(step + GRADIENT) != 0
    there = tl.where(present, left, 0)
    m = read(tl.load(step + MOMENTUM), FLOAT32, start, lane, there, ROW)
    theta = read(tl.load(step + THETA), tl.load(table + TYPE), start, lane, there, ROW)

    prefix = tl.load(state + PREFIX)
    bits = m.to(tl.int32, bitcast=True) & MAGNITUDE
    tie = bits == prefix
    ties = pack(tie, bit)
    rank = tl.load(counts + 2 * row + 1) + set_before(ties)[:, None] + popcount_below(ties[:, None], bit)
    chosen = (bits > tl.maximum(prefix, 0)) | (tie & (rank < tl.load(state + WANTED)))
    negative = chosen & (m > 0)  # in the vertex
    words = pack(chosen, bit)
    position = tl.load(counts + 2 * row) + set_before(words)
    body = slot + STATS
    if tl.load(table + HOW) == MASK:
        tl.store(body.to(tl.pointer_type(tl.uint32)) + start // 32 + word, words, mask=word * 32 < left)
        # The signs of a word's chosen entries, without gaps, go to the bits from its first one's position on.
        run = tl.sum(negative.to(tl.uint32) << popcount_below(words[:, None], bit).to(tl.uint32), 1)
        shifted = run.to(tl.uint64) << (position & 31).to(tl.uint64)
        low, high = shifted.to(tl.uint32), (shifted >> 32).to(tl.uint32)
        signs = signs_address(slot, tl.load(table + N)).to(tl.pointer_type(tl.uint32)) + (position >> 5)
        # Several runs meet in 32 bits of the slot; in what order they come does not matter.
        tl.atomic_or(signs, low, mask=low != 0, sem="relaxed")
        tl.atomic_or(signs + 1, high, mask=high != 0, sem="relaxed")
    else:
        write_indices(body, words, pack(negative, bit), start.to(tl.int32) + word * 32, position)

    radius = double(table + RADIUS).to(tl.float32)
    difference = tl.where(chosen, tl.where(negative, theta + radius, theta - radius), theta)  # θ − v
    m_64, difference_64 = m.to(tl.float64), difference.to(tl.float64)
    tl.store(sums + 3 * row, tl.sum(m_64 * m_64))
    tl.store(sums + 3 * row + 1, tl.sum(difference_64 * difference_64))
    tl.store(sums + 3 * row + 2, tl.sum(m_64 * difference_64))

    if is_last(state, tl.load(table + ROWS)):
        squared_norm, squared_distance, gap = _total(table, sums)
        norm, distance = tl.sqrt(squared_norm), tl.sqrt(squared_distance)
        diameter = double(table + DIAMETER)
        rescale = tl.load(step + RESCALE)
        if rescale == 0:
            factor = norm / distance  # θ = v makes it infinite, and γ = 1 then keeps θ
        elif rescale == 1:
            factor = 2 * norm / diameter
        elif rescale == 2:
            factor = 1 / diameter
        else:
            factor = tl.full((), 1.0, tl.float64)
        lr = learning_rate(step)
        gamma = lr * factor
        gamma = tl.where(gamma > 1, 1.0, gamma)
        gamma = tl.where(lr == 0, 0.0, gamma)  # at θ = v, 0 · ∞ is no number
        gamma = tl.where(norm < float("inf"), gamma, float("nan"))
        moves = present & (norm != 0)
        effective = tl.where(moves, gamma * distance / norm, 0.0)
        _write_stats(slot, tl.where(moves, gamma, 0.0), tl.where(present, gap, 0.0), effective)


@triton.jit
def count_mask_kernel(rows, shards, state, counts, ROW: tl.constexpr):
    """How many entries of a vertex that is written as a bitmap come before each row."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    word = tl.arange(0, ROW // 32)
    bitmap = (tl.load(table + READ) + STATS).to(tl.pointer_type(tl.uint32))
    words = tl.load(bitmap + start // 32 + word, mask=word * 32 < left, other=0)
    own = counts + 2 * (tl.load(table + FIRST_ROW) + start // ROW)
    tl.store(own, tl.sum(popcount(words), 0))
    tl.store(own + 1, 0)
    if is_last(state + shard * STATE, tl.load(table + ROWS)):
        scan_rows(table, counts, 0)


@triton.jit
def update_kernel(rows, shards, parameters, counts, ROW: tl.constexpr):
    """``θ ← (1 − γ)·θ + γ·v``, or ``θ − lr·m``, by what stands in the slot."""
    shard, start, left = row_of_program(rows, shards, ROW)
    table = shards + shard * COLUMNS
    word, bit, lane = words_and_lanes(ROW)
    slot = tl.load(table + READ)
    body = slot + STATS
    how = tl.load(table + HOW)
    parameter, kind = tl.load(parameters + shard), tl.load(table + TYPE)
    theta = read(parameter, kind, start, lane, left, ROW)
    gamma = tl.load(slot.to(tl.pointer_type(tl.float64)))
    if how == ALL:
        theta = theta - read(body, FLOAT32, start, lane, left, ROW) * gamma.to(tl.float32)
    else:
        if how == MASK:
            bitmap = body.to(tl.pointer_type(tl.uint32)) + start // 32 + word
            words = tl.load(bitmap, mask=word * 32 < left, other=0)
            chosen = (((words[:, None] >> bit) & 1) != 0) & (lane < left)
            before = tl.load(counts + 2 * (tl.load(table + FIRST_ROW) + start // ROW))
            position = before + set_before(words)[:, None] + popcount_below(words[:, None], bit)
            signs = signs_address(slot, tl.load(table + N)).to(tl.pointer_type(tl.uint8))
            packed = tl.load(signs + (position >> 3), mask=chosen, other=0).to(tl.int32)
            negative = ((packed >> (position & 7)) & 1) != 0
        else:
            chosen, negative = search_indices(body, tl.load(table + K).to(tl.int32), start.to(tl.int32) + lane)
        radius = double(table + RADIUS).to(tl.float32)
        shift = radius * gamma.to(tl.float32)
        theta = theta * (1 - gamma).to(tl.float32)
        theta = tl.where(chosen, tl.where(negative, theta - shift, theta + shift), theta)
    write(parameter, kind, start, lane, left, theta, ROW)


@triton.jit
def _find(histogram, wanted, BINS: tl.constexpr):
    """The bin of the ``wanted``-th largest entry, −1 if there are fewer, and how many are wanted of that bin.

    Leaves the histogram empty.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins, cache_modifier=".cg")
    tl.store(histogram + bins, tl.zeros((BINS,), tl.int32))
    reached = tl.cumsum(counts, 0, reverse=True)  # entries of a bin and those above it: falls from bin to bin
    place = tl.sum((reached >= wanted).to(tl.int32), 0) - 1
    return place, wanted - tl.sum(tl.where(bins > place, counts, 0), 0)


@triton.jit
def _total(table, sums):
    """The three sums over a shard's rows, always added in the same order."""
    own = sums + 3 * tl.load(table + FIRST_ROW)
    rows = tl.load(table + ROWS).to(tl.int32)
    norm = tl.zeros((SPAN,), tl.float64)
    distance = tl.zeros((SPAN,), tl.float64)
    gap = tl.zeros((SPAN,), tl.float64)
    for first in range(0, rows, SPAN):
        row = first + tl.arange(0, SPAN)
        norm += tl.load(own + 3 * row, mask=row < rows, other=0, cache_modifier=".cg")
        distance += tl.load(own + 3 * row + 1, mask=row < rows, other=0, cache_modifier=".cg")
        gap += tl.load(own + 3 * row + 2, mask=row < rows, other=0, cache_modifier=".cg")
    return tl.sum(norm, 0), tl.sum(distance, 0), tl.sum(gap, 0)


@triton.jit
def _write_stats(slot, gamma, gap, effective):
    stats = slot.to(tl.pointer_type(tl.float64))
    tl.store(stats, gamma)
    tl.store(stats + 1, gap)
    tl.store(stats + 2, effective)
