"""Ownership and layout: every rank must come to the same plan, and no two slots may share a byte."""

from __future__ import annotations

import ast
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sfw_dist.optim.sharding.assignment
from sfw_dist.optim.sharding.assignment import Assignment, ShardSpec, TensorSpec, assign, lay_out

world_sizes = st.integers(1, 9)


@st.composite
def item_lists(draw: st.DrawFn, max_size: int = 12, *, divisible: bool = True) -> list[TensorSpec]:
    """Tensors of any size, down to a cost of 0; equal costs are frequent."""
    costs = draw(st.lists(st.one_of(st.integers(0, 4), st.floats(0, 1e9)), max_size=max_size))
    sizes = draw(st.lists(st.integers(1, 5000), min_size=len(costs), max_size=len(costs)))
    unit = st.sampled_from([0, 1, 7, 64]) if divisible else st.just(0)
    return [
        TensorSpec(f"layer{i}", c, n, "(3, 3) float32", draw(unit))
        for i, (c, n) in enumerate(zip(costs, sizes, strict=True))
    ]


def loads(items: list[TensorSpec], plan: Assignment, world_size: int) -> list[float]:
    result = [0.0] * world_size
    for part in plan.shards:
        item = items[part.tensor]
        result[part.owner] += item.cost * (part.stop - part.start) / item.entries
    return result


def owners(plan: Assignment) -> list[int]:
    """Of uncut items."""
    return [part.owner for part in plan.shards]


@given(items=item_lists(), world_size=world_sizes)
def test_every_entry_has_one_owner(items: list[TensorSpec], world_size: int) -> None:
    """A gap is never updated, an overlap twice; two parts with one rank would share one momentum."""
    plan = assign(items, world_size)
    for i, item in enumerate(items):
        parts = [part for part in plan.shards if part.tensor == i]
        assert parts[0].start == 0 and parts[-1].stop == item.entries
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
        assert all(part.stop > part.start for part in parts)
        assert all(part.start % item.unit == 0 for part in parts[1:])
        assert len({part.owner for part in parts}) == len(parts)
        assert item.unit or len(parts) == 1
    assert all(0 <= part.owner < world_size for part in plan.shards)
    assert list(plan.loads) == pytest.approx(loads(items, plan, world_size))


@given(items=item_lists(), world_size=world_sizes)
def test_the_plan_follows_from_its_arguments_alone(items: list[TensorSpec], world_size: int) -> None:
    """Ranks compute it apart from each other."""
    assert assign(items, world_size) == assign([replace(item) for item in items], world_size)


@given(items=item_lists(), world_size=world_sizes)
def test_no_rank_is_loaded_beyond_the_mean_and_one_item(items: list[TensorSpec], world_size: int) -> None:
    """The rank that took its last part had the least load but for the parts of the same item."""
    found = loads(items, assign(items, world_size), world_size)
    largest = max((item.cost for item in items), default=0.0)
    assert max(found) <= (sum(found) / world_size + largest) * (1 + 1e-12)


@given(items=item_lists(max_size=6, divisible=False), world_size=st.integers(1, 3))
def test_load_is_at_most_four_thirds_of_the_best(items: list[TensorSpec], world_size: int) -> None:
    """Graham's bound, 4/3 − 1/(3·ranks), against all assignments: fails when the costliest do not go first."""

    def greatest(assignment: tuple[int, ...]) -> float:
        return max(sum(i.cost for i, o in zip(items, assignment, strict=True) if o == r) for r in range(world_size))

    best = min(map(greatest, itertools.product(range(world_size), repeat=len(items))))
    found = max(loads(items, assign(items, world_size), world_size))
    assert found <= (4 / 3 - 1 / (3 * world_size)) * best * (1 + 1e-12)


def test_the_costliest_items_go_first_to_the_lowest_rank() -> None:
    """Among equal costs the first item, among equal loads the lowest rank: every rank must break ties alike."""
    items = [TensorSpec(name, cost, 8, "") for name, cost in zip("abcde", [2.0, 2.0, 2.0, 3.0, 3.0], strict=True)]
    plan = assign(items, 2)
    assert owners(plan) == [0, 1, 0, 0, 1]
    assert sorted(plan.loads) == [5.0, 7.0]


@pytest.mark.parametrize("world_size", [4, 5, 100])
def test_more_ranks_than_items_leaves_some_idle(world_size: int) -> None:
    """Each item has a rank of its own."""
    items = [TensorSpec(str(i), 1.0 + i, 10, "") for i in range(4)]
    assert len(set(owners(assign(items, world_size)))) == 4


def test_no_items() -> None:
    """A model whose every parameter is elsewhere."""
    plan = assign([], 3)
    assert plan.shards == () and plan.imbalance == 1.0


@pytest.mark.parametrize("world_size", [2, 4, 8, 64])
def test_one_large_item_is_shared_by_all(world_size: int) -> None:
    """Otherwise one rank works while all others wait."""
    items = [TensorSpec("embedding", 1e6, 1_000_000, "", unit=1000), TensorSpec("bias", 10.0, 10, "", unit=0)]
    plan = assign(items, world_size)
    assert plan.imbalance <= 1.1
    uncut = assign([replace(items[0], unit=0), items[1]], world_size)
    assert uncut.imbalance == pytest.approx(world_size, rel=1e-4)


def test_nothing_is_cut_where_whole_items_balance() -> None:
    """Every cut item takes messages in every step."""
    items = [TensorSpec(str(i), 10.0, 1000, "", unit=10) for i in range(8)]
    assert len(assign(items, 4).shards) == 8


@given(items=item_lists(), world_size=world_sizes, data=st.data())
def test_owners_of_earlier_items_stay(items: list[TensorSpec], world_size: int, data: st.DataObject) -> None:
    """A parameter added later must not move anyone's momentum."""
    first = items[: data.draw(st.integers(0, len(items)))]
    kept = assign(first, world_size).shards
    plan = assign(items, world_size, kept)
    assert set(kept) <= set(plan.shards)
    assert assign(items, world_size, plan.shards).shards == plan.shards


def test_new_items_go_where_the_earlier_load_is_least() -> None:
    """Load that is there already counts."""
    items = [TensorSpec(str(i), cost, 8, "") for i, cost in enumerate([5.0, 5.0, 1.0, 9.0])]
    assert owners(assign(items, 2, [ShardSpec(0, 0, 8, 0), ShardSpec(1, 0, 8, 0)])) == [0, 0, 1, 1]
    assert owners(assign(items, 3, [ShardSpec(0, 0, 8, 1), ShardSpec(1, 0, 8, 1)])) == [1, 1, 2, 0]


def test_fingerprint_shows_every_difference() -> None:
    """It is all that ranks compare: what it does not cover goes wrong on the wire."""
    items = [TensorSpec("conv", 9.0, 64, "(8, 3) float32 radius 1"), TensorSpec("fc", 5.0, 32, "(4,) float32 radius 1")]
    changed = [
        ([replace(items[0], name="conv1"), items[1]], 2, ()),
        ([replace(items[0], cost=9.5), items[1]], 2, ()),
        ([replace(items[0], entries=65), items[1]], 2, ()),
        ([replace(items[0], unit=8), items[1]], 2, ()),
        ([replace(items[0], description="(8, 3) float32 radius 2"), items[1]], 2, ()),
        (items[::-1], 2, ()),
        (items[:1], 2, ()),
        (items, 3, ()),
        (items, 2, (ShardSpec(0, 0, 64, 1), ShardSpec(1, 0, 32, 0))),
    ]
    prints = {assign(*arguments).fingerprint for arguments in [(items, 2, ()), *changed]}
    assert len(prints) == 1 + len(changed)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in prints)


@given(sizes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 8)), max_size=12))
def test_slots_are_aligned_and_apart(sizes: list[tuple[int, int]]) -> None:
    """Overlapping slots overwrite another tensor's vertex; unaligned ones cannot be viewed as float64."""
    layout = lay_out([size for size, _ in sizes], [owner for _, owner in sizes], 9)
    slots = sorted((start, start + size, owner) for start, (size, owner) in zip(layout.starts, sizes, strict=True))
    for start, end, owner in slots:
        assert start % 8 == 0
        assert owner * layout.segment <= start and end <= (owner + 1) * layout.segment
    assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(slots))
    fullest = max((end - owner * layout.segment for _, end, owner in slots), default=0)
    assert layout.segment % 8 == 0 and layout.segment < fullest + 8  # not larger than needed


def test_plan_is_pure_python() -> None:
    """It is computed where there is no torch, and tested without."""
    tree = ast.parse(Path(sfw_dist.optim.sharding.assignment.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
