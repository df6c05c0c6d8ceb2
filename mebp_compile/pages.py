"""Which pages of an arena are in memory, and which go back to the system before a step that needs their bytes elsewhere.

A page is in memory from its first use until it is given back, and costs a page fault when it is used again. So those are given back that nothing
lives on and that are used again last (Belady's rule), no more of them than the step is short of. A step's pages stay for the next step: it
begins with those that the last one left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mebp_compile.overhead import PAGE_BYTES

Ints = NDArray[np.int64]
PIECE = 16  # pages that are given back together, at most; more in an arena of more than MOST_PIECES of them
MOST_PIECES = 4096
PASSES = 4  # over the schedule, until a step leaves no page that the next one was not known to find


class Decommit(NamedTuple):
    """Before schedule step `step` the arena's bytes [low, high) go back to the system: whole pages."""

    step: int
    low: int
    high: int


class Spans(NamedTuple):
    """Of each life in the arena: its steps [start, end) and its bytes [low, high)."""

    start: Ints
    end: Ints
    low: Ints
    high: Ints


def decommits(spans: Spans, rest: Ints, budget_bytes: int) -> tuple[Decommit, ...] | None:
    """What to give back before which step, so that the arena's pages and `rest[step]` bytes never exceed the budget, one step after another
    without end. None where lives alone, rounded to pages, exceed it."""
    cells = _Cells(spans, _pieces(spans))
    begin = np.zeros(len(cells.width), bool)
    for number in range(PASSES):
        found, left = _given_back(cells, begin, rest, budget_bytes)
        if found is None or not (left & ~begin).any():
            return found
        begin |= left if number < PASSES - 2 else True
    raise AssertionError("a step that finds every page leaves one that it did not find")


def resident(spans: Spans, given_back: Sequence[Decommit], steps: int) -> Ints:
    """Bytes of the arena's pages that are in memory at each step, in every step but the first, which has no more."""
    cells = _Cells(spans, [edge // PAGE_BYTES for item in given_back for edge in (item.low, item.high)])
    gone = _by_step((item.step, cells.of(item.low, item.high)) for item in given_back)
    inside, now = np.zeros(len(cells.width), bool), 0
    result: Ints = np.zeros(steps, np.int64)
    for _ in range(2):
        for step in range(steps):
            for part in gone[step]:
                now -= int(cells.width[part][inside[part]].sum())
                inside[part] = False
            for life in cells.starting[step]:
                part = cells.part(life)
                now += int(cells.width[part][~inside[part]].sum())
                inside[part] = True
            result[step] = now
    return result


class _Cells:
    """The arena cut where a life or a piece begins or ends, at whole pages: what is in memory or not as one."""

    def __init__(self, spans: Spans, cuts: Sequence[int]) -> None:
        low, high = spans.low // PAGE_BYTES, -(-spans.high // PAGE_BYTES)
        self.edges = np.unique(np.concatenate([low, high, np.asarray(cuts, np.int64)]))
        self.width: Ints = np.diff(self.edges) * PAGE_BYTES
        self.first, self.last = np.searchsorted(self.edges, low).tolist(), np.searchsorted(self.edges, high).tolist()
        self.start = np.maximum(spans.start, 0).tolist()
        self.order: list[int] = np.argsort(spans.start, kind="stable").tolist()
        self.starting = _by_step((self.start[life], life) for life in self.order)
        self.ending = _by_step(zip(spans.end.tolist(), range(len(spans.end)), strict=True))

    def part(self, life: int) -> slice:
        return slice(self.first[life], self.last[life])

    def of(self, low: int, high: int) -> slice:
        return slice(*np.searchsorted(self.edges, [low // PAGE_BYTES, high // PAGE_BYTES]).tolist())

    def next_uses(self, steps: int) -> tuple[Ints, list[Ints]]:
        """When each cell is first used; and by life, when each of its cells is used next after it, those of the next step coming last."""
        uses: Ints = np.full(len(self.width), 3 * steps, np.int64)
        for life in reversed(self.order):
            uses[self.part(life)] = self.start[life] + steps
        after: list[Ints] = [uses[:0]] * len(self.order)
        for life in reversed(self.order):
            after[life] = uses[self.part(life)].copy()
            uses[self.part(life)] = self.start[life]
        return uses, after


def _given_back(cells: _Cells, begin: NDArray[np.bool_], rest: Ints, budget_bytes: int) -> tuple[tuple[Decommit, ...] | None, Any]:
    """What to give back in a step that finds the cells of `begin` in memory (None where that is not enough), and those that it leaves there."""
    uses, after = cells.next_uses(len(rest))
    inside, lives = begin.copy(), np.zeros(len(cells.width), np.int64)
    now, result = int(cells.width[inside].sum()), []
    for step in range(len(rest)):
        for life in cells.ending[step]:
            lives[cells.part(life)] -= 1
        for life in cells.starting[step]:
            part = cells.part(life)
            now += int(cells.width[part][~inside[part]].sum())
            inside[part], uses[part] = True, after[life]
            lives[part] += 1
        short = now + int(rest[step]) - budget_bytes
        if short > 0:
            idle = np.flatnonzero(inside & (lives == 0))
            idle = idle[np.argsort(-uses[idle], kind="stable")]
            sizes = np.cumsum(cells.width[idle])
            count = int(np.searchsorted(sizes, short)) + 1
            if count > len(idle):
                return None, inside
            inside[idle[:count]] = False
            now -= int(sizes[count - 1])
            result += [Decommit(step, low, high) for low, high in _ranges(cells, np.sort(idle[:count]))]
    return tuple(result), inside


def _ranges(cells: _Cells, some: Ints) -> list[tuple[int, int]]:
    """The bytes of some cells, in order; neighbours together."""
    breaks = np.flatnonzero(np.diff(some) > 1) + 1
    runs = np.split(some, breaks)
    return [(int(cells.edges[run[0]]) * PAGE_BYTES, int(cells.edges[run[-1] + 1]) * PAGE_BYTES) for run in runs]


def _pieces(spans: Spans) -> list[int]:
    """Cuts, in pages, so that no more is given back than has to be."""
    pages = -(-int(spans.high.max(initial=0)) // PAGE_BYTES)
    return list(range(0, pages, max(PIECE, pages // MOST_PIECES)))


def _by_step(pairs: Iterable[tuple[int, Any]]) -> defaultdict[int, list[Any]]:
    result: defaultdict[int, list[Any]] = defaultdict(list)
    for step, item in pairs:
        result[step].append(item)
    return result
