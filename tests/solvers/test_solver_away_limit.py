"""Problem.away_limit_bytes: what lies outside of memory is small too."""

from dataclasses import replace

import pytest
from generators import layered, small, transformer

from solvers.baselines import keep_all
from solvers.check import ScheduleError, replay
from solvers.problem import Problem, ProblemError
from solvers.schedule import Offload, Prefetch, Schedule
from solvers.solve import Infeasible, Solution, smallest, solve

LIMITS = (0.0, 0.3, 0.7, 1.0)


def away_set(problem: Problem, schedule: Schedule) -> set[int]:
    """What needs a place outside of memory, from the steps alone."""
    at_home = {s for s, info in enumerate(problem.storages) if info.persistent and info.movable and s not in schedule.resident}
    return at_home | {step.storage for step in schedule.steps if isinstance(step, (Offload, Prefetch))}


def answer(problem: Problem) -> tuple[Solution | None, Infeasible | None]:
    try:
        return solve(problem, "fast"), None
    except Infeasible as refusal:
        return None, refusal


@pytest.mark.parametrize("seed", range(30))
def test_a_refusal_names_a_budget_that_works(seed: int) -> None:
    """With the limit, not without it."""
    limited = replace(small(seed), budget_bytes=1, away_limit_bytes=20)
    _, refusal = answer(limited)
    assert refusal is not None
    found, _ = answer(limited.with_budget(refusal.smallest_found_bytes))
    assert found is not None
    assert replay(limited.with_budget(refusal.smallest_found_bytes), found.schedule).away_bytes <= 20


@pytest.mark.parametrize("seed", range(60))
def test_no_answer_is_above_the_limit(seed: int) -> None:
    """From nothing to all that an answer without a limit sends away: kept, and no faster than it. Refused only where something is in the way."""
    problem = small(seed)
    free, _ = answer(problem)
    if free is None:
        return
    assert free.report.away_bytes == sum(problem.storages[s].size_bytes for s in away_set(problem, free.schedule))
    for share in LIMITS:
        limited = replace(problem, away_limit_bytes=int(share * free.report.away_bytes))
        found, refusal = answer(limited)
        if found is None:
            assert share < 1.0
            assert refusal is not None
            assert refusal.lower_bound_bytes <= problem.budget_bytes < refusal.smallest_found_bytes
            continue
        report = replay(limited, found.schedule)
        assert sum(problem.storages[s].size_bytes for s in away_set(problem, found.schedule)) == report.away_bytes <= limited.away_limit_bytes
        assert report.time_us >= found.bound_us
        if share == 1.0:
            assert report.time_us <= free.report.time_us


def test_less_room_outside_never_gains() -> None:
    """A step that sends its activations away: with less room for them it recomputes, and with none it moves nothing."""
    problem = layered(3)
    problem = problem.with_budget(smallest(replace(problem, can_offload=False))[0])
    times = {}
    for limit in (10**6, 400, 0):
        found = solve(replace(problem, away_limit_bytes=limit), "fast")
        times[limit] = (found.report.time_us, found.report.offloads)
        assert found.report.away_bytes <= limit
    assert times[10**6][1] > 0 == times[0][1]
    assert times[10**6][0] <= times[400][0] <= times[0][0]


def test_every_effort_keeps_it() -> None:
    """The global model and the search as well; the bound is that without a limit."""
    problem = transformer(1, 32, 64, adam=False)
    problem = problem.with_budget(int(0.9 * replay(problem, keep_all(problem), False).peak_bytes))
    free = solve(problem, "fast")
    limited = replace(problem, away_limit_bytes=free.report.away_bytes // 2)
    found = solve(limited, "balanced", time_limit_s=2.0)
    assert replay(limited, found.schedule).away_bytes <= limited.away_limit_bytes
    assert found.bound_us <= found.report.time_us


def test_the_checker_says_what_is_above_it() -> None:
    """The rule has a name, and holds only where limits are enforced."""
    problem = next(problem for problem in map(small, range(100)) if away_bytes(problem) > 0)
    schedule = solve(problem, "fast").schedule
    limited = replace(problem, away_limit_bytes=away_bytes(problem) - 1)
    with pytest.raises(ScheduleError) as caught:
        replay(limited, schedule)
    assert caught.value.rule == "over-away-limit"
    assert replay(limited, schedule, enforce_budget=False).away_bytes == away_bytes(problem)


def away_bytes(problem: Problem) -> int:
    found, _ = answer(problem)
    return found.report.away_bytes if found else 0


def test_the_limit_is_part_of_the_file() -> None:
    """It goes through JSON, files without it have none, and one that is no number of bytes is refused."""
    problem = replace(small(1), away_limit_bytes=12)
    assert Problem.from_json(problem.to_json()) == problem
    assert Problem.from_json(problem.to_json().replace(',"away_limit_bytes":12', "")).away_limit_bytes is None
    with pytest.raises(ProblemError, match="away_limit_bytes"):
        replace(problem, away_limit_bytes=-1).validate()
