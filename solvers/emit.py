"""Trace -> memory profile, and trace -> steps with transfers that overlap the compute where memory allows.

Times here are estimates that place the transfers; `check.replay` says what the schedule really costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.decode import READ, RUN, Decisions, Tables, Trace
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes live in every event (constant, workspace and discarded copies included), their peak, and time.

    With synchronous transfers a step takes compute_us + transfer_us; what transfers overlap makes it shorter.
    """

    live_bytes: Ints
    peak_bytes: int
    compute_us: int
    transfer_us: int

    @property
    def time_us(self) -> int:
        """Microseconds of the step with synchronous transfers."""
        return self.compute_us + self.transfer_us


def profile(tables: Tables, decisions: Decisions, trace: Trace) -> Profile:
    """What the trace occupies and costs with every transfer done synchronously: equal to the replay of `emit`."""
    problem, size, count = tables.problem, tables.size, len(trace.kind)
    change = np.zeros(count + 2, dtype=np.int64)
    sizes = np.array([size[s] for s in trace.inst_storage], dtype=np.int64)
    births = np.array(trace.inst_birth, dtype=np.int64)
    lasts = np.array(trace.inst_last, dtype=np.int64)
    np.add.at(change, np.maximum(births, 0), sizes)
    np.add.at(change, lasts + 1, -sizes)
    live = np.cumsum(change)[:count] + problem.constant_bytes
    compute_us = transfer_us = 0
    for event, (kind, subject) in enumerate(zip(trace.kind, trace.subject, strict=True)):
        if kind == RUN:
            choice = problem.ops[subject].choices[decisions.choice[subject]]
            live[event] += choice.workspace_bytes
            compute_us += choice.time_us
        else:
            transfer_us += tables.read_us[subject]
    for event, storage in trace.extra:
        live[event] += size[storage]
    transfer_us += sum(tables.write_us[trace.inst_storage[i]] for i in trace.writes)
    start = int(sizes[births < 0].sum()) + problem.constant_bytes
    return Profile(live, max(start, int(live.max(initial=start))), compute_us, transfer_us)


@dataclass(slots=True)
class Transfers:
    """Where transfers go. issue: read event -> event before which its Prefetch stands. For written instances:
    offload[i], release[i]: event after which Offload, and Wait + Free, stand."""

    issue: dict[int, int]
    offload: dict[int, int]
    release: dict[int, int]


def synchronous(trace: Trace) -> Transfers:
    """Every transfer waits at once: least memory."""
    reads = {event: event for event, kind in enumerate(trace.kind) if kind == READ}
    last = {i: trace.inst_last[i] for i in trace.writes}
    return Transfers(reads, last, dict(last))


def overlapped(tables: Tables, decisions: Decisions, trace: Trace, live: Ints, margin: float) -> Transfers:
    """Writes start when the data are complete and end when they must; reads start early enough, where memory allows.

    margin: read durations are stretched by it, which leaves room for the writes in the same stream.
    """
    slack = tables.problem.budget_bytes - live
    clock = _clock(tables, decisions, trace)
    result = synchronous(trace)
    _place_writes(tables, trace, clock, slack, result)
    _place_reads(tables, trace, clock, slack, result, margin)
    return result


def _clock(tables: Tables, decisions: Decisions, trace: Trace) -> Ints:
    """Compute time before each event, and at the end, without stalls."""
    ops = tables.problem.ops
    times = [
        ops[subject].choices[decisions.choice[subject]].time_us if kind == RUN else 0
        for kind, subject in zip(trace.kind, trace.subject, strict=True)
    ]
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(times, dtype=np.int64))])


def _next_births(trace: Trace) -> dict[int, int]:
    """For every written instance the event in which the next instance of its storage begins."""
    following: dict[int, int] = {}
    result = {}
    written = set(trace.writes)
    for i in range(len(trace.inst_storage) - 1, -1, -1):
        storage = trace.inst_storage[i]
        if i in written:
            result[i] = following.get(storage, len(trace.kind))
        following[storage] = trace.inst_birth[i]
    return result


def _place_writes(tables: Tables, trace: Trace, clock: Ints, slack: Ints, result: Transfers) -> None:
    """Offload right after the last change; release when the write is probably complete, or when memory is needed."""
    following = _next_births(trace)
    disk_clock = 0.0
    for i in sorted(trace.writes, key=lambda i: trace.inst_ready[i]):
        size, last = tables.size[trace.inst_storage[i]], trace.inst_last[i]
        result.offload[i] = trace.inst_ready[i]
        disk_clock = max(disk_clock, float(clock[trace.inst_ready[i] + 1])) + tables.write_us[trace.inst_storage[i]]
        release = int(np.searchsorted(clock, disk_clock, side="left")) - 1
        release = max(last, min(release, following[i] - 1, len(trace.kind) - 1))
        blocked = np.flatnonzero(slack[last + 1 : release + 1] < size)
        if len(blocked):
            release = last + int(blocked[0])
        slack[last + 1 : release + 1] -= size
        result.release[i] = release


def _place_reads(tables: Tables, trace: Trace, clock: Ints, slack: Ints, result: Transfers, margin: float) -> None:
    """From the last read to the first: start so that it is complete in time, but not before memory allows."""
    earliest = _earliest_issues(trace, result)
    free_until = float(clock[-1])
    for event in sorted(result.issue, reverse=True):
        storage = trace.subject[event]
        start = min(float(clock[event]), free_until) - margin * tables.read_us[storage]
        issue = max(int(np.searchsorted(clock, start, side="right")) - 1, earliest[event], 0)
        issue = min(issue, event)
        blocked = np.flatnonzero(slack[issue:event] < tables.size[storage])
        if len(blocked):
            issue += int(blocked[-1]) + 1
        slack[issue:event] -= tables.size[storage]
        result.issue[event] = issue
        free_until = max(start, float(clock[issue]) - margin * tables.read_us[storage])


def _earliest_issues(trace: Trace, result: Transfers) -> dict[int, int]:
    """For every read event the first event before which its Prefetch may stand: after the previous instance."""
    previous: dict[int, int] = {}
    earliest = {}
    for i, storage in enumerate(trace.inst_storage):
        birth = trace.inst_birth[i]
        if birth in result.issue and trace.subject[birth] == storage:
            earliest[birth] = previous.get(storage, -1) + 1
        previous[storage] = result.release.get(i, trace.inst_last[i])
    for event, storage in trace.extra:
        for birth in earliest:
            if trace.subject[birth] == storage and event < birth:
                earliest[birth] = max(earliest[birth], event + 1)
    return earliest


def emit(tables: Tables, decisions: Decisions, trace: Trace, transfers: Transfers) -> Schedule:
    """The steps of the trace."""
    count = len(trace.kind)
    before: list[list[Step]] = [[] for _ in range(count + 1)]
    after: list[list[Step]] = [[] for _ in range(count + 1)]
    _emit_ends(trace, transfers, after)
    _emit_extra(trace, after)
    for event, issue in sorted(transfers.issue.items()):
        before[issue].append(Prefetch(trace.subject[event]))
    steps: list[Step] = list(after[count])
    for event in range(count):
        steps += before[event]
        subject = trace.subject[event]
        steps.append(Wait(subject) if trace.kind[event] == READ else Run(subject, decisions.choice[subject]))
        steps += after[event]
    persistent = (s for s, info in enumerate(tables.problem.storages) if info.persistent and info.movable)
    return Schedule(tuple(steps), frozenset(s for s in persistent if s not in decisions.away))


def _emit_ends(trace: Trace, transfers: Transfers, after: list[list[Step]]) -> None:
    """Free every instance after its last event; written ones are offloaded first. after[-1]: before event 0."""
    count = len(trace.kind)
    for i, storage in enumerate(trace.inst_storage):
        last = trace.inst_last[i]
        if i in transfers.release:
            after[transfers.offload[i]].append(Offload(storage))
            after[transfers.release[i]] += [Wait(storage), Free(storage)]
        elif last < count:
            after[last].append(Free(storage))


def _emit_extra(trace: Trace, after: list[list[Step]]) -> None:
    """A rerun's unwanted output is discarded at once by the machine where the old copy is live, else freed here."""
    spans: dict[int, list[tuple[int, int]]] = {}
    wanted = {storage for _, storage in trace.extra}
    for i, storage in enumerate(trace.inst_storage):
        if storage in wanted:
            spans.setdefault(storage, []).append((trace.inst_birth[i], trace.inst_last[i]))
    for event, storage in trace.extra:
        if not any(birth <= event <= last for birth, last in spans[storage]):
            after[event].append(Free(storage))
