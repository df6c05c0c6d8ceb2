"""Two thousand random problems: aliases in place, several outputs, random numbers, persistent storages, disks, menus, optional ops.

Every answer replays in both of the replays, is the same when asked for again, and on the small ones it is never worse than the optimum that
exhaustive search finds.
"""

import pytest
from brute_force import optimum_us
from generators import layered, small
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_replay import naive_replay

from solvers.check import replay
from solvers.problem import Problem
from solvers.solve import Infeasible, Solution, solve

BATCHES = 10


def solved(problem: Problem, effort: str) -> Solution | None:
    """The same, twice; None where nothing was found that fits."""

    def answer() -> Solution | None:
        try:
            return solve(problem, effort, time_limit_s=100.0, seed=3)
        except Infeasible:
            return None

    first = answer()
    assert answer() == first
    return first


@pytest.mark.parametrize("batch", range(BATCHES))
def test_greedy_answers(batch: int) -> None:
    """1,700 of them, 200 of those with up to eighty ops."""
    found = 0
    for seed in range(batch, 1700, BATCHES):
        problem = small(10_000 + seed)
        if seed < 200:
            graph = layered(seed, 20 + seed % 60)
            problem = graph.with_budget(int((0.35 + seed % 7 / 10) * sum(s.size_bytes for s in graph.storages)))
        solution = solved(problem, "fast")
        if solution is not None:
            found += 1
            assert replay(problem, solution.schedule) == solution.report
            assert solution.bound_us <= solution.report.time_us
    assert found > 1700 / BATCHES / 2


@pytest.mark.parametrize("batch", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, BATCHES))])
def test_optimum_or_better(batch: int) -> None:
    """200 of them, a fifth in every run: as good as the best in base order with transfers one at a time, or better."""
    for seed in range(batch, 200, BATCHES):
        problem = small(20_000 + seed)
        solution = solved(problem, "proof")
        if solution is None:
            assert optimum_us(problem) is None, problem.name
            continue
        optimum = optimum_us(problem, solution.report.time_us)  # None: nothing there is as fast
        assert replay(problem, solution.schedule) == solution.report
        assert naive_replay(problem, solution.schedule) == (solution.report.peak_bytes, solution.report.time_us)
        assert solution.bound_us <= solution.report.time_us
        assert optimum in (None, solution.report.time_us), problem.name


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(min_value=0, max_value=2**40), share=st.floats(0.0, 1.2))
def test_any_seed_and_any_budget(seed: int, share: float) -> None:
    """And 100 that hypothesis draws."""
    problem = small(seed)
    problem = problem.with_budget(int(share * sum(s.size_bytes for s in problem.storages)))
    solution = solved(problem, "fast")
    assert solution is None or replay(problem, solution.schedule) == solution.report
