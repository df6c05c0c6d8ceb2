"""Lifespans -> offsets in one arena, so that no two storages that live at the same time overlap.

First-fit in several orders (by size, area, start), then a local search that moves what ends highest to the front of
the order, then the exact search of `pack`, at the maximum load first and between it and the arena found where that
ends without an answer. At last a few large ones are packed exactly, and what ends too high of the others joins them.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.pack import Packing, pack
from solvers.problem import Problem
from solvers.schedule import Free, Prefetch, Run, Schedule

Ints = NDArray[np.int64]
ALIGNMENT_BYTES = 64
SEARCH_WORK = 40_000  # lifespans placed by the local search, roughly
PACK_WORK = 1 << 32  # of the exact search, in its units: four seconds at most, and as many again where large ones are joined by others
HEIGHTS = 6  # that the exact search is tried at
LARGE = (50, 300, 2000)  # lifespans of more than this part of the arena are packed exactly, at first
GROWN_FROM = 20  # likewise, before what doesn't fit into their holes joins them
GROWTHS, GROWTH_WORK = 64, 100_000  # times that it does; and lifespans placed by first-fit then, roughly
FAILURES = 12  # of the exact search
LEAST_GROWTH = 10  # lifespans


class _Blocks(NamedTuple):
    """Lifespans, their aligned sizes, and (start, end) of each."""

    items: Sequence[Lifespan]
    sizes: Ints
    spans: Ints

    def some(self) -> NDArray[np.intp]:
        """Those that occupy bytes."""
        return np.flatnonzero((self.sizes > 0) & (self.spans[:, 0] < self.spans[:, 1]))


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
    persistent = (s for s, info in enumerate(problem.storages) if info.persistent)
    began = {s: 0 for s in persistent if s in schedule.resident or not problem.storages[s].movable}
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


def _padded(item: Lifespan) -> int:
    """Size rounded up to the alignment."""
    return -(-item.size_bytes // item.align) * item.align


def max_load_bytes(items: Sequence[Lifespan]) -> int:
    """The most aligned bytes live at once: a lower bound of every arena."""
    change: dict[int, int] = {}
    for item in items:
        if item.start < item.end:
            change[item.start] = change.get(item.start, 0) + _padded(item)
            change[item.end] = change.get(item.end, 0) - _padded(item)
    load = most = 0
    for _, delta in sorted(change.items()):
        load += delta
        most = max(most, load)
    return most


def place(
    items: Sequence[Lifespan],
    seed: int = 0,
    enough_bytes: int = 0,
    work: int = PACK_WORK,
    fixed: Mapping[int, int] | None = None,
) -> Placement:
    """Offsets for the lifespans in a small arena. Deterministic for one seed and `work`. The result is checked.

    enough_bytes: an arena that need not be smaller. fixed: offsets that some items (by number) have already; the
    others are then placed first-fit around them. Raises OffsetError for a lifespan that ends before it starts or isn't
    aligned to a power of two, and for fixed ones that overlap.
    """
    _check_items(items)
    bound = max_load_bytes(items)
    enough = max(bound, enough_bytes)
    sizes = np.array([_padded(item) for item in items], dtype=np.int64)
    spans = np.array([(item.start, item.end) for item in items], dtype=np.int64).reshape(-1, 2)
    blocks, length = _Blocks(items, sizes, spans), spans[:, 1] - spans[:, 0]
    keys = ((-length, -sizes), (-length, -sizes * length), (-sizes, spans[:, 0]))
    orders = [np.lexsort(key).tolist() for key in keys]
    some = np.array(sorted(fixed or {}), dtype=np.intp)
    lows = np.array([(fixed or {})[k] for k in some.tolist()], dtype=np.int64)
    best: tuple[int, Ints, list[int]] | None = None
    for order in orders:
        offsets = _first_fit([k for k in order if k not in (fixed or {})], blocks, (some, lows))
        arena = int((offsets + sizes).max(initial=0))
        if best is None or arena < best[0]:
            best = (arena, offsets, order)
        if arena <= enough:
            break
    assert best is not None
    arena, offsets, _ = best if fixed else _search(best, blocks, enough, seed)
    if arena > enough and len({item.align for item in items}) == 1 and not fixed:
        arena, offsets, bound = _exact((arena, offsets, bound), blocks, enough, work, seed)
        if arena > enough:
            arena, offsets, bound = _grown((arena, offsets, bound), blocks, enough, work, seed)
    placement = Placement(tuple(offsets.tolist()), arena, bound)
    check_offsets(items, placement)
    return placement


def _check_items(items: Sequence[Lifespan]) -> None:
    for item in items:
        if item.end < item.start or item.size_bytes < 0:
            raise OffsetError(f"{item}: must not end before it starts, and its size must not be negative")
        if item.align <= 0 or item.align & (item.align - 1):
            raise OffsetError(f"{item}: alignment must be a power of two")


def _first_fit(
    order: Sequence[int],
    blocks: _Blocks,
    fixed: tuple[NDArray[np.intp], Ints] | None = None,
) -> Ints:
    """Each lifespan in turn at the lowest offset where it fits, beside those that are `fixed` at offsets. Placed ones are kept sorted by offset."""
    items, sizes, spans = blocks
    offsets = np.zeros(len(items), dtype=np.int64)
    placed = np.zeros((4, len(items)), dtype=np.int64)  # offset, top, start, end
    count = 0
    if fixed is not None:
        some, lows = fixed
        count = len(some)
        offsets[some] = lows
        rows = np.stack([lows, lows + sizes[some], spans[some, 0], spans[some, 1]])
        placed[:, :count] = rows[:, np.argsort(lows, kind="stable")]
    for k in order:
        size, (start, end) = int(sizes[k]), spans[k]
        if size == 0 or start == end:
            continue
        rows = placed[:, :count]
        together = (rows[2] < end) & (rows[3] > start)
        offset = _lowest_gap(rows[0][together], rows[1][together], size, items[k].align)
        at = int(np.searchsorted(rows[0], offset))
        placed[:, at + 1 : count + 1] = placed[:, at:count].copy()
        placed[:, at] = offset, offset + size, start, end
        offsets[k] = offset
        count += 1
    return offsets


def _lowest_gap(bottoms: Ints, tops: Ints, size: int, align: int) -> int:
    """The lowest aligned offset with `size` free bytes, given blocks sorted by bottom."""
    if len(bottoms) == 0:
        return 0
    covered = np.concatenate([np.zeros(1, dtype=np.int64), np.maximum.accumulate(tops)])
    covered = -(-covered // align) * align
    fits = np.flatnonzero(bottoms - covered[:-1] >= size)
    return int(covered[fits[0]] if len(fits) else covered[-1])


def _search(
    best: tuple[int, Ints, list[int]],
    blocks: _Blocks,
    bound: int,
    seed: int,
) -> tuple[int, Ints, list[int]]:
    """Move what ends highest (and a random other) to the front of the order; keep what doesn't get worse."""
    draw = random.Random(seed)
    for _ in range(min(300, SEARCH_WORK // (len(blocks.items) + 1))):
        arena, offsets, order = best
        if arena <= bound:
            break
        tops = np.flatnonzero(offsets + blocks.sizes == arena).tolist()
        moved = [*tops, draw.choice(order)]
        chosen = set(moved)
        trial = [*chosen, *(k for k in order if k not in chosen)]
        if draw.random() < 0.5:
            first = draw.randrange(len(trial))
            trial[0], trial[first] = trial[first], trial[0]
        found = _first_fit(trial, blocks)
        height = int((found + blocks.sizes).max(initial=0))
        if height <= arena:
            best = (height, found, trial)
    return best


def _exact(best: tuple[int, Ints, int], blocks: _Blocks, enough: int, work: int, seed: int) -> tuple[int, Ints, int]:
    """(arena, offsets, bound) made better: the large lifespans packed at `enough`, or at heights halfway between the arena and what had no
    answer, the others first-fit into their holes; with ever more of them large. A proof that there is no packing raises the bound."""
    arena, offsets, bound = best
    some = blocks.some()
    parts = [part for part in LARGE if (blocks.sizes[some] * part < bound).any()]
    for part in (*parts, 0):
        large = some[blocks.sizes[some] * part >= bound] if part else some
        failed = enough - 1
        for number in range(HEIGHTS):
            height = (failed + arena) // 2 if number else enough
            if not failed < height < arena:
                break
            share = work // (1 + len(parts)) // (2 * HEIGHTS if number else 2)
            found, tried = _packed(blocks, large, height, share, seed)
            bound = max(bound, height + 1) if found.proven else bound
            top = arena if tried is None else int((tried + blocks.sizes).max(initial=0))
            if tried is None or top >= arena:
                failed = height
            else:
                arena, offsets = top, tried
    return arena, offsets, bound


def _grown(best: tuple[int, Ints, int], blocks: _Blocks, enough: int, work: int, seed: int) -> tuple[int, Ints, int]:
    """(arena, offsets, bound) made better: of the others, those that end above `enough` join the large lifespans, highest first, again and again;
    fewer of them where they have no answer together."""
    arena, offsets, bound = best
    some = blocks.some()
    large = some[blocks.sizes[some] * GROWN_FROM >= bound]
    joining, failures = some[:0], 0
    for _ in range(min(GROWTHS, GROWTH_WORK // (len(some) + 1))):
        tried = np.union1d(large, joining)
        _, filled = _packed(blocks, tried, enough, work // GROWTHS, seed)
        if filled is None:
            failures += 1
            joining = joining[: len(joining) // 2]
            if not len(joining) or failures == FAILURES:
                break
            continue
        large, rest = tried, np.setdiff1d(some, tried)
        tops = (filled + blocks.sizes)[rest]
        top = max(enough, int(tops.max(initial=0)))
        if top < arena:
            arena, offsets = top, filled
        if top == enough:
            break
        above = rest[np.argsort(-tops, kind="stable")][: int((tops > enough).sum())]
        joining = above[: max(LEAST_GROWTH, len(above) // 4)]
    return arena, offsets, bound


def _packed(blocks: _Blocks, large: NDArray[np.intp], height: int, work: int, seed: int) -> tuple[Packing, Ints | None]:
    """The large lifespans packed below the height; and if that is found, offsets of all, the others first-fit into their holes, longest first."""
    _, sizes, spans = blocks
    found = pack(spans[large, 0], spans[large, 1], sizes[large], height, work, seed)
    if found.offsets is None:
        return found, None
    rest = np.setdiff1d(blocks.some(), large)
    rest = rest[np.lexsort((-sizes[rest], spans[rest, 0] - spans[rest, 1]))]
    return found, _first_fit(rest.tolist(), blocks, (large, found.offsets))


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
