"""Offsets: which storages lie in the arena, where, and what the whole footprint then is.

An arena is one block that is always there, so putting a storage in it pays only if the block is reused; what does not fit under the budget
that way stays with the allocator. An empty arena always fits, so placement never refuses a schedule that the checker accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mebp_compile.columns import Lives, columns
from mebp_compile.graph import Graph
from mebp_compile.overhead import allocated_bytes
from solvers import Free, Prefetch, Problem, Run, Schedule

ALIGN = 64
SMALLEST_BYTES = 4096  # below this the allocator's own caches are faster than any arena
TRIALS = 90  # arena sizes tried, each SHRINK times the one before
SHRINK = 0.95
RESTARTS = 6
WORK = 120_000  # lives tried in all, roughly 4 seconds

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """offsets: arena offset of a storage by (step that makes it, storage). peak_bytes: arena + allocator + workspace + constant at the
    worst step."""

    offsets: dict[tuple[int, int], int]
    arena_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Life:
    """A storage in memory over schedule steps [start, end); `fits_arena` where it is filled through a given buffer.

    size_bytes are the tensor's own, charged_bytes those that the problem counts for it while the allocator has it.
    """

    storage: int
    start: int
    end: int
    size_bytes: int
    fits_arena: bool
    charged_bytes: int
    device: str = ""

    @property
    def outside_bytes(self) -> int:
        """What the allocator takes for it where it has no place in the arena."""
        return allocated_bytes(self.size_bytes, self.device)


def lives(graph: Graph, problem: Problem, schedule: Schedule) -> list[Life]:
    """Every interval of the schedule in which a storage occupies memory; persistent ones resident from the start have start -1."""
    outputs = {graph.storage_of(name) for _, name in graph.results}
    alive: dict[int, tuple[int, bool]] = {
        index: (-1, False) for index, s in enumerate(problem.storages) if s.persistent and (not s.movable or index in schedule.resident)
    }
    result: list[Life] = []

    def life(storage: int, start: int, end: int, fits: bool) -> Life:
        charged_bytes = problem.storages[storage].size_bytes
        size_bytes, fits = graph.storages[storage].size_bytes, fits and not graph.storages[storage].on_host
        return Life(storage, start, end, min(charged_bytes, size_bytes), fits, charged_bytes, graph.device)

    for number, step in enumerate(schedule.steps):
        if isinstance(step, Run):
            fits = bool(graph.ops[step.op].out_target)
            for storage in problem.ops[step.op].creates:
                if storage not in alive:
                    alive[storage] = (number, fits and storage not in outputs)
        elif isinstance(step, Prefetch):
            alive[step.storage] = (number, step.storage not in outputs and step.storage not in schedule.resident)
        elif isinstance(step, Free) and step.storage in alive:
            start, fits = alive.pop(step.storage)
            result.append(life(step.storage, start, number, fits))
    return result + [life(storage, start, len(schedule.steps), False) for storage, (start, _) in alive.items()]


def place_under(graph: Graph, problem: Problem, schedule: Schedule) -> Placement:
    """The placement of most bytes whose footprint stays within the problem's budget: arenas of several sizes are tried, the empty one
    last."""
    every = lives(graph, problem, schedule)
    steps = len(schedule.steps)
    eligible = [life for life in every if life.fits_arena and life.size_bytes >= SMALLEST_BYTES]
    chosen = set(map(id, eligible))
    fixed = _profile([life for life in every if id(life) not in chosen], steps) + workspace_profile(problem, schedule) + problem.constant_bytes
    fixed += _profile([replace(life, charged_bytes=life.charged_bytes - life.outside_bytes) for life in eligible], steps)
    best, work = pack_columns(eligible, problem.budget_bytes - fixed), Work(WORK)
    for arena_bytes in _arena_sizes(eligible, problem.budget_bytes - int(fixed.max(initial=0)), steps):
        if work.left <= 0 or best.bytes >= sum(life.size_bytes for life in eligible if life.size_bytes <= arena_bytes):
            break
        packed = pack(eligible, arena_bytes, problem.budget_bytes - fixed, work)
        if packed is not None and packed.bytes > best.bytes:
            best = packed
    placed = set(map(id, best.lives))
    footprint = fixed + best.arena_bytes + _allocated([life for life in eligible if id(life) not in placed], steps)
    offsets = {(life.start, life.storage): offset for life, offset in zip(best.lives, best.offsets, strict=True)}
    return Placement(offsets, best.arena_bytes, int(footprint.max(initial=0)))


@dataclass(frozen=True)
class Packed:
    """Lives and the offset of each, in an arena of arena_bytes."""

    lives: list[Life]
    offsets: list[int]
    arena_bytes: int

    @property
    def bytes(self) -> int:
        """What no longer comes from the allocator in a step: each life counts once, as each costs one allocation with its page faults."""
        return sum(life.size_bytes for life in self.lives)


@dataclass
class Work:
    """How many more lives may be tried: a limit that does not depend on the machine."""

    left: int


def _arena_sizes(eligible: list[Life], most_bytes: int, steps: int) -> list[int]:
    """Arena sizes worth trying, largest first: from what the lives together need (and the budget leaves) down to a hundredth."""
    load = int(_allocated(eligible, steps).max(initial=0))
    start = min(most_bytes, load + load // 8 + 64 * ALIGN)
    return [size for size in (int(start * SHRINK**trial) for trial in range(TRIALS)) if size >= SMALLEST_BYTES]


def pack_columns(eligible: list[Life], room: Ints) -> Packed:
    """Columns of lives, and in the holes that they leave whatever else fits. The same `room` as for `pack`; never above it."""
    sizes = np.array([life.size_bytes for life in eligible], np.int64)
    allocated = np.array([life.outside_bytes for life in eligible], np.int64)
    starts, ends = (np.array([getattr(life, name) for life in eligible], np.int64) for name in ("start", "end"))
    found = columns(Lives(starts, ends, sizes, allocated - sizes), room - _allocated(eligible, len(room)), ALIGN, WORK)
    arena = Arena(sum(column.width for column in found), len(eligible))
    for column in found:
        for index in column.members:
            arena.put(eligible[index], column.offset)
    placed = {index for column in found for index in column.members}
    for index in sorted(set(range(len(eligible))) - placed, key=lambda index: (-sizes[index], starts[index])):
        arena.add(eligible[index])
    return Packed(arena.lives, arena.offsets, arena.cap_bytes)


def pack(eligible: list[Life], arena_bytes: int, room: Ints, work: Work) -> Packed | None:
    """First fit under a cap. `room[t]`: what the arena and the lives outside of it may take together at step t; None where that is
    exceeded.

    Lives larger than the arena stay outside; those for which there is no room outside are placed first, then the others, each kind from the
    largest on. One that then fits neither inside nor outside moves to the front, and all begins again.
    """
    spare = Spare(room - arena_bytes)
    order = sorted(eligible, key=lambda life: (-life.size_bytes, life.start))
    inside = [life for life in order if life.size_bytes <= arena_bytes]
    if not all(spare.take(life) for life in order if life.size_bytes > arena_bytes):
        return None
    forced = [life for life in inside if not spare.has(life)]
    for _ in range(RESTARTS):
        front = set(map(id, forced))
        tried = [*forced, *(life for life in inside if id(life) not in front)]
        arena, stuck = _first_fit(tried, arena_bytes, Spare(spare.left.copy()), work)
        if stuck is None:
            tops = [offset + life.size_bytes for life, offset in zip(arena.lives, arena.offsets, strict=True)]
            return Packed(arena.lives, arena.offsets, max(tops, default=0))
        if id(stuck) in front and forced[0] is stuck:
            return None
        forced = [stuck, *(life for life in forced if life is not stuck)]
    return None


def _first_fit(order: list[Life], arena_bytes: int, spare: Spare, work: Work) -> tuple[Arena, Life | None]:
    """The lives in the arena or else outside; and the first that finds place in neither."""
    arena = Arena(arena_bytes, len(order))
    for life in order:
        work.left -= 1
        if not arena.add(life) and not spare.take(life):
            return arena, life
    return arena, None


class Spare:
    """Bytes that lives outside of the arena may still take, by step."""

    def __init__(self, bytes_by_step: Ints) -> None:
        self.left = bytes_by_step

    def has(self, life: Life) -> bool:
        return int(self.left[max(0, life.start) : life.end].min(initial=1 << 62)) >= life.outside_bytes

    def take(self, life: Life) -> bool:
        if not self.has(life):
            return False
        self.left[max(0, life.start) : life.end] -= life.outside_bytes
        return True


class Arena:
    """Lives placed so far, each at the lowest offset that was free for its whole life."""

    def __init__(self, cap_bytes: int, most: int) -> None:
        self.cap_bytes = cap_bytes
        self.rows: Ints = np.zeros((4, most), np.int64)  # start, end, low, high of each life, sorted by low
        self.lives: list[Life] = []
        self.offsets: list[int] = []

    def add(self, life: Life) -> bool:
        """Place the life if it fits under the cap."""
        count = len(self.lives)
        start, end, low, high = self.rows[:, :count]
        clash = (start < life.end) & (end > life.start)
        offset = _lowest_gap(low[clash], high[clash], life.size_bytes)
        if offset + life.size_bytes > self.cap_bytes:
            return False
        self.put(life, offset)
        return True

    def put(self, life: Life, offset: int) -> None:
        """Place the life at an offset that is free for all of it."""
        count = len(self.lives)
        at = int(np.searchsorted(self.rows[2, :count], offset))
        self.rows[:, at + 1 : count + 1] = self.rows[:, at:count].copy()
        self.rows[:, at] = life.start, life.end, offset, _aligned(offset + life.size_bytes)
        self.lives.append(life)
        self.offsets.append(offset)


def _lowest_gap(low: Ints, high: Ints, size_bytes: int) -> int:
    """The lowest aligned offset with `size_bytes` free among the intervals [low, high), sorted by low."""
    if not len(low):
        return 0
    tops = np.maximum.accumulate(high)
    if low[0] >= size_bytes:
        return 0
    fits = np.flatnonzero(low[1:] - tops[:-1] >= size_bytes)
    return int(tops[fits[0]]) if len(fits) else int(tops[-1])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _allocated(some: list[Life], steps: int) -> Ints:
    """What the allocator takes for the lives at every step."""
    return _profile([replace(life, charged_bytes=life.outside_bytes) for life in some], steps)


def _profile(some: list[Life], steps: int) -> Ints:
    """Bytes charged for the lives at every step, from the one that makes a storage up to the one before its Free."""
    change: Ints = np.zeros(steps + 2, np.int64)
    for life in some:
        change[max(0, life.start)] += life.charged_bytes
        change[life.end] -= life.charged_bytes
    total: Ints = np.cumsum(change)[:steps]
    return total


def workspace_profile(problem: Problem, schedule: Schedule) -> Ints:
    """Workspace of every step, with the copies that a second run of a multi-output op makes and discards."""
    result: Ints = np.zeros(len(schedule.steps), np.int64)
    alive: set[int] = set()
    for number, step in enumerate(schedule.steps):
        if isinstance(step, Run):
            op = problem.ops[step.op]
            result[number] = op.choices[step.choice].workspace_bytes + sum(problem.storages[s].size_bytes for s in op.creates if s in alive)
            alive.update(op.creates)
        elif isinstance(step, Prefetch):
            alive.add(step.storage)
        elif isinstance(step, Free):
            alive.discard(step.storage)
    return result
