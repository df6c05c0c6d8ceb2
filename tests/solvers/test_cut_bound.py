"""solvers.cut_bound: never above what a schedule takes."""

from dataclasses import replace

import pytest
from brute_force import optimum_us
from generators import layered, small, transformer

from solvers.bounds import roofline_us
from solvers.check import replay
from solvers.cut_bound import lower_bound_us
from solvers.problem import Problem
from solvers.solve import Infeasible, smallest, solve

TINY = replace(transformer(1, 16, 8), can_offload=False)
CHAINS = [replace(layered(seed, size), can_offload=False) for seed, size in ((2, 40), (1, 60), (5, 90))]
PROBLEMS = [*CHAINS, TINY, replace(CHAINS[1], can_offload=True, interference=0.5)]


@pytest.mark.parametrize("batch", range(4))
def test_bound_never_exceeds_the_optimum(batch: int) -> None:
    """On 240 random small problems no schedule is below the bound: neither solve's nor the optimum of exhaustive search."""
    tighter = 0
    for seed in range(batch, 240, 4):
        problem = small(seed)
        try:
            found = solve(problem, "fast").report.time_us
        except Infeasible:
            continue
        bound = lower_bound_us(problem)
        tighter += bound > roofline_us(problem)
        assert bound <= found, problem.name
        if bound > roofline_us(problem):
            assert optimum_us(problem, bound - 1) is None, problem.name
    assert tighter


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_bound_never_exceeds_a_checked_schedule(problem: Problem) -> None:
    """At every budget the bound is at least the roofline and at most the time of the schedule found; it falls as the budget grows."""
    least, fits = smallest(problem)[0], []
    for budget in (least, int(1.2 * least), 2 * least, 5 * least):
        tight = problem.with_budget(budget)
        solution = solve(tight, "fast")
        bound = lower_bound_us(tight)
        assert roofline_us(tight) <= bound <= replay(tight, solution.schedule).time_us
        fits.append(bound)
    assert fits[0] >= fits[-1]
    assert fits[0] > roofline_us(problem)
