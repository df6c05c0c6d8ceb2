"""solvers.solve and what it is made of: valid, deterministic, monotone, honest about what doesn't fit."""

import pickle
from dataclasses import replace

import pytest
from generators import layered, small, transformer

from solvers.baselines import keep_all, layer_of, per_layer, recompute_all
from solvers.bounds import roofline_us, working_set
from solvers.check import replay
from solvers.decode import Tables
from solvers.emit import emit, synchronous
from solvers.greedy import descend
from solvers.problem import Problem, ProblemError
from solvers.schedule import Schedule
from solvers.solve import Infeasible, smallest, solve

TINY = transformer(1, 16, 8)
PROBLEMS = [layered(0, 24), layered(1, 40), TINY, replace(TINY, can_offload=False)]


def budgets(problem: Problem, count: int) -> list[int]:
    """From the smallest budget found to keep-all."""
    least = smallest(problem)[0]
    most = replay(problem, keep_all(problem), enforce_budget=False).peak_bytes
    return [least + (most - least) * k // (count - 1) for k in range(count)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_every_budget_down_to_the_smallest_is_met(problem: Problem) -> None:
    """solve() fits each budget, its report is the replay's, and its time is never below the bound."""
    for budget in budgets(problem, 4):
        tight = problem.with_budget(budget)
        solution = solve(tight, "fast")
        assert solution.report == replay(tight, solution.schedule)
        assert solution.report.peak_bytes <= budget
        assert solution.bound_us <= solution.report.time_us
        assert solution.gap == pytest.approx(solution.report.time_us / solution.bound_us - 1)


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_time_is_monotone_with_hints(problem: Problem) -> None:
    """With the smaller budgets' answers as hints, a larger budget is never slower."""
    hints: list[Schedule] = []
    last = None
    for budget in budgets(problem, 6):
        solution = solve(problem.with_budget(budget), "fast", hints=hints)
        assert last is None or solution.report.time_us <= last
        last = solution.report.time_us
        hints.append(solution.schedule)
    assert last == roofline_us(problem)


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_infeasible_names_a_budget_that_works(problem: Problem) -> None:
    """Below the smallest peak: Infeasible, whose smallest_found_bytes solves and whose lower bound is below it."""
    with pytest.raises(Infeasible) as caught:
        solve(problem.with_budget(1), "fast")
    error = caught.value
    assert error.lower_bound_bytes == working_set(problem)[0] <= error.smallest_found_bytes
    assert error.binding_op in {op.name for op in problem.ops} | {"end of the step"}
    assert (
        solve(problem.with_budget(error.smallest_found_bytes), "fast").report.peak_bytes <= error.smallest_found_bytes
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.smallest_found_bytes, str(copy)) == (error.smallest_found_bytes, str(error))


def test_smallest_reaches_the_working_set_of_a_transformer() -> None:
    """With a disk, the greedy descent comes within 10 % of what the largest op needs."""
    problem = transformer(3, 32, 16)
    assert smallest(problem)[0] <= 1.1 * working_set(problem)[0]


def test_random_small_problems_from_loose_to_tight() -> None:
    """100 small problems: solve fits or refuses; refusals name a budget at which it then succeeds."""
    refused = 0
    for seed in range(300, 400):
        problem, found = small(seed), None
        try:
            assert solve(problem, "fast").report.peak_bytes <= problem.budget_bytes
        except Infeasible as error:
            found = error.smallest_found_bytes
        if found is not None:
            refused += 1
            assert found > problem.budget_bytes
            assert solve(problem.with_budget(found), "fast").report.peak_bytes <= found
    assert refused < 60


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("problem", [small(7), layered(3, 50)], ids=["exact", "search"])
def test_solve_is_deterministic(effort: str, problem: Problem) -> None:
    """Two solves with one seed give the same schedule, where the limit doesn't cut the search."""
    tight = problem.with_budget(budgets(problem, 4)[1])
    first, second = (solve(tight, effort, time_limit_s=500.0, seed=5) for _ in range(2))
    assert first.schedule == second.schedule


def test_more_effort_is_never_slower() -> None:
    """Search starts from the greedy answer and keeps the better one."""
    problem = layered(4, 30)
    tight = problem.with_budget(budgets(problem, 5)[1])
    times = [solve(tight, effort, time_limit_s=3.0).report.time_us for effort in ("fast", "balanced")]
    assert times[1] <= times[0]


def test_bad_arguments_and_bad_hints() -> None:
    """An unknown effort and a malformed problem raise; a hint that isn't valid is ignored."""
    problem = layered(0, 10)
    with pytest.raises(ValueError, match="effort"):
        solve(problem, "heroic")
    with pytest.raises(ProblemError):
        solve(replace(problem, ops=problem.ops[1:]))
    assert solve(problem, "fast", hints=[Schedule(())]).report.runs == len(problem.ops)


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_decoded_profile_is_the_replay(problem: Problem) -> None:
    """For every state of the descent, the decoder's peak and synchronous time are exactly the replay's."""
    tables = Tables(problem)
    for state in descend(tables, 0.3):
        report = replay(problem, emit(tables, state.decisions, state.trace, synchronous(state.trace)), False)
        assert (report.peak_bytes, report.time_us) == (state.profile.peak_bytes, state.profile.time_us)


def test_baselines_are_valid_and_ordered() -> None:
    """keep_all is fastest and largest; per_layer recomputes each layer at most once and needs less memory."""
    problem = transformer(4, 16, 16, adam=False)
    kept, layered_, again = (replay(problem, f(problem), False) for f in (keep_all, per_layer, recompute_all))
    assert kept.time_us == sum(op.choices[0].time_us for op in problem.ops)
    assert kept.recomputes == 0
    assert layered_.peak_bytes < kept.peak_bytes
    assert 0 < layered_.recomputes < sum(op.phase == "forward" for op in problem.ops)
    assert again.recomputes >= layered_.recomputes


def test_layer_of() -> None:
    """The first numbered layer component names the layer."""
    assert [layer_of(m) for m in ("model.layers.3.mlp", "transformer.h.11.attn.c_attn", "lm_head", "")] == [
        "layers.3", "h.11", "", "",
    ]  # fmt: skip


def test_importing_solvers_needs_neither_torch_nor_ortools() -> None:
    """A fresh interpreter that imports solvers has loaded neither."""
    import subprocess
    import sys

    code = "import sys, solvers; assert not {'torch', 'ortools'} & set(sys.modules), 'too much imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
