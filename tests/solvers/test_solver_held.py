"""solvers.held: large persistent storages that stay in memory where the disk decides."""

import time
from dataclasses import replace

import pytest

from solvers.bounding import Bounds
from solvers.check import replay
from solvers.course import Best, Course
from solvers.decode import Tables
from solvers.held import with_held
from solvers.problem import Choice, Op, Problem, Storage
from solvers.schedule import Offload, Prefetch
from solvers.solve import _offer_greedy, solve


def streamed(table_bytes: int, budget_bytes: int) -> Problem:
    """Twelve weights of 100 bytes and a table, which the forward reads and the backward updates from the last to the first: the disk takes longer
    than all ops."""
    sizes = [100] * 12 + [table_bytes]
    storages = [Storage(f"w{k}", size, persistent=True) for k, size in enumerate(sizes)] + [Storage("x", 1), Storage("g", 1)]
    ops = [Op("x", (Choice((), time_us=1),), (13,)), *(Op(f"f{k}", (Choice((k, 13), time_us=50),)) for k in range(13))]
    ops.append(Op("g", (Choice((13,), time_us=1),), (14,), phase="backward"))
    for k in reversed(range(13)):
        ops.append(Op(f"u{k}", (Choice((14,), time_us=50),), (), (k,), phase="update"))
    return Problem(tuple(ops), tuple(storages), budget_bytes, read_bytes_per_us=1.0, write_bytes_per_us=0.5, latency_us=0)


def course_of(problem: Problem, seconds: float = 100.0) -> Course:
    course = Course(Tables(problem), Best(problem), time.monotonic() + seconds, 0, None, Bounds(0, 0), True)
    _offer_greedy(course)
    return course


@pytest.mark.parametrize("budget_bytes", [520, 620, 820])
def test_what_is_held_makes_the_step_faster_and_never_moves(budget_bytes: int) -> None:
    """The schedule is one of the problem as it was; nothing is lost where nothing is held."""
    problem = streamed(300, budget_bytes)
    course = course_of(problem)
    assert course.best.report is not None
    held = with_held(course, _offer_greedy)
    assert held.best.report is not None
    assert held.best.schedule is not None
    assert replay(problem, held.best.schedule) == held.best.report
    if held is course:
        return
    assert held.best.report.time_us < course.best.report.time_us
    assert set() < held.best.held <= held.best.schedule.resident
    assert not any(isinstance(step, (Offload, Prefetch)) and step.storage in held.best.held for step in held.best.schedule.steps)


def test_something_is_held() -> None:
    """The greedy paths send away in some of these budgets what does best to stay."""
    assert sum(bool(with_held(course_of(streamed(300, budget)), _offer_greedy).best.held) for budget in range(520, 900, 100)) >= 2


def test_what_is_small_or_may_not_move_is_not_tried_and_no_time_is_no_trial() -> None:
    problem = streamed(300, 820)
    fixed = replace(problem, storages=tuple(replace(s, movable=s.size_bytes < 100) for s in problem.storages))
    for course in (course_of(streamed(300, 2500)), course_of(fixed)):
        assert with_held(course, lambda trial: pytest.fail("tried")) is course
    late = course_of(problem, -1.0)
    assert with_held(late, lambda trial: pytest.fail("tried")) is late


def test_solve_offers_what_was_held() -> None:
    problem = streamed(300, 620)
    assert solve(problem, "balanced", time_limit_s=6.0).report.time_us <= solve(problem, "fast").report.time_us
