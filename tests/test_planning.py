"""From costs to a plan: what is charged, what is promised, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from planned import chain, costs_by_bytes, planned, random_plan, tight

import solvers
from mebp_compile import overhead
from mebp_compile.errors import BudgetInfeasible, GraphError
from mebp_compile.graph import PERSISTENT
from mebp_compile.overhead import MAPPED_BYTES, PAGE_BYTES, allocated_bytes, charged_sizes, constant_overhead
from mebp_compile.place import lives, place_under
from mebp_compile.planning import Costs, OpCost, _roomier, build_problem, faults_us, make_plan, make_plans, tensor_peak


@pytest.mark.parametrize("seed", range(20))
def test_time_never_falls_as_the_budget_shrinks(seed: int) -> None:
    """Over budgets from the smallest found to keep-all, in any order, and every plan stays within its own."""
    chance = random.Random(seed)
    graph = chain(chance.randint(2, 6), seed)
    costs = Costs({op.name: OpCost(chance.randint(1, 500), 64 * chance.randint(0, 40)) for op in graph.ops}, 100.0, 50.0, 30)
    problem = build_problem(graph, costs, 10**9, offload=True)
    smallest_bytes, _ = solvers.smallest(problem)
    budgets = [int(smallest_bytes * factor) for factor in (1.0, 2.5, 1.1, 1.6)]
    plans = make_plans(graph, problem, budgets, "fast")
    assert [plan.problem.budget_bytes for plan in plans] == budgets
    assert all(plan.peak_bytes <= plan.problem.budget_bytes for plan in plans)
    times = [plan.time_us for plan in sorted(plans, key=lambda plan: plan.problem.budget_bytes)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_refusal_names_a_budget_that_works(seed: int) -> None:
    """Below the smallest budget found: a refusal with it, a lower bound and the op that binds; at it a plan; a byte less is refused."""
    graph = chain(1 + seed % 6, seed)
    problem = build_problem(graph, costs_by_bytes(graph), 1, offload=bool(seed % 2))
    with pytest.raises(BudgetInfeasible) as refused:
        make_plan(graph, problem, "fast")
    error = refused.value
    assert error.lower_bound_bytes <= error.smallest_bytes
    assert error.binding_op in {op.name for op in graph.ops}
    assert all(text in str(error) for text in (f"{error.smallest_bytes:,}", f"{error.lower_bound_bytes:,}", error.binding_op))
    plan = make_plan(graph, problem.with_budget(error.smallest_bytes), "fast")
    assert plan.peak_bytes <= error.smallest_bytes
    with pytest.raises(BudgetInfeasible):
        make_plan(graph, problem.with_budget(error.smallest_bytes - 1), "fast")


@pytest.mark.parametrize("seed", range(20))
def test_tensor_peak_counts_the_tensors_own_bytes(seed: int) -> None:
    """Recounted from the schedule: the largest sum of live storages as the graph sizes them, without overhead, workspace or arena."""
    item = random_plan(seed)
    schedule, problem = item.plan.schedule, item.plan.problem
    size = [storage.size_bytes for storage in item.graph.storages]
    live = {i for i, s in enumerate(problem.storages) if s.persistent and (not s.movable or i in schedule.resident)}
    peak = sum(size[storage] for storage in live)
    for step in schedule.steps:
        copies = 0
        if isinstance(step, solvers.Run):
            copies = sum(size[storage] for storage in problem.ops[step.op].creates if storage in live)
            live |= set(problem.ops[step.op].creates)
        elif isinstance(step, solvers.Prefetch):
            live.add(step.storage)
        elif isinstance(step, solvers.Free):
            live.discard(step.storage)
        peak = max(peak, copies + sum(size[storage] for storage in live))
    assert tensor_peak(item.graph, problem, schedule) == peak == item.plan.tensor_bytes <= item.plan.peak_bytes


def test_what_is_charged() -> None:
    """State costs its bytes, unless a step may read it into memory of its own; what a step allocates costs a little more."""
    graph = chain(5)
    plain, moved = charged_sizes(graph, ()), charged_sizes(graph, range(len(graph.storages)))
    for storage, size_bytes, moved_bytes in zip(graph.storages, plain, moved, strict=True):
        if storage.role in PERSISTENT or not storage.size_bytes:
            assert size_bytes == storage.size_bytes
            assert (moved_bytes > size_bytes) == (storage.size_bytes > 0)
        else:
            assert size_bytes == moved_bytes > storage.size_bytes
    assert constant_overhead(graph) > 0
    for size_bytes in (1, 4096, MAPPED_BYTES - 1, MAPPED_BYTES, 10**9):
        assert size_bytes < allocated_bytes(size_bytes) < size_bytes + 2 * PAGE_BYTES


def test_malloc_maps_what_is_large_beside_the_budget() -> None:
    """From a 24th of a small budget on, within limits: page faults of small blocks cost too much, and holes of large ones are too large."""
    budgets = (10**5, 24 * 600_000, 16_000_000, 10**10)
    assert [overhead.mapped_bytes(budget) for budget in budgets] == [512 << 10, 600_000, 4 << 20, 4 << 20]


def test_a_placement_above_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan checks the footprint itself, whatever the placement says of it."""
    graph = chain(3)
    good = planned(graph, costs_by_bytes(graph), 10**9, offload=False)
    bad = replace(good.plan.placement, peak_bytes=good.plan.problem.budget_bytes + 1)
    monkeypatch.setattr("mebp_compile.planning.place_under", lambda *given: bad)
    with pytest.raises(GraphError, match="placement needs"):
        make_plan(graph, good.plan.problem, "fast")


def test_schedules_that_leave_the_arena_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the same schedule with its transfers moved, where there is such a one, at the offsets found for it; then those of smaller budgets."""
    item = tight(offload=True)
    graph, problem = item.graph, item.plan.problem
    solution = solvers.solve(problem, "fast")
    others = [schedule for schedule, _ in _roomier(graph, problem, solution, "fast", 5.0, None)]
    assert others
    assert all(solvers.replay(problem, schedule).peak_bytes < problem.budget_bytes for schedule in others)
    offsets = solvers.place(solvers.lifespans(problem, others[0]), work=0)
    monkeypatch.setattr(solvers, "fit_arena", lambda problem, schedule, own: solvers.Fitted(others[0], 1, offsets))
    (moved, placement), *rest = _roomier(graph, problem, solution, "fast", 5.0, None)
    assert moved is others[0]
    assert placement == place_under(graph, problem, moved, offsets)
    assert [schedule for schedule, _ in rest] == others


def test_fresh_pages_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the arena gives back, and where the budget is tight those of large storages outside of it; the plan's time has them."""
    item = tight(offload=True)
    graph, plan = item.graph, item.plan
    parts = graph, plan.problem, plan.schedule, plan.placement
    again_bytes = sum(item.high - item.low for item in plan.placement.decommits)
    assert plan.faults_us == faults_us(*parts) == int(overhead.FAULT_US_PER_BYTE * again_bytes) > 0  # tiny storages
    monkeypatch.setattr("mebp_compile.planning.mapped_bytes", lambda budget_bytes: 1)
    every = lives(graph, plan.problem, plan.schedule)
    outside = [life for life in every if life.start >= 0 and (life.start, life.storage) not in plan.placement.offsets]
    assert faults_us(*parts) == int(overhead.FAULT_US_PER_BYTE * (again_bytes + sum(life.size_bytes for life in outside))) > plan.faults_us
    assert replace(plan, faults_us=7).time_us == plan.report.time_us + 7
    roomy = plan.problem.with_budget(2 * plan.peak_bytes)
    assert faults_us(graph, roomy, plan.schedule, plan.placement) == 0
