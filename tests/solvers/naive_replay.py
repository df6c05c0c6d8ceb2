"""A second replay in another style, to compare solvers.check with: every question is answered from the list of past
steps alone. Quadratic, no state but the log. Says only whether a schedule is valid, and what it costs."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from solvers.problem import Problem
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait


class Broken(Exception):
    """The schedule is not valid."""


def demand(condition: bool) -> None:
    if not condition:
        raise Broken


def expected_version(problem: Problem, storage: int, op: int) -> int:
    """Version before base op `op`: counts the creations and writes of earlier ops."""
    return sum((storage in o.creates) + (storage in o.writes) for o in problem.ops[:op])


class Log:
    """Questions about the past of a schedule."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem, self.resident, self.past = problem, schedule.resident, list[Step]()
        self.known: dict[tuple[int, int], int | None] = {}

    def at_home(self, s: int) -> bool:
        info = self.problem.storages[s]
        return info.persistent and (not info.movable or s in self.resident)

    def memory(self, s: int, until: int | None = None) -> int | None:
        """Version in memory after the first `until` steps (None: all), or None. Looks one step back at a time."""
        until = len(self.past) if until is None else until
        if (s, until) not in self.known:
            self.known[s, until] = self._memory(s, until)
        return self.known[s, until]

    def _memory(self, s: int, until: int) -> int | None:
        if until == 0:
            return 0 if self.at_home(s) else None
        step, before = self.past[until - 1], self.memory(s, until - 1)
        if step == Free(s):
            return None
        if step == Prefetch(s):
            return self.disk(s, until - 1)
        if isinstance(step, Run) and before is None:
            return 1 if s in self.problem.ops[step.op].creates else None
        if isinstance(step, Run) and before is not None:
            return before + (s in self.problem.ops[step.op].writes)
        return before

    def disk(self, s: int, until: int) -> int | None:
        """Version on disk after the first `until` steps, or None: decided by the last write to disk that began."""
        began = [k for k in range(until) if self.past[k] == Offload(s)]
        if not began:
            info = self.problem.storages[s]
            return 0 if info.stored or (info.persistent and not self.at_home(s)) else None
        done = [k for k in range(began[-1], until) if self.past[k] == Wait(s)]
        return self.memory(s, done[0]) if done else None

    def pending(self, s: int) -> Step | None:
        """The transfer of the storage that nobody has waited for."""
        last = [step for step in self.past if step in (Offload(s), Prefetch(s), Wait(s))][-1:]
        return None if not last or isinstance(last[0], Wait) else last[0]

    def live_bytes(self) -> int:
        sizes = ((s, info.size_bytes) for s, info in enumerate(self.problem.storages))
        return self.problem.constant_bytes + sum(size for s, size in sizes if self.memory(s) is not None)

    def count(self, op: int) -> int:
        return sum(isinstance(step, Run) and step.op == op for step in self.past)


def check_run(log: Log, step: Run) -> int:
    """Demand all rules of a run; returns the bytes live during it."""
    problem = log.problem
    demand(0 <= step.op < len(problem.ops))
    op = problem.ops[step.op]
    demand(0 <= step.choice < len(op.choices))
    if log.count(step.op):
        demand(op.rerunnable and (bool(op.writes) or any(log.memory(s) is None for s in op.creates)))
    elif op.rng:
        demand(not any(log.count(k) for k in range(step.op + 1, len(problem.ops)) if problem.ops[k].rng))
    for s in (*op.choices[step.choice].reads, *op.writes):
        demand(log.memory(s) == expected_version(problem, s, step.op) and log.pending(s) != Prefetch(s))
    demand(all(log.pending(s) is None for s in op.writes))
    demand(all(log.pending(s) != Prefetch(s) for s in op.creates))
    made = sum(problem.storages[s].size_bytes for s in op.creates)
    return log.live_bytes() + made + op.choices[step.choice].workspace_bytes


def check_transfer(log: Log, step: Free | Offload | Prefetch | Wait) -> None:
    s = step.storage
    demand(0 <= s < len(log.problem.storages))
    info, live, pending = log.problem.storages[s], log.memory(s) is not None, log.pending(s)
    if isinstance(step, Free):
        demand(live and pending is None and (info.movable or not info.persistent))
    elif isinstance(step, Offload):
        demand(live and pending is None and info.movable and log.problem.can_offload and not info.stored)
    elif isinstance(step, Prefetch):
        demand(not live and log.disk(s, len(log.past)) is not None)
    else:
        demand(pending is not None)


def time_us(problem: Problem, schedule: Schedule) -> int:
    """The two clocks, from the steps alone."""
    compute, disk, done = 0, 0, dict[int, int]()
    for step in schedule.steps:
        if isinstance(step, Run):
            compute += problem.ops[step.op].choices[step.choice].time_us
        elif isinstance(step, Offload | Prefetch):
            speed = problem.write_bytes_per_us if isinstance(step, Offload) else problem.read_bytes_per_us
            duration = ceil(problem.storages[step.storage].size_bytes / Fraction(speed))
            duration += problem.latency_us
            disk = max(disk, compute) + duration
            compute += int(problem.interference * duration)
            done[step.storage] = disk
        elif isinstance(step, Wait):
            compute = max(compute, done[step.storage])
    return compute


def naive_replay(problem: Problem, schedule: Schedule) -> tuple[int, int]:
    """(peak bytes, microseconds); raises Broken. No limit of bytes is enforced."""
    demand(all(0 <= s < len(problem.storages) and problem.storages[s].persistent for s in schedule.resident))
    log = Log(problem, schedule)
    peak = log.live_bytes()
    for step in schedule.steps:
        if isinstance(step, Run):
            peak = max(peak, check_run(log, step))
        else:
            check_transfer(log, step)
        log.past.append(step)
        peak = max(peak, log.live_bytes())
    demand(all(log.count(k) or op.optional for k, op in enumerate(problem.ops)))
    for s, info in enumerate(problem.storages):
        final = expected_version(problem, s, len(problem.ops))
        demand(log.pending(s) is None)
        demand(log.memory(s) == (final if info.output or log.at_home(s) else None))
        demand(not info.persistent or log.at_home(s) or log.disk(s, len(log.past)) == final)
    return peak, time_us(problem, schedule)
