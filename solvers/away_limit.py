"""A limit on what lies outside of memory: an accelerator's storages go to host memory, which is small too.

Each storage that is at home there or ever moves has a place of its own in it (`Report.away_bytes`), so the limit is a knapsack over
storages. The step is first planned as if there were no limit; of the storages that this plan sends away those stay movable that spend the most
of the step away for what their transfers take, as far as they fit, and then any others that fit. A plan of what is left keeps the limit
whatever it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from solvers.check import replay
from solvers.decode import Tables
from solvers.problem import Problem
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule


def without_limit(problem: Problem) -> Problem:
    """The problem as if everything might lie outside of memory at once: its bounds hold for the limited one."""
    return replace(problem, away_limit_bytes=None)


def within_limit(problem: Problem, schedule: Schedule) -> bool:
    """Whether a schedule of the problem without its limit keeps it."""
    assert problem.away_limit_bytes is not None
    return replay(without_limit(problem), schedule, enforce_budget=False).away_bytes <= problem.away_limit_bytes


def fewer_movable(problem: Problem, schedule: Schedule) -> Problem:
    """The problem without its limit, in which only so much is movable that no schedule exceeds it; `schedule` says what is best away."""
    worth = _worth(problem, schedule)
    order = sorted((s for s, info in enumerate(problem.storages) if info.movable), key=lambda s: (-worth.get(s, 0.0), s))
    kept = _as_fit(problem, order)
    return without_limit(problem).moving_only(kept)


def _as_fit(problem: Problem, order: Iterable[int]) -> Collection[int]:
    left, kept = problem.away_limit_bytes or 0, set[int]()
    for storage in order:
        if problem.storages[storage].size_bytes <= left:
            left -= problem.storages[storage].size_bytes
            kept.add(storage)
    return kept


def _worth(problem: Problem, schedule: Schedule) -> dict[int, float]:
    """For each storage that the schedule sends away: microseconds of compute during which it is not in memory, for each microsecond of its
    transfers."""
    tables, clock, moved, away_us = Tables(problem), 0, Counter[int](), Counter[int]()
    home = {s for s, info in enumerate(problem.storages) if info.persistent and info.movable and s not in schedule.resident}
    left = dict.fromkeys(home, 0)  # storage -> when it left memory
    gone = set(home)  # what has a copy outside of memory
    for step in schedule.steps:
        if isinstance(step, Run):
            clock += problem.ops[step.op].choices[step.choice].time_us
        elif isinstance(step, Offload):
            gone.add(step.storage)
            moved[step.storage] += tables.write_us[step.storage]
        elif isinstance(step, Prefetch):
            gone.add(step.storage)
            away_us[step.storage] += clock - left.pop(step.storage, clock)
            moved[step.storage] += tables.read_us[step.storage]
        elif isinstance(step, Free) and (step.storage in gone or problem.storages[step.storage].stored):
            left[step.storage] = clock
    for storage in home & left.keys():
        away_us[storage] += clock - left[storage]
    return {storage: away_us[storage] / (moved[storage] + 1) for storage in gone}
