"""solvers.cp_sat: equal to exhaustive search over the same space."""

import pytest
from brute_force import optimum_us
from generators import small, transformer

from solvers.check import replay
from solvers.cp_sat import solve_exact
from solvers.solve import Infeasible, solve

BATCHES = 8
SEEDS = 200


@pytest.mark.parametrize("batch", range(BATCHES))
def test_exact_model_equals_brute_force(batch: int) -> None:
    """200 random problems: the model's optimum, replayed, is the search's optimum; both call the same infeasible."""
    for seed in range(batch, SEEDS, BATCHES):
        problem = small(seed)
        answer = solve_exact(problem, 60.0)
        if answer.schedule is None:
            assert answer.status == "infeasible"
            assert optimum_us(problem) is None, problem.name
            continue
        time_us = replay(problem, answer.schedule).time_us
        assert answer.status == "optimal"
        assert answer.bound_us == time_us
        assert optimum_us(problem, time_us) == time_us, problem.name


def test_solve_is_at_least_as_good_as_the_exact_space() -> None:
    """solve() includes the exact answer on small problems; it's never slower, nor infeasible where that isn't."""
    for seed in range(40):
        problem = small(seed)
        answer = solve_exact(problem, 60.0)
        try:
            solution = solve(problem, time_limit_s=10.0)
        except Infeasible:
            assert answer.schedule is None
            continue
        if answer.bound_us is not None:
            assert solution.report.time_us <= answer.bound_us


def test_large_problems_are_declined() -> None:
    """A problem beyond the model's size is answered with 'too large', not with a long wait."""
    answer = solve_exact(transformer(), 1.0)
    assert (answer.schedule, answer.status) == (None, "too large")
