"""Ownership and layout: every rank must come to the same plan, and no two tensors may share a byte."""

from __future__ import annotations

import ast
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sfw_dist.plan
from sfw_dist.plan import Item, Plan, make_plan

world_sizes = st.integers(1, 9)


@st.composite
def item_lists(draw: st.DrawFn, max_size: int = 12) -> list[Item]:
    """Tensors of any size, down to a cost of 0; equal costs are frequent."""
    costs = draw(st.lists(st.one_of(st.integers(0, 4), st.floats(0, 1e9)), max_size=max_size))
    sizes = draw(st.lists(st.integers(0, 5000), min_size=len(costs), max_size=len(costs)))
    pairs = zip(costs, sizes, strict=True)
    return [Item(f"layer{i}", cost, nbytes, "(3, 3) float32") for i, (cost, nbytes) in enumerate(pairs)]


def loads(items: list[Item], owners: tuple[int, ...], world_size: int) -> list[float]:
    result = [0.0] * world_size
    for item, owner in zip(items, owners, strict=True):
        result[owner] += item.cost
    return result


def check_layout(plan: Plan, items: list[Item]) -> None:
    """Slots aligned, apart, and inside the segment of their owner; the buffer is world_size segments."""
    assert len(plan.owners) == len(plan.offsets) == len(items)
    assert all(0 <= owner < plan.world_size for owner in plan.owners)
    slots = sorted((plan.start(i), plan.start(i) + item.nbytes, plan.owners[i]) for i, item in enumerate(items))
    for start, end, owner in slots:
        assert start % 8 == 0
        assert owner * plan.segment <= start and end <= (owner + 1) * plan.segment
    assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(slots))
    fullest = max((end - owner * plan.segment for _, end, owner in slots), default=0)
    assert plan.segment % 8 == 0 and plan.segment < fullest + 8  # not larger than needed


@given(items=item_lists(), world_size=world_sizes)
def test_every_item_has_one_owner_and_bytes_of_its_own(items: list[Item], world_size: int) -> None:
    """Overlapping slots overwrite another tensor's vertex; unaligned ones cannot be viewed as float64."""
    check_layout(make_plan(items, world_size), items)


@given(items=item_lists(), world_size=world_sizes)
def test_the_plan_follows_from_its_arguments_alone(items: list[Item], world_size: int) -> None:
    """Ranks compute it apart from each other."""
    assert make_plan(items, world_size) == make_plan([replace(item) for item in items], world_size)


@given(items=item_lists(), world_size=world_sizes)
def test_no_rank_is_loaded_beyond_the_mean_and_one_item(items: list[Item], world_size: int) -> None:
    """The rank that took its last item had the least load then, so at most the mean."""
    result = loads(items, make_plan(items, world_size).owners, world_size)
    largest = max((item.cost for item in items), default=0.0)
    assert max(result) <= (sum(result) / world_size + largest) * (1 + 1e-12)


@given(items=item_lists(max_size=6), world_size=st.integers(1, 3))
def test_load_is_at_most_four_thirds_of_the_best(items: list[Item], world_size: int) -> None:
    """Graham's bound, 4/3 − 1/(3·ranks), against all assignments: fails when the costliest do not go first."""
    every_assignment = itertools.product(range(world_size), repeat=len(items))
    best = min(max(loads(items, owners, world_size)) for owners in every_assignment)
    found = max(loads(items, make_plan(items, world_size).owners, world_size))
    assert found <= (4 / 3 - 1 / (3 * world_size)) * best * (1 + 1e-12)


def test_the_costliest_items_go_first_to_the_lowest_rank() -> None:
    """Among equal costs the first item, among equal loads the lowest rank: every rank must break ties alike."""
    items = [Item(name, cost, 8, "") for name, cost in zip("abcde", [2.0, 2.0, 2.0, 3.0, 3.0], strict=True)]
    plan = make_plan(items, 2)
    assert plan.owners == (0, 1, 0, 0, 1)
    assert sorted(loads(items, plan.owners, 2)) == [5.0, 7.0]


@pytest.mark.parametrize("world_size", [4, 5, 100])
def test_more_ranks_than_items_leaves_some_idle(world_size: int) -> None:
    """Each item has a rank of its own; an idle rank still has a segment, or the all-gather would be uneven."""
    items = [Item(str(i), 1.0 + i, 10 * i, "") for i in range(4)]
    plan = make_plan(items, world_size)
    assert len(set(plan.owners)) == 4
    assert plan.segment == 32 and plan.world_size == world_size
    check_layout(plan, items)


def test_no_items() -> None:
    """A model whose every parameter is elsewhere."""
    plan = make_plan([], 3)
    assert plan.owners == plan.offsets == () and plan.segment == 0


@given(items=item_lists(), world_size=world_sizes, data=st.data())
def test_owners_of_earlier_items_stay(items: list[Item], world_size: int, data: st.DataObject) -> None:
    """A parameter added later must not move anyone's momentum; new items fill the less loaded ranks."""
    kept = data.draw(st.integers(0, len(items)))
    owned_already = data.draw(st.lists(st.integers(0, world_size - 1), min_size=kept, max_size=kept))
    plan = make_plan(items, world_size, owned_already)
    assert list(plan.owners[:kept]) == owned_already
    check_layout(plan, items)
    same_again = make_plan(items, world_size, plan.owners)
    assert same_again == plan


def test_new_items_go_where_the_earlier_load_is_least() -> None:
    """Load that is there already counts."""
    items = [Item(str(i), cost, 8, "") for i, cost in enumerate([5.0, 5.0, 1.0, 9.0])]
    assert make_plan(items, 2, owned_already=(0, 0)).owners == (0, 0, 1, 1)
    assert make_plan(items, 3, owned_already=(1, 1)).owners == (1, 1, 2, 0)


def test_fingerprint_shows_every_difference() -> None:
    """It is all that ranks compare: what it does not cover goes wrong on the wire."""
    items = [Item("conv", 9.0, 64, "(8, 3) float32 radius 1"), Item("fc", 5.0, 32, "(4,) float32 radius 1")]
    changed = [
        ([replace(items[0], name="conv1"), items[1]], 2, ()),
        ([replace(items[0], cost=9.5), items[1]], 2, ()),
        ([replace(items[0], nbytes=65), items[1]], 2, ()),  # 65 and 66 take the same 72 bytes
        ([replace(items[0], nbytes=66), items[1]], 2, ()),
        ([replace(items[0], description="(8, 3) float32 radius 2"), items[1]], 2, ()),
        (items[::-1], 2, ()),
        (items[:1], 2, ()),
        (items, 3, ()),
        (items, 2, (1, 0)),
    ]
    prints = {make_plan(*arguments).fingerprint for arguments in [(items, 2, ()), *changed]}
    assert len(prints) == 1 + len(changed)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in prints)


def test_plan_is_pure_python() -> None:
    """It is computed where there is no torch, and tested without."""
    tree = ast.parse(Path(sfw_dist.plan.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
