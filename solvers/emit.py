"""Trace -> memory profile, and trace -> steps. Where its transfers go is said by `synchronous` or by transfers.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.decode import READ, RUN, Decisions, Tables, Trace
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait

Ints = NDArray[np.int64]
Moves = dict[int, list[Step]]  # event -> steps of transfers that stand before it, in order
PREFETCH, OFFLOAD, RELEASE = 0, 1, 2  # a transfer asked for, or waited for and its memory freed
Transfer = tuple[int, int, int]  # (event before which it stands, which of these, storage)


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


def moves_of(transfers: Iterable[Transfer]) -> Moves:
    """As steps."""
    moves: Moves = {}
    for event, what, storage in transfers:
        freed: list[Step] = [Wait(storage), Free(storage)]
        moves.setdefault(event, []).extend([Prefetch(storage)] if what == PREFETCH else [Offload(storage)] if what == OFFLOAD else freed)
    return moves


def synchronous(trace: Trace) -> Moves:
    """Every transfer waits at once: least memory."""
    moves: Moves = {event: [Prefetch(trace.subject[event])] for event, kind in enumerate(trace.kind) if kind == READ}
    for i in trace.writes:
        storage = trace.inst_storage[i]
        moves.setdefault(trace.inst_last[i] + 1, [])[:0] = [Offload(storage), Wait(storage), Free(storage)]
    return moves


def run_times(tables: Tables, decisions: Decisions, trace: Trace) -> list[int]:
    """Compute time of each event; 0 for reads."""
    ops = tables.problem.ops
    return [
        ops[subject].choices[decisions.choice[subject]].time_us if kind == RUN else 0
        for kind, subject in zip(trace.kind, trace.subject, strict=True)
    ]


def emit(tables: Tables, decisions: Decisions, trace: Trace, moves: Moves) -> Schedule:
    """The steps of the trace, and its transfers before the events at which `moves` has them."""
    count, written = len(trace.kind), set(trace.writes)
    after: list[list[Step]] = [[] for _ in range(count + 1)]  # after[-1]: before event 0
    for i, storage in enumerate(trace.inst_storage):
        if i not in written and trace.inst_last[i] < count:
            after[trace.inst_last[i]].append(Free(storage))
    _emit_extra(trace, after)
    steps: list[Step] = list(after[count])
    for event in range(count):
        steps += moves.get(event, ())
        subject = trace.subject[event]
        steps.append(Wait(subject) if trace.kind[event] == READ else Run(subject, decisions.choice[subject]))
        steps += after[event]
    steps += moves.get(count, ())
    persistent = (s for s, info in enumerate(tables.problem.storages) if info.persistent and info.movable)
    return Schedule(tuple(steps), frozenset(s for s in persistent if s not in decisions.away))


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
