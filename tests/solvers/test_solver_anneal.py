"""solvers.anneal: orders found, sequences that are schedules, problems in another order."""

import pytest
from generators import layered, small, transformer

from solvers import anneal
from solvers.anneal import Setting, base_order, renamed, reordered, schedule_of, sequence_of
from solvers.baselines import keep_all
from solvers.bounds import roofline_us
from solvers.check import replay
from solvers.decode import Tables
from solvers.greedy import first_decisions
from solvers.library import load_library
from solvers.problem import Choice, Op, Problem, Storage
from solvers.schedule import Run, Schedule
from solvers.solve import solve

needs_library = pytest.mark.skipif(load_library("anneal") is None, reason="anneal.c is not built (no C compiler)")
WORK = 20_000_000


def two_chains(length: int = 4) -> Problem:
    """Two chains of growing, then small values, side by side in base order: one after the other they need half as much."""
    ops, storages, last = list[Op](), list[Storage](), [-1, -1]
    for k in range(length):
        for chain in range(2):
            reads = (last[chain],) if k else ()
            last[chain] = len(storages)
            storages.append(Storage(f"v{chain}.{k}", 1 if k == length - 1 else 100))
            ops.append(Op(f"op{chain}.{k}", (Choice(reads, time_us=10),), (last[chain],)))
    storages.append(Storage("sum", 1, output=True))
    ops.append(Op("sum", (Choice(tuple(last), time_us=10),), (len(storages) - 1,)))
    return Problem(tuple(ops), tuple(storages), 10**6, can_offload=False)


def fastest(problem: Problem) -> Setting:
    return Setting(first_decisions(Tables(problem)).choice)


@needs_library
def test_an_order_instead_of_recomputes() -> None:
    """The chains one after the other: no time is lost, where base order must run half of a chain twice or does not fit at all."""
    problem = two_chains().with_budget(201)
    setting = fastest(problem)
    schedule = schedule_of(problem, setting, sequence_of(problem, setting, work=WORK))
    assert schedule is not None
    assert replay(problem, schedule).time_us == roofline_us(problem)
    in_base_order, free = (solve(problem, effort, time_limit_s=5.0).report.time_us for effort in ("balanced", "proof"))
    assert free == roofline_us(problem) < in_base_order


@needs_library
@pytest.mark.parametrize("seed", range(40))
def test_what_is_annealed_is_a_schedule(seed: int) -> None:
    """In-place writes, random numbers, optional ops, outputs: the sequence replays; what it exceeds the budget by is all that may be wrong."""
    problem = small(seed) if seed % 2 else layered(seed, 30)
    setting = fastest(problem)
    sequence = sequence_of(problem.with_budget(10**9), setting, seed=seed, work=WORK)
    schedule = schedule_of(problem, setting, sequence)
    assert schedule is not None
    assert replay(problem, schedule, enforce_budget=False).time_us == sum(problem.ops[op].choices[setting.choice[op]].time_us for op in sequence)


@needs_library
@pytest.mark.parametrize("seed", range(40))
def test_another_order_is_the_same_problem(seed: int) -> None:
    """Schedules of the problem in the order of a sequence replay, renamed, in the problem itself, at the same bytes and time."""
    problem = small(seed)
    order = base_order(problem, sequence_of(problem.with_budget(10**9), fastest(problem), seed=seed, work=WORK))
    assert sorted(order) == list(range(len(problem.ops)))
    again = reordered(problem, order)
    schedule = keep_all(again)
    there, here = replay(again, schedule, enforce_budget=False), replay(problem, renamed(schedule, order), enforce_budget=False)
    assert (here.peak_bytes, here.time_us) == (there.peak_bytes, there.time_us)


@needs_library
def test_storages_on_disk_count_where_they_are_read() -> None:
    """A plan for weights on disk is an order, not a schedule; solved again from there, it keeps the budget."""
    problem = transformer(2, 16, 16)
    tables = Tables(problem)
    away = frozenset(s for s, may in enumerate(tables.may_leave) if may)
    setting = Setting(first_decisions(tables).choice, away)
    sequence = sequence_of(problem.with_budget(solve(problem, "fast").report.peak_bytes // 4), setting, work=WORK)
    assert schedule_of(problem, setting, sequence) is None
    reordered(problem, base_order(problem, sequence))


@needs_library
def test_the_same_work_gives_the_same_sequence() -> None:
    """And another seed another one."""
    problem = layered(5, 40)
    tight = problem.with_budget(int(0.7 * replay(problem, keep_all(problem)).peak_bytes))
    first, second, other = (sequence_of(tight, fastest(tight), seed, WORK) for seed in (1, 1, 2))
    assert first == second != other


def test_nothing_to_anneal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ops, a budget that storages at home exceed, no library: an empty sequence; solve then stands on base order."""
    problem = layered(5, 20)
    assert sequence_of(Problem((), (), 10), Setting([])) == []
    assert sequence_of(problem.with_budget(1), fastest(problem)) == []
    monkeypatch.setattr(anneal, "load_library", lambda name: None)
    assert sequence_of(problem, fastest(problem)) == []
    assert solve(problem, "proof", time_limit_s=2.0).report.time_us == solve(problem, "balanced", time_limit_s=2.0).report.time_us


def test_renamed() -> None:
    """Only runs name ops."""
    assert renamed(Schedule((Run(1, 2), Run(0))), [5, 7]) == Schedule((Run(7, 2), Run(5)))
