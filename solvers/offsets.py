"""Lifespans -> offsets in one arena, so that no two storages that live at the same time overlap. arrange.py finds them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from solvers.arrange import Blocks, arranged, by_first_fit
from solvers.problem import Problem
from solvers.schedule import Free, Prefetch, Run, Schedule

ALIGNMENT_BYTES = 64
WORK = 1 << 32  # of each search for offsets, in its units: four seconds at most


class OffsetError(ValueError):
    """A placement is wrong. The message names the lifespans."""


@dataclass(frozen=True, slots=True)
class Lifespan:
    """A block of size_bytes during [start, end) of the steps. id: the storage; several lifespans may share it."""

    id: int
    start: int
    end: int
    size_bytes: int
    align: int = ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Placement:
    """offsets[k] is the byte offset of lifespan k. lower_bound_bytes: no arena can be smaller than this."""

    offsets: tuple[int, ...]
    arena_bytes: int
    lower_bound_bytes: int


def lifespans(problem: Problem, schedule: Schedule) -> tuple[Lifespan, ...]:
    """When each storage occupies memory, in step indices: from the Run or Prefetch that allocates it (0 for resident
    storages) up to the Free (len(steps) if never freed). The copy that a rerun makes of a live storage and discards
    at once is a lifespan of one step. Workspaces are not included. Expects a valid schedule."""
    began = dict.fromkeys(schedule.at_start(problem), 0)
    result = []

    def span(storage: int, start: int, end: int) -> Lifespan:
        return Lifespan(storage, start, end, problem.storages[storage].size_bytes)

    for index, step in enumerate(schedule.steps):
        if isinstance(step, Run):
            for storage in problem.ops[step.op].creates:
                if storage in began:
                    result.append(span(storage, index, index + 1))
                else:
                    began[storage] = index
        elif isinstance(step, Prefetch):
            began[step.storage] = index
        elif isinstance(step, Free):
            result.append(span(step.storage, began.pop(step.storage), index))
    result += [span(storage, start, len(schedule.steps)) for storage, start in began.items()]
    return tuple(sorted(result, key=lambda item: (item.start, item.id)))


def max_load_bytes(items: Sequence[Lifespan]) -> int:
    """The most aligned bytes live at once: a lower bound of every arena."""
    return blocks_of(items).max_load()


def place(
    items: Sequence[Lifespan],
    seed: int = 0,
    enough_bytes: int = 0,
    work: int = WORK,
    fixed: Mapping[int, int] | None = None,
) -> Placement:
    """Offsets for the lifespans in a small arena. Deterministic for one seed and `work`. The result is checked.

    enough_bytes: an arena that need not be smaller. fixed: offsets that some items (by number) have already; the
    others are then placed first-fit around them. Raises OffsetError for a lifespan that ends before it starts or isn't
    aligned to a power of two, and for fixed ones that overlap.
    """
    for item in items:
        if item.end < item.start or item.size_bytes < 0:
            raise OffsetError(f"{item}: must not end before it starts, and its size must not be negative")
        if item.align <= 0 or item.align & (item.align - 1):
            raise OffsetError(f"{item}: alignment must be a power of two")
    blocks = blocks_of(items)
    enough = max(blocks.max_load(), enough_bytes)
    if fixed or len(set(blocks.aligns.tolist())) > 1:
        known = sorted((fixed or {}).items())
        found = by_first_fit(blocks, enough, (np.array([k for k, _ in known], np.intp), np.array([low for _, low in known], np.int64)))
    else:
        found = arranged(blocks, enough, work, seed)
    placement = Placement(tuple(found.offsets.tolist()), found.arena, found.bound)
    check_offsets(items, placement)
    return placement


def blocks_of(items: Sequence[Lifespan]) -> Blocks:
    """As arrays, sizes rounded up to the alignment."""
    rows = [(item.start, item.end, -(-item.size_bytes // item.align) * item.align, item.align) for item in items]
    return Blocks(*np.array(rows, np.int64).reshape(-1, 4).T)


def check_offsets(items: Sequence[Lifespan], placement: Placement) -> None:
    """Raise OffsetError if two lifespans overlap in time and bytes, or one is misaligned or outside the arena.

    A sweep over time that keeps the live blocks sorted by offset, so that only neighbours need comparing: O(n log n).
    """
    if len(items) != len(placement.offsets):
        raise OffsetError(f"{len(placement.offsets)} offsets for {len(items)} lifespans")
    events = []
    for k, (item, offset) in enumerate(zip(items, placement.offsets, strict=True)):
        if offset < 0 or offset % item.align or offset + item.size_bytes > placement.arena_bytes:
            raise OffsetError(f"lifespan {k} ({item}): offset {offset} is misaligned or outside the arena")
        if item.size_bytes and item.start < item.end:
            events += [(item.end, 0, k), (item.start, 1, k)]
    live: list[tuple[int, int]] = []  # (offset, lifespan), sorted
    for _, begins, k in sorted(events):
        block = (placement.offsets[k], k)
        at = bisect_left(live, block)
        if not begins:
            del live[at]
            continue
        for offset, other in live[max(0, at - 1) : at + 1]:
            low, size = (offset, items[other].size_bytes) if offset <= block[0] else (block[0], items[k].size_bytes)
            if low + size > max(offset, block[0]):
                raise OffsetError(f"lifespans {other} ({items[other]}) and {k} ({items[k]}) overlap")
        insort(live, block)
