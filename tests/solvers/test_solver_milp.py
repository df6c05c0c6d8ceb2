"""solvers.milp: its plans decode to valid schedules, its estimate is the replay's, and solve only gains by it."""

import sys
import time
from dataclasses import replace

import pytest
from generators import layered, transformer

from solvers.baselines import keep_all
from solvers.check import replay
from solvers.decode import Tables
from solvers.emit import emit, synchronous
from solvers.greedy import evaluate, first_decisions
from solvers.milp import Residency, coarse, plans
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.solve import smallest, solve

TINY = replace(transformer(1, 16, 8), interference=0.6)
CHAINS = [
    replace(layered(0, 24), can_offload=False),
    replace(layered(3, 30), interference=0.5),
    replace(layered(5, 40), can_offload=False),
]


def budgets(problem: Problem, count: int) -> list[int]:
    """Between the smallest budget found and keep-all, both left out."""
    least = smallest(problem)[0]
    most = replay(problem, keep_all(problem), enforce_budget=False).peak_bytes
    return [least + (most - least) * k // (count + 1) for k in range(1, count + 1)]


@pytest.mark.parametrize("problem", CHAINS, ids=range(len(CHAINS)))
def test_solutions_of_the_model_keep_its_promises(problem: Problem) -> None:
    """An integer solution decodes to a schedule nearly within the budget and nearly as fast as the model says."""
    found = 0
    for budget in budgets(problem, 3):
        tables = Tables(problem.with_budget(budget))
        model = Residency(coarse(tables, first_decisions(tables).choice), budget)
        model.build()
        result = model.run(30.0, model.binaries)
        if result is None:  # the coarse problem has no solution in this budget
            continue
        found += 1
        state = evaluate(tables, model.decisions(result.values))
        schedule = emit(tables, state.decisions, state.trace, synchronous(state.trace))
        assert replay(tables.problem, schedule, enforce_budget=False).peak_bytes <= 1.05 * budget
        estimate = state.profile.compute_us + model.rate * state.profile.transfer_us
        assert estimate <= 1.02 * (result.objective + model.base_us())
    assert found


@pytest.mark.parametrize("problem", CHAINS, ids=range(len(CHAINS)))
def test_relaxation_is_below_its_solutions(problem: Problem) -> None:
    """The cuts of the closures take no integer solution away: the relaxation's value is at most the solution's."""
    tables = Tables(problem.with_budget(budgets(problem, 3)[2]))
    model = Residency(coarse(tables, first_decisions(tables).choice), tables.problem.budget_bytes)
    model.build()
    relaxed, result = model.relax(30.0), model.run(30.0, model.binaries)
    assert relaxed is not None
    assert result is not None
    assert relaxed.objective <= result.objective * (1 + 1e-6) + 1e-3


@pytest.mark.parametrize("problem", [*CHAINS[1:], TINY], ids=range(len(CHAINS)))
def test_solve_with_the_model_is_never_slower(problem: Problem) -> None:
    """solve("balanced") is valid, at most as slow as the greedy answer, and not below its bound."""
    for budget in budgets(problem, 1):
        tight = problem.with_budget(budget)
        solution = solve(tight, "balanced", time_limit_s=2.2)
        assert replay(tight, solution.schedule) == solution.report
        assert solution.bound_us <= solution.report.time_us <= solve(tight, "fast").report.time_us


def test_plans_are_deterministic() -> None:
    """Two runs give the same decisions, where the limit doesn't cut them."""
    problem = CHAINS[0].with_budget(budgets(CHAINS[0], 3)[1])
    tables = Tables(problem)
    ways = first_decisions(tables).choice
    first, second = (list(plans(tables, ways, time.monotonic() + 200)) for _ in range(2))
    assert first == second
    assert first


def test_without_ortools_the_greedy_answer_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ortools can't be imported solve still answers, with the roofline as its bound."""
    problem = TINY.with_budget(budgets(TINY, 3)[0])
    for name in [*(key for key in sys.modules if key.split(".")[0] == "ortools"), "ortools", "ortools.graph.python"]:
        monkeypatch.setitem(sys.modules, name, None)
    solution = solve(problem, "balanced", time_limit_s=2.0)
    assert isinstance(solution.schedule, Schedule)
    assert solution.report == replay(problem, solution.schedule)
