"""Scheduling of training steps under a hard memory budget. Knows ops, bytes and microseconds, not tensors.

`solve` answers, `check.replay` is the truth about an answer, `place` lays the storages out in one arena.
"""

from solvers.check import Report, ScheduleError, replay
from solvers.problem import Choice, Op, Problem, ProblemError, Storage
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait
from solvers.solve import Infeasible, Solution, smallest, solve

__all__ = [
    "Choice",
    "Free",
    "Infeasible",
    "Offload",
    "Op",
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
    "replay",
    "smallest",
    "solve",
]
