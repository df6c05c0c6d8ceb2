"""Offsets: which storages lie in the arena, where, and what the whole footprint then is.

An arena is one block that is always there, so putting a storage in it pays only if the block is reused; what does not fit under the budget
that way stays with the allocator. An empty arena always fits, so placement never refuses a schedule that the checker accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mebp_compile.graph import Graph
from solvers import Free, Prefetch, Problem, Run, Schedule

ALIGN = 64
SMALLEST_BYTES = 4096  # below this the allocator's own caches are faster than any arena
CAPS = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """offsets: arena offset of a storage by (step that makes it, storage). peak_bytes: arena + allocator + workspace + constant at the worst step."""

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


def lives(graph: Graph, problem: Problem, schedule: Schedule) -> list[Life]:
    """Every interval of the schedule in which a storage occupies memory; persistent ones resident from the start have start -1."""
    outputs = {graph.storage_of(name) for _, name in graph.results}
    alive: dict[int, tuple[int, bool]] = {
        index: (-1, False) for index, s in enumerate(problem.storages) if s.persistent and (not s.movable or index in schedule.resident)
    }
    result: list[Life] = []

    def life(storage: int, start: int, end: int, fits: bool) -> Life:
        charged_bytes = problem.storages[storage].size_bytes
        return Life(storage, start, end, min(charged_bytes, graph.storages[storage].size_bytes), fits, charged_bytes)

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
    """The placement with the largest arena use whose footprint stays within the problem's budget."""
    every = lives(graph, problem, schedule)
    steps = len(schedule.steps)
    workspace = _workspace(problem, schedule)
    eligible = sorted((life for life in every if life.fits_arena and life.size_bytes >= SMALLEST_BYTES), key=lambda life: (-life.size_bytes, life.start))
    rest = [life for life in every if not (life.fits_arena and life.size_bytes >= SMALLEST_BYTES)]
    load = int(_profile(eligible, steps).max(initial=0))
    base = _profile(rest, steps) + workspace
    for fraction in CAPS:
        cap = int(load * fraction) if fraction < 1.0 else int(load * 1.05) + ALIGN * 64
        offsets, placed, left = first_fit(eligible, cap)
        arena = max((offset + life.size_bytes for life, offset in zip(placed, offsets, strict=True)), default=0)
        peak = problem.constant_bytes + arena + int((base + _profile(left, steps)).max(initial=0))
        if peak <= problem.budget_bytes:
            return Placement({(life.start, life.storage): offset for life, offset in zip(placed, offsets, strict=True)}, arena, peak)
    peak = problem.constant_bytes + int((base + _profile(eligible, steps)).max(initial=0))
    return Placement({}, 0, peak)


def first_fit(order: list[Life], cap_bytes: int) -> tuple[list[int], list[Life], list[Life]]:
    """Offsets of the lives placed, in the given order, each at the lowest offset free for its whole life; and the lives left out by the cap."""
    start: Ints = np.zeros(len(order), np.int64)
    end, low, high = start.copy(), start.copy(), start.copy()
    offsets: list[int] = []
    placed: list[Life] = []
    left: list[Life] = []
    for life in order:
        count = len(placed)
        clash = (start[:count] < life.end) & (end[:count] > life.start)
        offset = _lowest_gap(low[:count][clash], high[:count][clash], life.size_bytes)
        if offset + life.size_bytes > cap_bytes:
            left.append(life)
            continue
        start[count], end[count] = life.start, life.end
        low[count], high[count] = offset, _aligned(offset + life.size_bytes)
        offsets.append(offset)
        placed.append(life)
    return offsets, placed, left


def _lowest_gap(low: Ints, high: Ints, size_bytes: int) -> int:
    """The lowest aligned offset with `size_bytes` free among the intervals [low, high)."""
    if not len(low):
        return 0
    order = np.argsort(low, kind="stable")
    tops = np.maximum.accumulate(high[order])
    before = np.concatenate(([0], tops[:-1]))
    fits = np.flatnonzero(low[order] - before >= size_bytes)
    return int(before[fits[0]]) if len(fits) else int(tops[-1])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _profile(some: list[Life], steps: int) -> Ints:
    """Bytes of the given lives at every step. A storage is freed before the next step begins, so its own Free step still counts it."""
    change: Ints = np.zeros(steps + 2, np.int64)
    for life in some:
        change[max(0, life.start)] += life.size_bytes
        change[life.end] -= life.size_bytes
    total: Ints = np.cumsum(change)[: steps + 1]
    return total


def _workspace(problem: Problem, schedule: Schedule) -> Ints:
    """Workspace of every step, with the copies that a second run of a multi-output op makes and discards."""
    result: Ints = np.zeros(len(schedule.steps) + 1, np.int64)
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
