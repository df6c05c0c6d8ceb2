"""What stays in memory for the whole step, where the disk decides how long it takes.

A large persistent storage that never leaves is neither written nor read. Greedy paths go down from keep-all and send away first what is large, and
a plan for the disk keeps the runs of such a path; so each large one is held in turn, and stays held where the greedy paths of the rest end sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from solvers.course import Best, Course
from solvers.decode import Tables
from solvers.problem import Problem

LARGE = 1 / 8  # of the budget
MOST = 8  # storages
TIME_SHARE = 0.3  # of the time left


def with_held(course: Course, walk: Callable[[Course], object]) -> Course:
    """The course of the problem in which the storages that are best held don't move, after `walk` (its greedy paths); the course itself where
    none is. What it offers are schedules of the problem as it was."""
    problem, began = course.tables.problem, time.monotonic()
    until = began + TIME_SHARE * (course.deadline - began)
    held = course
    for storage in _large(problem):
        if time.monotonic() > until:
            break
        trial = _holding(course, held.best.held | {storage})
        walk(trial)
        if trial.best.report is not None and (held.best.report is None or trial.best.report.time_us < held.best.report.time_us):
            held = trial
            held.tell(f"held {', '.join(problem.storages[s].name for s in sorted(held.best.held))}")
    return held


def _large(problem: Problem) -> list[int]:
    """Persistent storages that may move, those of the most bytes first."""
    least = LARGE * problem.budget_bytes
    large = [s for s, info in enumerate(problem.storages) if info.persistent and info.movable and info.size_bytes >= least]
    return sorted(large, key=lambda s: (-problem.storages[s].size_bytes, s))[:MOST]


def _holding(course: Course, held: frozenset[int]) -> Course:
    problem = course.tables.problem
    tables, best = Tables(problem.moving_only(set(range(len(problem.storages))) - held)), Best(problem, held)
    return Course(tables, best, course.deadline, course.seed, course.progress, course.bounds, course.modelled)
