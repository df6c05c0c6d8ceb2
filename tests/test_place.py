"""Offsets under a budget: no overlap, no footprint above the budget, and as much in the arena as there is room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned import Planned, chain, costs_by_bytes, long_plan, planned, random_plan

import solvers
from mebp_compile.graph import Graph, Op, Ref, Storage, Value, verify
from mebp_compile.overhead import PAGE_BYTES, allocated_bytes
from mebp_compile.place import ALIGN, SMALLEST_BYTES, Life, lives, place_under
from mebp_compile.planning import Costs, OpCost, build_problem
from solvers import Free, Lifespan, Prefetch, Run, Schedule, Wait


def placed(item: Planned) -> list[tuple[Life, int]]:
    offsets = item.plan.placement.offsets
    every = lives(item.graph, item.plan.problem, item.plan.schedule)
    return [(life, offsets[life.start, life.storage]) for life in every if (life.start, life.storage) in offsets]


def footprint(item: Planned) -> int:
    """Recounted step by step: constant, arena, charged bytes outside of it, views of what lies in it, workspace, discarded copies."""
    problem, plan = item.plan.problem, item.plan
    every = lives(item.graph, problem, plan.schedule)
    total = [problem.constant_bytes + taken for taken in arena_bytes(item, every)]
    for life in every:
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


def arena_bytes(item: Planned, every: list[Life]) -> list[int]:
    """What the arena takes at each step, page by page, in the third of three steps that follow each other."""
    placement, steps = item.plan.placement, len(item.plan.schedule.steps)
    if not placement.decommits:
        return [placement.arena_bytes] * steps
    pages: set[int] = set()
    for _ in range(3):
        taken = []
        for step in range(steps):
            for gone in placement.decommits:
                if gone.step == step:
                    pages -= set(range(gone.low // PAGE_BYTES, gone.high // PAGE_BYTES))
            for life in every:
                low = placement.offsets.get((life.start, life.storage))
                if low is not None and max(life.start, 0) == step:
                    pages |= set(range(low // PAGE_BYTES, -(-(low + life.size_bytes) // PAGE_BYTES)))
            taken.append(len(pages) * PAGE_BYTES)
    return taken


@pytest.mark.parametrize("seed", range(60))
def test_no_overlap_and_never_above_the_budget(seed: int) -> None:
    """Random plans and budgets: the solvers' own checker accepts the offsets, and an independent count of the footprint is the peak."""
    item = random_plan(seed)
    pairs = placed(item)
    spans = [Lifespan(life.storage, life.start, life.end, life.size_bytes, ALIGN) for life, _ in pairs]
    offsets = tuple(offset for _, offset in pairs)
    solvers.check_offsets(spans, solvers.Placement(offsets, item.plan.placement.arena_bytes, 0))
    assert all(life.fits_arena and life.size_bytes >= SMALLEST_BYTES[0] for life, _ in pairs)
    assert footprint(item) == item.plan.peak_bytes <= item.plan.problem.budget_bytes


def test_everything_is_placed_where_there_is_room() -> None:
    """With memory to spare every eligible tensor lies in the arena."""
    graph = chain(12)
    item = planned(graph, costs_by_bytes(graph), 10**9, offload=False)
    every = lives(graph, item.plan.problem, item.plan.schedule)
    eligible = [life for life in every if life.fits_arena and life.size_bytes >= SMALLEST_BYTES[0]]
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


def test_ten_thousand_lives() -> None:
    """A schedule of more than 10,000 steps is placed whole, and the same way each time."""
    item = long_plan()
    again = place_under(item.graph, item.plan.problem, item.plan.schedule)
    assert again == item.plan.placement
    assert again.offsets
    assert again.peak_bytes <= item.plan.problem.budget_bytes


def test_offsets_that_are_known_are_taken() -> None:
    """Of a placement of everything: those of the lives in the arena, from the lowest on; and the budget holds."""
    item = long_plan()
    problem, schedule = item.plan.problem, item.plan.schedule
    items = solvers.lifespans(problem, schedule)
    known = solvers.place(items, work=0)
    found = place_under(item.graph, problem, schedule, known)
    low = {(span.start, span.id): offset for span, offset in zip(items, known.offsets, strict=True)}
    shifts = {low[max(0, start), storage] - offset for (start, storage), offset in found.offsets.items()}
    assert len(found.offsets) > 100
    assert len(shifts) == 1
    assert footprint(replace(item, plan=replace(item.plan, placement=found))) <= problem.budget_bytes
    record = returning_record()
    parts = record.graph, record.plan.problem, record.plan.schedule
    assert place_under(*parts, solvers.place(solvers.lifespans(*parts[1:]))) == record.plan.placement  # has a place of its own


def returning_record() -> Planned:
    """Two ops with a packed weight at home in memory around two that need its bytes, by hand: the weight leaves and comes back."""
    size = 8 * PAGE_BYTES
    names = ("record", "first", "second", "third", "loss")
    storages = (
        Storage("record", size, "weight", "weight:record"), *(Storage(name, size - PAGE_BYTES, "activation") for name in names[1:]),
    )  # fmt: skip
    values = tuple(Value(item.name, index, "uint8", (item.size_bytes,), (1,)) for index, item in enumerate(storages))

    def op(name: str, reads: tuple[int, ...], made: int) -> Op:
        parts = tuple(Ref(names[index]) for index in reads)
        return Op(
            name, "aten.thing.default", parts, outputs=(names[made],), creates=(made,), reads=reads, out_target="aten.thing.out", out=("out",)
        )  # fmt: skip

    ops = (op("one", (0,), 1), op("two", (1,), 2), op("three", (2,), 3), op("four", (0, 3), 4))
    graph = Graph("record", storages, values, ops, (), ("record",), (("return:0", "loss"),))
    verify(graph)
    schedule = Schedule((Run(0), Free(0), Run(1), Free(1), Run(2), Free(2), Prefetch(0), Wait(0), Run(3), Free(3)), frozenset({0}))
    problem = build_problem(graph, Costs({item.name: OpCost(10, size * (item.name == "two")) for item in ops}), 10**9, offload=True)
    problem = problem.with_budget(solvers.replay(problem, schedule).peak_bytes)
    placement = place_under(graph, problem, schedule)
    plan = replace(long_plan().plan, problem=problem, schedule=schedule, report=solvers.replay(problem, schedule), placement=placement)
    return Planned(graph, replace(plan, peak_bytes=placement.peak_bytes), "")


def test_a_record_comes_back_to_where_it_was() -> None:
    """At home in memory and away in mid-step: one place for all its lives, from the step's begin on, which others use meanwhile."""
    item = returning_record()
    places = {life.start: (life, low) for life, low in placed(item)}
    assert [life.storage for life, _ in places.values()].count(0) == 2
    assert places[-1][1] == places[6][1]
    assert places[2][1] == places[-1][1]  # the second activation, made while the record is away
    spans = [Lifespan(life.storage, life.start, life.end, life.size_bytes, ALIGN) for life, _ in places.values()]
    solvers.check_offsets(spans, solvers.Placement(tuple(low for _, low in places.values()), item.plan.placement.arena_bytes, 0))
    assert footprint(item) == item.plan.peak_bytes <= item.plan.problem.budget_bytes
