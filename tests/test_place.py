"""Offsets under a budget: no overlap, no footprint above the budget, and as much in the arena as there is room for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Planned, chain, costs_by_bytes, long_plan, planned, random_plan

import solvers
from mebp_compile.overhead import allocated_bytes
from mebp_compile.place import ALIGN, SMALLEST_BYTES, Ints, Life, Packed, Work, lives, pack, pack_columns, place_under
from solvers import Lifespan

ITEMS = st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 30))  # start, length, size


def placed(item: Planned) -> list[tuple[Life, int]]:
    offsets = item.plan.placement.offsets
    every = lives(item.graph, item.plan.problem, item.plan.schedule)
    return [(life, offsets[life.start, life.storage]) for life in every if (life.start, life.storage) in offsets]


def footprint(item: Planned) -> int:
    """Recounted step by step: constant, arena, charged bytes outside of it, views of what lies in it, workspace, discarded copies."""
    problem, plan = item.plan.problem, item.plan
    total = [problem.constant_bytes + plan.placement.arena_bytes] * len(plan.schedule.steps)
    for life in lives(item.graph, problem, plan.schedule):
        inside = (life.start, life.storage) in plan.placement.offsets
        for step in range(max(0, life.start), life.end):
            total[step] += life.charged_bytes - (allocated_bytes(life.size_bytes) if inside else 0)
    alive: set[int] = set()
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, solvers.Run):
            op = problem.ops[step.op]
            total[number] += op.choices[step.choice].workspace_bytes + sum(problem.storages[s].size_bytes for s in op.creates if s in alive)
            alive.update(op.creates)
        elif isinstance(step, solvers.Free):
            alive.discard(step.storage)
        elif isinstance(step, solvers.Prefetch):
            alive.add(step.storage)
    return max(total)


@pytest.mark.parametrize("seed", range(60))
def test_no_overlap_and_never_above_the_budget(seed: int) -> None:
    """Random plans and budgets: the solvers' own checker accepts the offsets, and an independent count of the footprint is the peak."""
    item = random_plan(seed)
    pairs = placed(item)
    spans = [Lifespan(life.storage, life.start, life.end, life.size_bytes, ALIGN) for life, _ in pairs]
    offsets = tuple(offset for _, offset in pairs)
    solvers.check_offsets(spans, solvers.Placement(offsets, item.plan.placement.arena_bytes, 0))
    assert all(life.fits_arena and life.size_bytes >= SMALLEST_BYTES for life, _ in pairs)
    assert footprint(item) == item.plan.peak_bytes <= item.plan.problem.budget_bytes


def test_everything_is_placed_where_there_is_room() -> None:
    """With memory to spare every eligible tensor lies in the arena."""
    graph = chain(12)
    item = planned(graph, costs_by_bytes(graph), 10**9, offload=False)
    every = lives(graph, item.plan.problem, item.plan.schedule)
    eligible = [life for life in every if life.fits_arena and life.size_bytes >= SMALLEST_BYTES]
    assert eligible
    assert len(item.plan.placement.offsets) == len(eligible)


def test_at_the_smallest_budget_the_arena_steps_back() -> None:
    """Where every byte is needed the footprint is still within the budget, with whatever arena that leaves."""
    graph = chain(9)
    costs = costs_by_bytes(graph)
    everything = planned(graph, costs, 10**9, offload=True)
    smallest_bytes, _ = solvers.smallest(everything.plan.problem)
    item = planned(graph, costs, smallest_bytes, offload=True)
    assert item.plan.peak_bytes <= smallest_bytes


def test_a_large_life_outside_makes_room_for_the_small_ones() -> None:
    """One huge tensor that no arena can take beside a busy step must not cost all the others their place."""
    small = [Life(index, 10 * index, 10 * index + 15, 8192, True, 8576) for index in range(50)]
    huge = Life(99, 300, 310, 1_000_000, True, 1_000_000)
    room = np.full(600, 1_045_000, np.int64)
    packed = pack([huge, *small], 36_000, room, Work(10_000))
    assert packed is not None
    assert {life.storage for life in packed.lives} == set(range(50))


def check_packed(packed: Packed, some: list[Life], room: Ints) -> None:
    """No two blocks overlap, and at each step the arena and what is outside of it fit in the room given."""
    spans = [Lifespan(life.storage, life.start, life.end, life.size_bytes) for life in packed.lives]
    solvers.check_offsets(spans, solvers.Placement(tuple(packed.offsets), packed.arena_bytes, 0))
    inside = {life.storage for life in packed.lives}
    for step in range(len(room)):
        outside = sum(allocated_bytes(life.size_bytes) for life in some if life.storage not in inside and life.start <= step < life.end)
        assert packed.arena_bytes + outside <= room[step]


@settings(max_examples=60, deadline=None)
@given(st.lists(ITEMS, max_size=30), st.integers(1, 400), st.integers(0, 400))
def test_pack_keeps_its_promise(items: list[tuple[int, int, int]], arena: int, more: int) -> None:
    """Inside the cap, no two blocks overlap, and at each step the arena and what is outside of it fit in the room given."""
    some = [Life(index, start, start + length, 64 * size, True, 64 * size) for index, (start, length, size) in enumerate(items)]
    room = np.full(64, 64 * (arena + more), np.int64)
    packed = pack(some, 64 * arena, room, Work(10_000))
    if packed is None:
        return
    assert packed.arena_bytes <= 64 * arena
    check_packed(packed, some, room)


def test_ten_thousand_lives() -> None:
    """A schedule of more than 10,000 steps is placed whole, and the same way each time."""
    item = long_plan()
    again = place_under(item.graph, item.plan.problem, item.plan.schedule)
    assert again == item.plan.placement
    assert again.offsets
    assert again.peak_bytes <= item.plan.problem.budget_bytes


@pytest.mark.parametrize("seed", range(30))
def test_columns_waste_no_more_than_is_to_spare(seed: int) -> None:
    """Random lives and random room: columns never take more than there is at any step, and their lives never meet."""
    draw = np.random.default_rng(seed)
    some = []
    for index in range(60):
        start, size = int(draw.integers(0, 80)), 64 * int(draw.choice([64, 70, 128, 500]))
        some.append(Life(index, start, start + int(draw.integers(1, 20)), size, True, allocated_bytes(size)))
    load = np.zeros(100, np.int64)
    for life in some:
        load[life.start : life.end] += allocated_bytes(life.size_bytes)
    room = load + np.where(draw.random(100) < 0.3, 0, draw.integers(0, 200_000, 100))
    packed = pack_columns(some, room)
    check_packed(packed, some, room)


def test_a_chain_without_a_gap_needs_nothing_to_spare() -> None:
    """Where memory is full at every step, lives of one size that follow each other share a column; one that leaves a gap has none."""
    chain_of_lives = [Life(index, 10 * index, 10 * index + 10, 8192, True, 8576) for index in range(6)]
    gap = [life for life in chain_of_lives if life.storage != 3]
    assert len(pack_columns(chain_of_lives, np.full(60, allocated_bytes(8192), np.int64)).lives) == 6
    tight = np.array([allocated_bytes(8192) if not 30 <= step < 40 else 0 for step in range(60)], np.int64)
    assert pack_columns(gap, tight).lives == []
