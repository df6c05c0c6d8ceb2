"""Groups of like decisions taken back together, and what they are then in the way of evicted.

Each eviction of a greedy path is the cheapest at its time, and refilling takes one back only where its bytes are free. Where everything is on the
verge no single one helps: a recompute in each of 24 layers may cost more than the spill that would spare it, but only all 24 together lower the peak
of the step. What equal layers decide alike is therefore taken back in all of them, the greedy path's own evictions make room again, and both clocks
judge; then the halves of groups that didn't help are tried. What was taken back isn't evicted again, unless nothing else makes room: the path took it
because it was the cheapest for each byte, which says nothing of all its bytes.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque

from solvers.bounds import alone_bytes, always_live, bytes_of
from solvers.decode import Tables
from solvers.evict import State
from solvers.greedy import repaired
from solvers.improve import Undo, placed_us, trials_of, undos

LEAST_SHARE = 1e-4  # of the step's time: groups that together would save less are left
PATIENCE = 10
NUMBERS = re.compile(r"\d+")


def exchanged(tables: Tables, state: State, weight: float, deadline: float = math.inf) -> State:
    """The state, with groups of decisions taken back and others made in their place where that makes the step shorter; ends at the deadline
    (time.monotonic), or without one after a number of trials, or of trials in a row that gain nothing. weight: of transfers. The state fits the
    budget."""
    judge = placed_us(tables)
    least, groups = judge(state), deque(_groups(tables, state, weight))
    trials, idle = trials_of(tables), 0
    while groups and (time.monotonic() < deadline if deadline < math.inf else trials > 0 and idle < PATIENCE):
        trials, idle, group = trials - 1, idle + 1, groups.popleft()
        changed = _without(tables, state, group, weight)
        if changed is not None and _clocks(changed) != _clocks(state) and (value := judge(changed)) < least:
            state, least, idle = changed, value, 0
        elif len(group) > 1:
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return state


def _clocks(state: State) -> tuple[int, int]:
    return state.profile.compute_us, state.profile.transfer_us


def _without(tables: Tables, state: State, group: list[Undo], weight: float) -> State | None:
    """The state without the group's decisions, within the budget again by others or, if need be, by some of the same; None if that fails."""
    decisions = state.decisions.copy()
    for undo in group:
        undo.apply(decisions)
    storages, ops = {undo.storage for undo in group if undo.storage >= 0}, {op for undo in group for op, _ in undo.ways}
    return repaired(tables, decisions, weight, frozenset(storages), frozenset(ops)) or repaired(tables, decisions, weight)


def _groups(tables: Tables, state: State, weight: float) -> list[list[Undo]]:
    """Decisions about storages and ops whose names differ only in numbers, those that would save most first."""
    problem, least_us = tables.problem, LEAST_SHARE * state.profile.compute_us
    pinned = always_live(problem)
    room_bytes = problem.budget_bytes - problem.constant_bytes - bytes_of(problem, pinned)
    found: dict[tuple[object, ...], list[Undo]] = {}
    for undo in undos(tables, state, weight):
        ways = ((problem.ops[op], problem.ops[op].choices[way]) for op, way in undo.ways)
        if undo.saved_us > 0 and all(alone_bytes(problem, op, choice, pinned) <= room_bytes for op, choice in ways):
            found.setdefault(_kind(tables, undo), []).append(undo)
    sums = [(sum(undo.saved_us for undo in group), group) for group in found.values()]
    return [group for saved_us, group in sorted(sums, key=lambda pair: -pair[0]) if saved_us > least_us]


def _kind(tables: Tables, undo: Undo) -> tuple[object, ...]:
    """What the decisions of a group have in common."""
    ops, storages = tables.problem.ops, tables.problem.storages
    names = [ops[op].name for op, _ in undo.ways]
    names += [storages[undo.storage].name] if undo.storage >= 0 else []
    names += [ops[undo.boundary].name] if 0 <= undo.boundary < len(ops) else []
    return undo.kind, undo.size_bytes, round(undo.saved_us), *(way for _, way in undo.ways), *(NUMBERS.sub("", name) for name in names)
