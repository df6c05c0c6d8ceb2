"""solvers.picture: what it draws is what the replay says."""

import pytest
from generators import layered, transformer

from solvers.check import replay
from solvers.picture import picture
from solvers.problem import Problem
from solvers.solve import smallest, solve

TIGHT = [(problem, smallest(problem)[0]) for problem in (layered(1, 40), transformer(2, 16, 16))]


@pytest.mark.parametrize(("problem", "least"), TIGHT, ids=["layered", "transformer"])
def test_bars_and_lanes_follow_the_replay(problem: Problem, least: int) -> None:
    """The bars reach the budget's line where the peak does; each lane has marks exactly if the replay counts such steps."""
    tight = problem.with_budget(int(1.05 * least))
    solution = solve(tight, "fast")
    report = replay(tight, solution.schedule)
    *bars, runs, again, writes, reads = picture(tight, solution.schedule, width=60, height=10).splitlines()
    assert len(bars) == 10
    assert ("#" in bars[0]) == (report.peak_bytes > 0.95 * tight.budget_bytes)
    assert set(runs.partition("|")[2]) <= set("FBU ")
    assert ("r" in again.partition("|")[2]) == (report.recomputes > 0)
    assert ("w" in writes.partition("|")[2]) == (report.offloads > 0)
    assert ("l" in reads.partition("|")[2]) == (report.prefetches > 0)
    assert bars[-1].count("#") >= bars[0].count("#")


def test_a_schedule_shorter_than_the_picture() -> None:
    """Each step has a column of its own, and the budget's line is where the budget lies."""
    problem = layered(0, 4)
    solution = solve(problem, "fast")
    lines = picture(problem, solution.schedule, width=500, height=4).splitlines()
    assert max(map(len, lines)) <= len(solution.schedule.steps) + 14
    assert "-" in lines[0]
    assert "#" in picture(problem.with_budget(solution.report.peak_bytes), solution.schedule, height=4).splitlines()[0]
