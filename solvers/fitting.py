"""A schedule whose storages all find room in one arena: what is read ahead, or still being written, keeps clear of what lies there.

Where transfers decide, a schedule fills the memory beside what its ops need with what is read ahead and what is being written, to the last byte at
thousands of steps, and no packing of such lifespans may be near the most bytes at once. What an op needs, from its read to its last use, is less.
So the lifespans are packed by guided ejection; while some have no place, a few that are in memory at the same time are shortened to what is needed.
Then the step is walked once more: a read begins early, or a write's memory stays behind, only where bytes of the arena are free for so long. Which
lives are shortened decides how much time that costs, so it is done several times, and the fastest schedule is taken.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.arena import Arena
from solvers.arrange import Blocks, above_the_lasting, around_the_busiest
from solvers.check import replay
from solvers.decode import Tables
from solvers.eject import Ejection
from solvers.emit import emit, moves_of
from solvers.evict import State
from solvers.library import native
from solvers.offsets import ALIGNMENT_BYTES, Placement, lifespans, max_load_bytes, place
from solvers.problem import Problem
from solvers.retrace import Retraced, retraced
from solvers.schedule import Schedule
from solvers.transfers import ArenaPlacement, NativePlacement, Walk

NEAR = 0.01  # an arena so little above the most bytes at once is near enough
USED, USED_OF_NEED = 0.009, 0.0098  # so much above it, or above what is needed at once, the lives are packed
TRIES, SHORTENED = 6, (2, 1, 4)  # lives that are shortened for one that has no place, in one try after the other
ROUNDS, ROUND_WORK, HARD_WORK = 30, 1 << 24, 1 << 26  # of a try: ejection, and then some lives are shortened
BUSY_ROUNDS, BUSY_WORK = 3, 1 << 28  # every third round what lives where the load is near its most is packed exactly instead
BUSY = (0.9, 0.95, 0.8, 0.6)  # so near
HORIZONS = (0.008, 0.03, 0.045, 0.06)  # of a walk: how long before its event a read may begin

Events = NDArray[np.int32]
Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A schedule, its microseconds, and the offsets of its lifespans."""

    schedule: Schedule
    time_us: int
    placement: Placement


def fit_arena(problem: Problem, schedule: Schedule, seed: int = 0, own: bool = True) -> Fitted:
    """The schedule as it is where its arena is within 1 % of its most bytes at once; else the fastest found whose arena is no larger than that, with
    the same runs in the same order; the given one where none is found, or where there is no C library. Deterministic. The schedule is valid.

    own: transfers that moved may leave fewer bytes at once, and the arena more than 1 % above those. Then a slower schedule is looked for whose arena
    is within 1 % of its own most bytes at once.
    """
    items = lifespans(problem, schedule)
    most_bytes = max_load_bytes(items)
    near = _near(most_bytes)
    given = Fitted(schedule, replay(problem, schedule).time_us, place(items, seed, near))
    tables = Tables(problem)
    found = None if given.placement.arena_bytes <= near else retraced(tables, schedule)
    if found is None:
        return given
    state, lives = found[0], _lives(tables, *found)
    need_bytes = lives.needed().max_load()
    others = _others(tables, schedule, state, lives, int((1 + USED) * max(most_bytes, need_bytes)), ROUND_WORK, seed)
    fitted = _fastest((other for other in others if other.placement.arena_bytes <= near), given)
    if own and not _is_near(fitted.placement):
        others = _others(tables, schedule, state, lives, int((1 + USED_OF_NEED) * need_bytes), HARD_WORK, seed)
        fitted = _fastest((other for other in others if _is_near(other.placement)), fitted)
    return fitted


def _near(most_bytes: int) -> int:
    return int((1 + NEAR) * most_bytes)


def _is_near(placement: Placement) -> bool:
    return placement.arena_bytes <= _near(placement.lower_bound_bytes)


def _fastest(some: Iterable[Fitted], otherwise: Fitted) -> Fitted:
    return min(some, key=lambda each: each.time_us, default=otherwise)


class _Lives(NamedTuple):
    """Of each instance, and then of each copy that is discarded at once: events [begin, end) of the shortest life, of that in the schedule, bytes."""

    begin: Events
    end: Events
    asked: Events
    freed: Events
    size: Bytes

    def needed(self) -> Blocks:
        """The shortest."""
        return _blocks(self.begin, self.end, self.size)


def _blocks(begin: Events, end: Events, size: Bytes) -> Blocks:
    return Blocks(begin.astype(np.int64), end.astype(np.int64), size, np.full(len(size), ALIGNMENT_BYTES))


def _others(tables: Tables, schedule: Schedule, state: State, lives: _Lives, arena_bytes: int, work: int, seed: int) -> Iterator[Fitted]:
    """Ever faster ones, in an arena no larger than that."""
    draw, least_us = np.random.default_rng(seed), 1 << 62
    height = arena_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    walks = NativePlacement(tables, state) if native(len(tables.problem.ops), "transfers") else None
    for number in range(TRIES):
        low = _packed(lives, height, SHORTENED[number % len(SHORTENED)], work, draw)
        if low is None:
            continue
        for horizon in HORIZONS:
            arena = Arena(lives.begin.copy(), lives.end.copy(), low.copy(), lives.size, height)
            walk = walks.run(horizon, arena) if walks else ArenaPlacement(tables, state, horizon, arena).run()
            if walk.time_us < least_us:
                least_us = walk.time_us
                yield _fitted(tables, schedule, state, walk, arena)
            if not walk.held_back:  # a longer horizon is the same walk
                break


def _lives(tables: Tables, state: State, spans: Retraced) -> _Lives:
    trace = state.trace
    copied = [event for event, _ in trace.extra]
    storages = [*trace.inst_storage, *(s for _, s in trace.extra)]
    written = np.isin(np.arange(len(storages)), trace.writes)
    begin = np.array([*(max(0, birth) for birth in trace.inst_birth), *copied], np.int32)
    end = np.array([*trace.inst_last, *copied], np.int32) + np.int32(1)
    asked, freed = np.array([*spans.asked, *copied], np.int32), np.array([*spans.freed, *copied], np.int32)
    size = np.array([-(-tables.size[s] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for s in storages], np.int64)
    return _Lives(begin, end, np.minimum(begin, asked), np.where(written, np.maximum(end, freed), end).astype(np.int32), size)


def _packed(lives: _Lives, height: int, shortened: int, work: int, draw: np.random.Generator) -> Bytes | None:
    """Offsets below the height for all, some with their shortest lives; None if that fails. work: of each round's ejection."""
    some, low, bottom = above_the_lasting(lives.needed())
    begin, end = lives.begin[some], lives.end[some]
    search = Ejection(lives.asked[some], lives.freed[some], lives.size[some])
    for number in range(ROUNDS):
        found = search.offsets if search.run(height - bottom, work, int(draw.integers(1 << 30))) == 0 else None
        if found is None and number % BUSY_ROUNDS == BUSY_ROUNDS - 1:
            blocks = _blocks(search.starts, search.ends, search.sizes)
            found = around_the_busiest(blocks, height - bottom, draw.choice(BUSY), BUSY_WORK, int(draw.integers(1 << 30)))
        if found is not None:
            low[some] += found
            return low
        for k in np.flatnonzero(search.offsets < 0).tolist():
            beside = _beside(search, begin, end, k)
            if len(beside):
                chosen = draw.choice(beside, min(shortened, len(beside)), replace=False, p=_weights(search, beside, k))
                search.starts[chosen], search.ends[chosen] = begin[chosen], end[chosen]
    return None


def _beside(search: Ejection, begin: Events, end: Events, k: int) -> NDArray[np.intp]:
    """Those that could be shortened in the life of k, itself too."""
    first, last = search.starts[k], search.ends[k]
    early = (search.starts < begin) & (search.starts < last) & (begin > first)
    late = (search.ends > end) & (search.ends > first) & (end < last)
    return np.flatnonzero(early | late)


def _weights(search: Ejection, beside: NDArray[np.intp], k: int) -> NDArray[np.float64]:
    """How likely each is to be taken: by the bytes and the time that it has in common with k."""
    common = np.minimum(search.ends[beside], search.ends[k]) - np.maximum(search.starts[beside], search.starts[k])
    weights: NDArray[np.float64] = np.minimum(search.sizes[beside], search.sizes[k]) * np.maximum(1.0, common)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _fitted(tables: Tables, schedule: Schedule, state: State, walk: Walk, arena: Arena) -> Fitted:
    """The walk's schedule, and the arena's offsets in the order of its lifespans."""
    problem, trace = tables.problem, state.trace
    found = replace(emit(tables, state.decisions, trace, moves_of(walk.record)), resident=schedule.resident)
    items, until = lifespans(problem, found), defaultdict[int, int](int)
    lows = defaultdict[tuple[int, bool], deque[int]](deque)  # of a storage's instances, and of its discarded copies, in the order of time
    copied = [False] * len(trace.inst_storage) + [True] * len(trace.extra)
    for s, copy, low in zip([*trace.inst_storage, *(s for _, s in trace.extra)], copied, arena.low.tolist(), strict=True):
        lows[s, copy].append(low)
    offsets = []
    for item in items:
        copy = item.start < until[item.id]
        offsets.append(lows[item.id, copy].popleft())
        if not copy:
            until[item.id] = item.end
    top = max(offset + item.size_bytes for offset, item in zip(offsets, items, strict=True))
    return Fitted(found, walk.time_us, Placement(tuple(offsets), top, max_load_bytes(items)))
