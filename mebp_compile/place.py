"""Offsets: which storages lie in the arena, where, when its pages go back to the system, and what the whole footprint then is.

Where the budget has room for it, the arena is there whole all the time. Where it has not, its pages count only while they are in memory, and some of
them are given back before a step that needs the bytes for a workspace or for what the allocator serves (`pages.py`). On an accelerator, whose memory
has no such pages, and where rounding to pages costs more than there is, the arena is cut off at the top until it fits: what lay there stays with the
allocator. No arena at all always fits, so placement never refuses a schedule that the checker accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import solvers
from mebp_compile.graph import Graph
from mebp_compile.overhead import allocated_bytes
from mebp_compile.pages import Decommit, Spans, decommits, resident
from solvers import Free, Lifespan, Prefetch, Problem, Run, Schedule

ALIGN = 64
SMALLEST_BYTES = (4096, 65536)  # below the first the allocator's own caches are faster than any arena; the second where pages are dear
SHARES = [0.9**trial for trial in range(40)]  # of an arena that has everything

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """offsets: arena offset of a storage by (step that makes it, storage). peak_bytes: arena + allocator + workspace + constant at the
    worst step. decommits: pages of the arena that go back to the system, in the order of their steps; without any the arena counts whole."""

    offsets: dict[tuple[int, int], int]
    arena_bytes: int
    peak_bytes: int
    decommits: tuple[Decommit, ...] = ()


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
    records = returning(graph, schedule)
    alive: dict[int, tuple[int, bool]] = {index: (-1, index in records) for index in schedule.at_start(problem)}
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
            fits = step.storage in records or step.storage not in schedule.resident
            alive[step.storage] = (number, fits and step.storage not in outputs)
        elif isinstance(step, Free) and step.storage in alive:
            start, fits = alive.pop(step.storage)
            result.append(life(step.storage, start, number, fits))
    return result + [life(storage, start, len(schedule.steps), fits and storage in records) for storage, (start, fits) in alive.items()]


def returning(graph: Graph, schedule: Schedule) -> set[int]:
    """Packed weights at home in memory that leave it in mid-step and come back: each has one place in the arena for all its lives."""
    return {index for index in leaving(schedule) if graph.storages[index].role == "weight"} if not graph.device else set()


def leaving(schedule: Schedule) -> set[int]:
    """What is at home in memory and leaves it in mid-step."""
    return {step.storage for step in schedule.steps if isinstance(step, Free)} & schedule.resident


def place_under(graph: Graph, problem: Problem, schedule: Schedule, fitted: solvers.Placement | None = None) -> Placement:
    """The placement of most bytes whose footprint stays within the problem's budget. fitted: offsets of the schedule's lifespans, if they are known;
    not used where packed weights leave memory and come back, which have one place for all their lives."""
    every, steps, budget_bytes = lives(graph, problem, schedule), len(schedule.steps), problem.budget_bytes
    fixed = workspace_profile(problem, schedule) + problem.constant_bytes
    records = returning(graph, schedule)
    for smallest_bytes in SMALLEST_BYTES:
        some = [life for life in every if life.fits_arena and (life.size_bytes >= smallest_bytes or life.storage in records)]
        items = [Lifespan(life.storage, life.start, life.end, life.size_bytes, ALIGN) for life in some]
        spare_bytes = budget_bytes - int((fixed + _beside(every, some, steps)).max(initial=0))
        known = _known(some, problem, schedule, fitted) if fitted is not None and not records else None
        offsets = known or solvers.place(items, enough_bytes=spare_bytes, fixed=_at_home(some, records)).offsets
        pairs = list(zip(some, offsets, strict=True))
        arena_bytes = max((low + life.size_bytes for life, low in pairs), default=0)
        for share in SHARES:
            cap_bytes = int(share * arena_bytes)
            places = {(life.start, life.storage): low for life, low in pairs if low + life.size_bytes <= cap_bytes or life.storage in records}
            found = _held(every, places, fixed, budget_bytes, whole=bool(graph.device))
            if found is not None:
                return found
    return Placement({}, 0, int((fixed + _beside(every, [], steps)).max(initial=0)))


def _known(some: Sequence[Life], problem: Problem, schedule: Schedule, fitted: solvers.Placement) -> list[int]:
    """The offset of each life in a placement of all, without what lies below the lowest."""
    items = solvers.lifespans(problem, schedule)
    places = {(item.start, item.id): low for item, low in zip(items, fitted.offsets, strict=True)}
    lows = [places[max(0, life.start), life.storage] for life in some]
    lowest = min(lows, default=0)
    return [low - lowest for low in lows]


def _at_home(some: Sequence[Life], records: Collection[int]) -> dict[int, int]:
    """By the number of the life, an offset for each life of a record: the same in all of them, one record above the other."""
    places: dict[int, int] = {}
    low = 0
    for life in some:
        if life.storage in records and life.storage not in places:
            places[life.storage] = low
            low += -(-life.size_bytes // ALIGN) * ALIGN
    return {number: places[life.storage] for number, life in enumerate(some) if life.storage in records}


def _held(every: list[Life], offsets: dict[tuple[int, int], int], fixed: Ints, budget_bytes: int, whole: bool) -> Placement | None:
    """Lives at their offsets, beside what is not in the arena and `fixed[step]` bytes; None if that is not within the budget. whole: no page can
    be given back."""
    inside = [life for life in every if (life.start, life.storage) in offsets]
    arena_bytes = max((offsets[life.start, life.storage] + life.size_bytes for life in inside), default=0)
    rest = fixed + _beside(every, inside, len(fixed))
    if arena_bytes + int(rest.max(initial=0)) <= budget_bytes:
        return Placement(offsets, arena_bytes, arena_bytes + int(rest.max(initial=0)))
    given_back = None if whole else decommits(spans(inside, offsets), rest, budget_bytes)
    if given_back is None:
        return None
    placement = Placement(offsets, arena_bytes, 0, given_back)
    return replace(placement, peak_bytes=int((arena_profile(inside, placement, len(rest)) + rest).max()))


def arena_profile(every: Sequence[Life], placement: Placement, steps: int) -> Ints:
    """What the arena takes at each step: its whole size, or its pages in memory where some are given back."""
    if not placement.decommits:
        return np.full(steps, placement.arena_bytes, np.int64)
    inside = [life for life in every if (life.start, life.storage) in placement.offsets]
    return resident(spans(inside, placement.offsets), placement.decommits, steps)


def spans(some: Sequence[Life], offsets: Mapping[tuple[int, int], int]) -> Spans:
    """When and where lives are in the arena."""
    rows = [(life.start, life.end, offsets[life.start, life.storage], life.size_bytes) for life in some]
    start, end, low, size = np.array(rows, np.int64).reshape(-1, 4).T
    return Spans(start, end, low, low + size)


def _beside(every: Sequence[Life], inside: Sequence[Life], steps: int) -> Ints:
    """Bytes charged for the lives at every step, from the one that makes a storage up to the one before its Free; of those in the arena only what
    they take beside their bytes there."""
    placed = set(map(id, inside))
    change: Ints = np.zeros(steps + 2, np.int64)
    for life in every:
        charged_bytes = life.charged_bytes - (life.outside_bytes if id(life) in placed else 0)
        change[max(0, life.start)] += charged_bytes
        change[life.end] -= charged_bytes
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
