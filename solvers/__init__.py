"""Scheduling of training steps under a hard memory budget. Knows ops, bytes and microseconds, not tensors.

`solve` answers, `check.replay` is the truth about an answer, `place` lays the storages out in one arena,
`fit_arena` moves transfers until they fit there.
"""

from solvers.check import Report, ScheduleError, replay
from solvers.fitting import Fitted, fit_arena
from solvers.offsets import Lifespan, OffsetError, Placement, check_offsets, lifespans, place
from solvers.problem import Choice, Op, Problem, ProblemError, Storage
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait
from solvers.solve import Infeasible, Solution, smallest, solve

__all__ = [
    "Choice",
    "Fitted",
    "Free",
    "Infeasible",
    "Lifespan",
    "Offload",
    "OffsetError",
    "Op",
    "Placement",
    "Prefetch",
    "Problem",
    "ProblemError",
    "Report",
    "Run",
    "Schedule",
    "ScheduleError",
    "Solution",
    "Step",
    "Storage",
    "Wait",
    "check_offsets",
    "fit_arena",
    "lifespans",
    "place",
    "replay",
    "smallest",
    "solve",
]
