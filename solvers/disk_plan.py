"""What stays in memory and what goes to disk, for a state whose runs are given: a linear program over phases of the step with both clocks.

The runs of a trace stay as they are; of every storage that may be on disk each *gap* between two uses is decided anew. For gap g = (a, b), phase p:
    x[g]     it stays in memory          r[g, p]  it is read from disk in phase p
    w[e, p]  the value that begins at change e is written to disk in phase p          h[s]  the home of persistent s is memory
    D[e, p] = (1 - h[s] where e is the start of the step) + sum of w[e, .] up to p: what is on disk;     R[g, p] = sum of r[g, .] up to p
    (what is stored has no w, and D = 1 after its first use)
minimise the sum of the phases' lengths, each at least as long as either clock needs
    x[g] + R[g, end] = 1;     R[g, p] <= D[e, p];     after the last use x = h, and D = 1 - h where the step changed it
    in memory within a gap: o[g, p] >= x + R[g, p],  >= 1 - D[e, p]: a transfer counts by half in its own phase;     all that is there <= budget
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from solvers.decode import READ, RUN, Decisions, Tables
from solvers.emit import run_times
from solvers.evict import State
from solvers.gaps import TINY_SHARE, Gap, beside_gaps, in_one_group, movable_gaps, with_gaps
from solvers.linear import Expression, LinearProgram, Variable

UNIT = 1024.0  # bytes
WINDOW = 5  # phases: a read begins at most so many before its use, a write ends at most so many after its change
KEPT = 0.5
PART = 1e-3
MOST_PARTS = 100
WHOLE_SECONDS, WHOLE_GAP = 5.0, 5e-3
SHARES = (1.0, 0.97, 0.94)
LEAST_SECONDS = 0.1
DISK_US = 1e-3  # of each transfer: ties are decided for the disk


class DiskPlan(LinearProgram):
    """The linear program. `build`, then `solve`."""

    def __init__(self, tables: Tables, state: State, phases: int) -> None:
        super().__init__()
        self.tables, self.state, self.trace = tables, state, state.trace
        self.count, self.phases = len(state.trace.kind), phases
        self.room = self.variable()  # KiB of the budget
        self.gaps = movable_gaps(tables, state, int(TINY_SHARE * tables.problem.budget_bytes))
        self.fixed_bytes, self.using = beside_gaps(tables, state, self.gaps)
        times = run_times(tables, state.decisions, state.trace)
        clock = np.cumsum(np.array(times, dtype=np.int64))
        self.phase: list[int] = np.minimum((clock - times) * phases // max(1, int(clock[-1])), phases - 1).tolist()
        self.busy = [Expression() for _ in range(phases)]
        for event, us in enumerate(times):
            self.busy[self.phase[event]].constant += us
        self.disk = [Expression() for _ in range(phases)]
        self.home: dict[int, Variable] = {}
        self.stay: dict[Gap, Variable | float] = {}
        self.read: dict[tuple[Gap, int], Variable] = {}
        self.written: dict[tuple[int, int, int], Variable] = {}  # (storage, change, phase)
        self.there: dict[tuple[Gap, int], Expression] = {}

    def phase_of(self, event: int) -> int:
        return 0 if event < 0 else self.phases - 1 if event >= self.count else self.phase[event]

    def build(self) -> None:
        for s, gaps in self.gaps.items():
            if self.tables.problem.storages[s].persistent:
                self.home[s] = self.share()
            for change, same in itertools.groupby(gaps, key=lambda gap: gap.change):
                self.add_value(s, change, list(same))
        self.add_memory()
        length = Expression()
        for busy, disk in zip(self.busy, self.disk, strict=True):
            busy.add(disk, self.tables.problem.interference)
            phase = self.variable()
            length.add(phase).add(disk, DISK_US)
            self.row(Expression().add(phase).add(busy, -1.0), 0.0)
            self.row(Expression().add(phase).add(disk, -1.0), 0.0)
        self.minimise(length)

    def add_value(self, s: int, change: int, gaps: list[Gap]) -> None:
        """The gaps of a storage between two changes of it."""
        first, last = self.phase_of(change), self.phase_of(gaps[-1].b) if self.tables.may_spill[s] else -1
        for p in range(first, min(last, first + WINDOW - 1) + 1):
            self.written[s, change, p] = self.share()
            self.disk[p].add(self.written[s, change, p], self.tables.write_us[s])
        for gap in gaps:
            self.add_gap(gap)
        if change >= 0 and s in self.home and gaps[-1].b == self.count:
            self.row(self.on_disk(gaps[-1], self.phases).add(self.home[s]), 1.0)

    def on_disk(self, gap: Gap, last: float, half: bool = False) -> Expression:
        """D: the share of the value on disk after phase `last`; half: what is written in that phase counts by half."""
        result = Expression()
        if self.tables.stored[gap.storage] and gap.a >= 0:
            return result.add(1.0)
        if gap.change < 0 and gap.storage in self.home:
            result.add(1.0).add(self.home[gap.storage], -1.0)
        first = self.phase_of(gap.change)
        for p in range(first, first + WINDOW):
            if p <= last and (gap.storage, gap.change, p) in self.written:
                result.add(self.written[gap.storage, gap.change, p], 0.5 if half and p == last else 1.0)
        return result

    def add_gap(self, gap: Gap) -> None:
        first, last = self.phase_of(gap.a), self.phase_of(gap.b)
        if gap.b == self.count:
            self.stay[gap] = self.home[gap.storage]
        elif self.stays(gap):
            self.stay[gap] = 1.0
        else:
            self.stay[gap] = self.share()
            for p in range(max(first, last - WINDOW + 1), last + 1):
                self.read[gap, p] = self.share()
                self.disk[p].add(self.read[gap, p], self.tables.read_us[gap.storage])
            self.row(Expression().add(self.stay[gap]).add(self.reads(gap, last)), 1.0, 1.0)
        for p in range(first, last + 1):
            self.add_presence(gap, p)

    def stays(self, gap: Gap) -> bool:
        """It is too short for anything else."""
        in_one_phase = gap.a >= 0 and self.phase_of(gap.a) == self.phase_of(gap.b)
        return gap.b < self.count and (in_one_group(self.tables, self.trace, gap) or in_one_phase)

    def reads(self, gap: Gap, until: int, half: bool = False) -> Expression:
        """R: the share of the gap's value read up to a phase; half: what is read in that phase counts by half."""
        result, last = Expression(), self.phase_of(gap.b)
        for p in range(last - WINDOW + 1, until + 1):
            if (gap, p) in self.read:
                result.add(self.read[gap, p], 0.5 if half and p == until else 1.0)
        return result

    def add_presence(self, gap: Gap, p: int) -> None:
        """o: what is in memory of the gap's value during phase p."""
        kept = Expression().add(self.stay[gap])
        if isinstance(self.stay[gap], float):
            self.there[gap, p] = kept
            return
        kept.add(self.reads(gap, p, half=True))
        if (gap, p) in self.read:
            self.row(self.on_disk(gap, p).add(self.reads(gap, p), -1.0), 0.0)
        if p >= self.phase_of(gap.change) + WINDOW:  # what is ever written is written by then
            self.there[gap, p] = kept
            return
        there = self.share()
        self.row(Expression().add(there).add(kept, -1.0), 0.0)
        self.row(Expression().add(there).add(self.on_disk(gap, p, half=True)), 1.0)
        self.there[gap, p] = Expression().add(there)

    def add_memory(self) -> None:
        """Whole phases of a gap in one variable for each phase; the events at which a gap begins or ends each in a row."""
        through = [Expression() for _ in range(self.phases)]
        local: list[list[Gap]] = [[] for _ in range(self.phases)]
        for gap in itertools.chain(*self.gaps.values()):
            first, last = self.phase_of(gap.a), self.phase_of(gap.b)
            for p in range(first, last + 1):
                whole = (p > first or gap.a < 0) and (p < last or gap.b == self.count)
                if whole:
                    through[p].add(self.there[gap, p], self.tables.size[gap.storage] / UNIT)
                else:
                    local[p].append(gap)
        for p, events in itertools.groupby(self.rows_at(), key=lambda event: self.phase[event]):
            whole_bytes = self.variable()
            self.row(Expression().add(whole_bytes).add(through[p], -1.0), 0.0)
            for event in events:
                row = Expression(constant=float(self.fixed_bytes[event]) / UNIT).add(whole_bytes)
                for gap in local[p]:
                    if gap.a < event < gap.b:
                        row.add(self.there[gap, p], self.tables.size[gap.storage] / UNIT)
                self.row(row.add(self.room, -1.0), most=0.0)

    def least_bytes(self) -> int:
        """The peak with everything on disk that may be there: no plan needs less."""
        least = self.fixed_bytes.copy()
        for gap in itertools.chain(*self.gaps.values()):
            if self.stays(gap):
                least[gap.a + 1 : gap.b] += self.tables.size[gap.storage]
        return int(max((least[event] for event, kind in enumerate(self.trace.kind) if kind == RUN), default=0))

    def rows_at(self) -> list[int]:
        """Events that use a gap's storage, and between two of them the one that needs most."""
        at = set(self.using)
        edges = sorted({*at, *(bisect_right(self.phase, p) for p in range(self.phases)), -1, self.count})
        for a, b in itertools.pairwise(edges):
            if b > a + 1:
                at.add(a + 1 + int(self.fixed_bytes[a + 1 : b].argmax()))
        return sorted(e for e in at if e < self.count and self.trace.kind[e] != READ)

    def solve(self, share: float, seconds: float) -> Decisions | None:
        """The best decisions within a share of the budget; None where there are none, or not in time. What the program would keep in part is kept
        whole or not at all in a second one: half of a large storage is no small error. The rest, where that fails, is rounded."""
        self.lower[self.room] = self.upper[self.room] = share * self.tables.problem.budget_bytes / UNIT
        values = self.run(seconds)
        if not values:
            return None
        kept = (variable for variable in (*self.stay.values(), *self.home.values()) if not isinstance(variable, float))
        parts = [variable for variable in kept if PART < values[variable] < 1 - PART]
        whole = self.run(min(seconds, WHOLE_SECONDS), parts) if 0 < len(parts) <= MOST_PARTS else ()
        return self.decisions(whole or values)

    def run(self, seconds: float, whole: Sequence[Variable] = ()) -> Sequence[float]:
        """The program's solution, with some variables in whole numbers; empty where it has none in time."""
        answer = self.answer(max(seconds, LEAST_SECONDS), WHOLE_GAP, whole)
        return answer.values if answer is not None else ()

    def decisions(self, values: Sequence[float]) -> Decisions:
        def stays(gap: Gap) -> bool:
            stay = self.stay[gap]
            return isinstance(stay, float) or values[stay] >= KEPT

        return with_gaps(self.tables, self.state, self.gaps, stays, {s for s, home in self.home.items() if values[home] >= KEPT})


def plans(tables: Tables, state: State, phases: int, deadline: float) -> Iterator[Decisions]:
    """The state with what goes to disk decided anew, for some shares of the budget: rounded they may exceed it a little. Ends at the deadline
    (time.monotonic)."""
    if time.monotonic() > deadline:
        return
    plan = DiskPlan(tables, state, phases)
    if not plan.gaps or plan.least_bytes() > tables.problem.budget_bytes:
        return
    plan.build()
    for share in SHARES:
        left = deadline - time.monotonic()
        decisions = plan.solve(share, left) if left > 0 else None
        if decisions is None:
            return
        yield decisions
