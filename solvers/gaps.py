"""Gaps: stretches of a trace between two uses of a storage, each of which its value spends in memory or on disk.

What decides anew what goes to disk, with the runs of a state as they are, decides about these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from solvers.decode import RUN, Decisions, Tables, Trace
from solvers.emit import Ints
from solvers.evict import State

TINY_SHARE = 1 / 2000  # of the budget: what is no larger stays as it is


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two uses of a storage: events a and b (-1: the start, count: the end); change: the event at which its value began (-1: the start)."""

    storage: int
    a: int
    b: int
    change: int


def movable_gaps(tables: Tables, state: State, tiny_bytes: int) -> dict[int, list[Gap]]:
    """For each storage that may be on disk, and that the trace doesn't make twice, its gaps in order."""
    trace, storages = state.trace, tables.problem.storages
    uses: dict[int, set[int]] = {}
    again = set(_made_twice(state))
    for i, a, b in zip(trace.seg_instance, trace.seg_start, trace.seg_end, strict=True):
        uses.setdefault(trace.inst_storage[i], set()).update((a, b))
    for i, s in enumerate(trace.inst_storage):
        uses.setdefault(s, set()).add(trace.inst_birth[i])
    result = {}
    for s, events in sorted(uses.items()):
        info = storages[s]
        if s in again or info.output or info.size_bytes <= tiny_bytes or not (tables.may_spill[s] or info.stored):
            continue
        at = sorted(e for e in events if 0 <= e < len(trace.kind) and trace.kind[e] == RUN)
        if info.persistent:
            at = [-1, *at, len(trace.kind)]
        if len(at) > 1:
            result[s] = _gaps(tables, state, s, at)
    return result


def _made_twice(state: State) -> Iterable[int]:
    trace, seen = state.trace, set[int]()
    for s, birth in zip(trace.inst_storage, trace.inst_birth, strict=True):
        if birth < 0 or trace.kind[birth] == RUN:
            if s in seen:
                yield s
            seen.add(s)
    yield from (s for _, s in trace.extra)


def _gaps(tables: Tables, state: State, s: int, at: list[int]) -> list[Gap]:
    change, result, ops = at[0], [], tables.problem.ops
    for a, b in itertools.pairwise(at):
        if a >= 0 and s in ops[state.trace.subject[a]].writes:
            change = a
        result.append(Gap(s, a, b, change))
    return result


def group_of(tables: Tables, trace: Trace, event: int) -> int:
    """The op that an event serves; -1 for the start, the number of ops for the end."""
    return -1 if event < 0 else len(tables.reads) if event >= len(trace.kind) else trace.group[event]


def in_one_group(tables: Tables, trace: Trace, gap: Gap) -> bool:
    """Both uses serve the same op: no decision lies between them."""
    return group_of(tables, trace, gap.a) == group_of(tables, trace, gap.b)


def beside_gaps(tables: Tables, state: State, gaps: Mapping[int, Sequence[Gap]]) -> tuple[Ints, set[int]]:
    """At each event the bytes of what it uses and of all that has no gaps; and the events that use a gap's storage."""
    trace, fixed = state.trace, state.profile.live_bytes.copy()
    for i, s in enumerate(trace.inst_storage):
        if s in gaps:
            fixed[max(0, trace.inst_birth[i]) : trace.inst_last[i] + 1] -= tables.size[s]
    using = set[int]()
    for s, of_storage in gaps.items():
        events = {e for gap in of_storage for e in (gap.a, gap.b) if 0 <= e < len(trace.kind)}
        fixed[list(events)] += tables.size[s]
        using |= events
    return fixed, using


def with_gaps(tables: Tables, state: State, gaps: Mapping[int, Sequence[Gap]], stays: Callable[[Gap], bool], home: Collection[int]) -> Decisions:
    """The state's decisions with others about its gaps: those in which a storage stays in memory, and the persistent ones at home there."""
    result, end = state.decisions.copy(), len(state.trace.kind)
    for s, of_storage in gaps.items():
        result.cuts.pop(s, None)
        result.spilled.discard(s)
        persistent = tables.problem.storages[s].persistent
        if persistent:
            (result.away.discard if s in home else result.away.add)(s)
        for gap in of_storage:
            if gap.b < end and not stays(gap) and (gap.a >= 0 or s not in result.away):
                result.cut(s, group_of(tables, state.trace, gap.b))
                if not persistent:
                    result.spilled.add(s)
    return result
