"""A schedule's steps -> its trace, as decoding would have left it: what transfers need to be placed anew, whoever made the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from solvers.decode import READ, RUN, Decisions, Tables, Trace
from solvers.emit import profile
from solvers.evict import State
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait


@dataclass(slots=True)
class Retraced:
    """The trace has neither groups nor segments: nothing can be evicted from it. asked: of each instance the event before which the schedule has it
    in memory, a read from when it is asked for; freed: the event before which its memory is free again."""

    trace: Trace = field(default_factory=Trace)
    asked: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)

    def born(self, storage: int, birth: int, event: int) -> int:
        """A new instance."""
        trace = self.trace
        for column, value in zip(
            (trace.inst_storage, trace.inst_birth, trace.inst_last, trace.inst_ready, self.asked, self.freed),
            (storage, birth, birth, birth, event, event), strict=True,
        ):  # fmt: skip
            column.append(value)
        return len(self.asked) - 1


def retraced(tables: Tables, schedule: Schedule) -> tuple[State, Retraced] | None:
    """The state whose schedule, with the same transfers at the same events, is this one. The schedule is valid. None where an op runs in two ways, or
    a storage is written and changed again, or written and kept to the end: solvers here make no such schedules."""
    problem, found = tables.problem, Retraced()
    trace, ways = found.trace, dict[int, int]()
    live = {s: found.born(s, -1, 0) for s in schedule.at_start(problem)}
    reading: set[int] = set()
    written: set[int] = set()
    for step in schedule.steps:
        event = len(trace.kind)
        if isinstance(step, Run):
            if ways.setdefault(step.op, step.choice) != step.choice or not written.isdisjoint(live[s] for s in problem.ops[step.op].writes):
                return None
            _run(tables, found, live, step)
        elif isinstance(step, Prefetch):
            live[step.storage] = found.born(step.storage, -1, event)
            reading.add(step.storage)
        elif isinstance(step, Offload):
            written.add(live[step.storage])
        elif isinstance(step, Wait) and step.storage in reading:
            reading.remove(step.storage)
            i = live[step.storage]
            trace.inst_birth[i] = trace.inst_last[i] = trace.inst_ready[i] = event
            _event(trace, READ, step.storage)
        elif isinstance(step, Free):
            found.freed[live.pop(step.storage)] = event
    for i in live.values():
        trace.inst_last[i] = found.freed[i] = len(trace.kind)
    if reading or not written.isdisjoint(live.values()):
        return None
    trace.writes = sorted(written)
    away = {s for s, may in enumerate(tables.may_leave) if may} - schedule.resident
    decisions = Decisions([ways.get(op, 0) for op in range(len(problem.ops))], away=away)
    return State(decisions, trace, profile(tables, decisions, trace)), found


def _event(trace: Trace, kind: int, subject: int) -> None:
    trace.kind.append(kind)
    trace.subject.append(subject)


def _run(tables: Tables, found: Retraced, live: dict[int, int], step: Run) -> None:
    """What an op reads, changes and makes."""
    trace, op = found.trace, tables.problem.ops[step.op]
    event = len(trace.kind)
    for s in (*op.choices[step.choice].reads, *op.writes):
        trace.inst_last[live[s]] = event
    for s in op.writes:
        trace.inst_ready[live[s]] = event
    for s in op.creates:
        if s in live:
            trace.extra.append((event, s))
        else:
            live[s] = found.born(s, event, event)
    _event(trace, RUN, step.op)
