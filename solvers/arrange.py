"""Blocks that live for a while -> offsets in one arena, by first-fit and, where that leaves it too large, by one search after the other.

First-fit goes in several orders: longest first, by area, by size. Then what lives where the load is near its most is packed exactly and the others
are put into its holes; then guided ejection is tried; then the large blocks are packed exactly, at the maximum load first and between it and the
arena found where that ends without an answer; then the largest alone, and what ends too high of the others joins them; and at last guided ejection
again, at ever larger heights. What lives all the time lies at the bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.eject import Ejection
from solvers.pack import Packing, pack

Ints = NDArray[np.int64]
Indices = NDArray[np.intp]
BUSY, BUSY_PART = (0.9, 0.7), 32  # what lives in steps with so much of the most bytes at once is packed exactly; part of the work for that
EJECT_PART = 32  # of the work: for each height that guided ejection is tried at
MARGINS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25)  # of these heights above the one that is enough
HEIGHTS = 6  # that the exact search is tried at
LARGE = (50, 300, 2000)  # blocks of more than this part of the arena are packed exactly, at first
GROWN_FROM = 20  # likewise, before what doesn't fit into their holes joins them
GROWTHS, GROWTH_WORK = 64, 100_000  # times that it does; and blocks placed by first-fit then, roughly
FAILURES = 12  # of the exact search
LEAST_GROWTH = 10  # blocks


class Blocks(NamedTuple):
    """Bytes, a multiple of the alignment, during [start, end). All are aligned alike but for first-fit."""

    starts: Ints
    ends: Ints
    sizes: Ints
    aligns: Ints

    def some(self, chosen: NDArray[np.bool_] | Indices) -> Blocks:
        """Those that are chosen."""
        return Blocks(*(column[chosen] for column in self))

    def max_load(self) -> int:
        """The most bytes at once: no arena is smaller."""
        return int(_load(self).max(initial=0))


class Arranged(NamedTuple):
    """arena: where the highest block ends. bound: no arena is smaller."""

    arena: int
    offsets: Ints
    bound: int

    def or_at(self, offsets: Ints | None, blocks: Blocks) -> Arranged:
        """These offsets if there are any, and they make a smaller arena."""
        top = self.arena if offsets is None else int((offsets + blocks.sizes).max(initial=0))
        return self if offsets is None or top >= self.arena else Arranged(top, offsets, self.bound)


def arranged(blocks: Blocks, enough: int, work: int, seed: int) -> Arranged:
    """Offsets for blocks that are aligned alike; an arena of `enough` bytes need not be smaller. Deterministic."""
    numbers, offsets, bottom = above_the_lasting(blocks)
    rest = blocks.some(numbers)
    found = _searched(rest, max(enough - bottom, rest.max_load()), work, seed)
    offsets[numbers] += found.offsets
    return Arranged(bottom + found.arena, offsets, bottom + found.bound)


def above_the_lasting(blocks: Blocks) -> tuple[Indices, Ints, int]:
    """What lives all the time lies at the bottom, up to the last of these numbers. The first: the blocks that come and go, whose offsets, for now,
    are just that."""
    empty = (blocks.sizes == 0) | (blocks.starts == blocks.ends)
    always = ~empty & (blocks.starts == blocks.starts[~empty].min(initial=1 << 62)) & (blocks.ends == blocks.ends[~empty].max(initial=0))
    bottom, rest = int(blocks.sizes[always].sum()), np.flatnonzero(~empty & ~always)
    offsets = np.zeros(len(empty), np.int64)
    offsets[always] = np.cumsum(blocks.sizes[always]) - blocks.sizes[always]
    offsets[rest] = bottom
    return rest, offsets, bottom


def _searched(blocks: Blocks, enough: int, work: int, seed: int) -> Arranged:
    """Ever better, until the arena is small enough."""
    best = by_first_fit(blocks, enough)
    for share in BUSY:
        if best.arena > enough:
            best = best.or_at(around_the_busiest(blocks, enough, share, work // BUSY_PART, seed), blocks)
    if best.arena > enough:
        best = _ejected(best, blocks, (enough,), work // EJECT_PART, seed)
    if best.arena > enough:
        best = _exact(best, blocks, enough, work, seed)
    if best.arena > enough:
        best = _grown(best, blocks, enough, work, seed)
        best = _ejected(best, blocks, [int(enough * (1 + margin)) for margin in MARGINS], work // EJECT_PART, seed)
    return best


def by_first_fit(blocks: Blocks, enough: int, fixed: tuple[Indices, Ints] | None = None) -> Arranged:
    """The best of three orders, or the first that is good enough. fixed: numbers of blocks, and the offsets that they have."""
    length, bound, best = blocks.ends - blocks.starts, blocks.max_load(), None
    for key in ((-length, -blocks.sizes), (-length, -blocks.sizes * length), (-blocks.sizes, blocks.starts)):
        order = np.lexsort(key) if fixed is None else np.setdiff1d(np.lexsort(key), fixed[0], assume_unique=True)
        offsets = first_fit(order, blocks, fixed)
        arena = int((offsets + blocks.sizes).max(initial=0))
        if best is None or arena < best.arena:
            best = Arranged(arena, offsets, bound)
        if arena <= enough:
            break
    assert best is not None
    return best


def first_fit(order: Indices, blocks: Blocks, fixed: tuple[Indices, Ints] | None = None) -> Ints:
    """Each block in turn at the lowest offset where it fits, beside those that are `fixed`. Placed ones are kept sorted by offset."""
    starts, ends, sizes, aligns = blocks
    offsets = np.zeros(len(sizes), dtype=np.int64)
    placed = np.zeros((4, len(sizes)), dtype=np.int64)  # offset, top, start, end
    count = 0
    if fixed is not None:
        some, lows = fixed
        count = len(some)
        offsets[some] = lows
        rows = np.stack([lows, lows + sizes[some], starts[some], ends[some]])
        placed[:, :count] = rows[:, np.argsort(lows, kind="stable")]
    for k in order.tolist():
        size, start, end = int(sizes[k]), starts[k], ends[k]
        if size == 0 or start == end:
            continue
        rows = placed[:, :count]
        together = (rows[2] < end) & (rows[3] > start)
        offset = _lowest_gap(rows[0][together], rows[1][together], size, int(aligns[k]))
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


def around_the_busiest(blocks: Blocks, height: int, share: float, work: int, seed: int) -> Ints | None:
    """Offsets below the height: those that live where the load is at least this share of it are packed exactly, the others first-fit, longest
    first."""
    busy = np.append(0, np.cumsum(_load(blocks) >= share * height))
    chosen = np.flatnonzero(busy[blocks.ends] > busy[blocks.starts])
    _, offsets = _packed(blocks, chosen, height, work, seed)
    return None if offsets is None or int((offsets + blocks.sizes).max(initial=0)) > height else offsets


def _load(blocks: Blocks) -> Ints:
    """Bytes at every step."""
    change = np.zeros(int(blocks.ends.max(initial=0)) + 1, np.int64)
    np.add.at(change, blocks.starts, blocks.sizes)
    np.add.at(change, blocks.ends, -blocks.sizes)
    return np.cumsum(change)


def _ejected(best: Arranged, blocks: Blocks, heights: Sequence[int], work: int, seed: int) -> Arranged:
    """Made better by guided ejection, at the first of ever larger heights at which it finds a place for all."""
    align = int(blocks.aligns.max(initial=1))
    for height in heights:
        if height >= best.arena:
            return best
        search = Ejection(blocks.starts, blocks.ends, blocks.sizes)
        if search.run(height // align * align, work, seed) == 0:
            return best.or_at(search.offsets, blocks)
    return best


def _exact(best: Arranged, blocks: Blocks, enough: int, work: int, seed: int) -> Arranged:
    """Made better: the large blocks packed at `enough`, or at heights halfway between the arena and what had no answer, the others first-fit into
    their holes; with ever more of them large. A proof that there is no packing raises the bound."""
    parts = [part for part in LARGE if (blocks.sizes * part < best.bound).any()]
    for part in (*parts, 0):
        large = np.flatnonzero(blocks.sizes * part >= best.bound) if part else np.arange(len(blocks.sizes))
        failed = enough - 1
        for number in range(HEIGHTS):
            height = (failed + best.arena) // 2 if number else enough
            if not failed < height < best.arena:
                break
            share = work // (1 + len(parts)) // (2 * HEIGHTS if number else 2)
            found, offsets = _packed(blocks, large, height, share, seed)
            before, best = best.arena, best.or_at(offsets, blocks)
            if best.arena == before:
                failed = height
            if found.proven:
                best = best._replace(bound=max(best.bound, height + 1))
    return best


def _grown(best: Arranged, blocks: Blocks, enough: int, work: int, seed: int) -> Arranged:
    """Made better: the largest blocks are packed exactly, and those of the others that end above `enough` join them, highest first, again and again;
    fewer of them where they have no answer together."""
    large = np.flatnonzero(blocks.sizes * GROWN_FROM >= best.bound)
    joining, failures = large[:0], 0
    for _ in range(min(GROWTHS, GROWTH_WORK // (len(blocks.sizes) + 1))):
        tried = np.union1d(large, joining)
        _, filled = _packed(blocks, tried, enough, work // GROWTHS, seed)
        if filled is None:
            failures += 1
            joining = joining[: len(joining) // 2]
            if not len(joining) or failures == FAILURES:
                break
            continue
        large, best = tried, best.or_at(filled, blocks)
        rest = np.setdiff1d(np.arange(len(blocks.sizes)), large)
        tops = (filled + blocks.sizes)[rest]
        above = rest[np.argsort(-tops, kind="stable")][: int((tops > enough).sum())]
        if not len(above):
            break
        joining = above[: max(LEAST_GROWTH, len(above) // 4)]
    return best


def _packed(blocks: Blocks, large: Indices, height: int, work: int, seed: int) -> tuple[Packing, Ints | None]:
    """The large blocks packed below the height; and if that is found, offsets of all, the others first-fit into their holes, longest first."""
    starts, ends, sizes, _ = blocks
    found = pack(starts[large], ends[large], sizes[large], height, work, seed)
    if found.offsets is None:
        return found, None
    rest = np.setdiff1d(np.arange(len(sizes)), large).astype(np.intp)
    rest = rest[np.lexsort((-sizes[rest], starts[rest] - ends[rest]))]
    return found, first_fit(rest, blocks, (large, found.offsets))
