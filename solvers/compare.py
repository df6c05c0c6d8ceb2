"""A table: fixed and tuned schedules, and what the solvers make of the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from solvers.baselines import SCHEMES
from solvers.check import ScheduleError, replay
from solvers.decode import Tables
from solvers.emit import emit, synchronous
from solvers.evict import State
from solvers.problem import Problem
from solvers.solve import Infeasible, Solution, solve
from solvers.transfers import placed
from solvers.tuned import TUNED

HEAD = f"{'schedule':16} {'budget':>10} {'peak':>10} {'ms':>10} {'ours, ms':>10} {'bound, ms':>10} {'ours / it':>9}  ours by"


def comparison(problem: Problem, budgets: Sequence[int], effort: str, time_limit_s: float) -> Iterator[str]:
    """Lines of the table. A fixed schedule is compared at its own peak, a tuned one at each of the budgets."""
    yield HEAD
    for name, scheme in SCHEMES.items():
        state = scheme(Tables(problem))
        tight = problem.with_budget(state.profile.peak_bytes)
        yield _line(name, tight, state, _solved(tight, effort, time_limit_s))
    for budget in budgets:
        tight = problem.with_budget(budget)
        found = _solved(tight, effort, time_limit_s)
        for name, tune in TUNED.items():
            yield _line(name, tight, tune(Tables(tight)), found)


def _solved(problem: Problem, effort: str, time_limit_s: float) -> Solution | None:
    try:
        return solve(problem, effort, time_limit_s)
    except Infeasible:
        return None


def _line(name: str, problem: Problem, state: State | None, found: Solution | None) -> str:
    """One schedule, its transfers overlapped where its own bytes leave room, beside what is solved."""
    theirs = None if state is None else fastest_us(problem, state)
    peak = "-" if state is None else f"{state.profile.peak_bytes / 1e6:.1f}MB"
    head = f"{name:16} {problem.budget_bytes / 1e6:8.1f}MB {peak:>10} {_ms(theirs):>10}"
    if found is None:
        return f"{head} {'-':>10}"
    ratio = "-" if theirs is None else f"{found.report.time_us / theirs:.3f}"
    return f"{head} {_ms(found.report.time_us):>10} {_ms(found.bound_us):>10} {ratio:>9}  {found.method}"


def _ms(time_us: int | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.2f}"


def fastest_us(problem: Problem, state: State) -> int:
    """The state's time with its transfers one by one, or overlapped within the budget, whichever is less."""
    tables = Tables(problem)
    times = []
    for plan in (synchronous(state.trace), placed(tables, state)[1]):
        try:
            times.append(replay(problem, emit(tables, state.decisions, state.trace, plan)).time_us)
        except ScheduleError:
            continue
    return min(times)
