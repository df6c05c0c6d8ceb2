"""Where the transfers of a trace go: the step is walked forward with both clocks, and the disk always does what is due first.

Memory that the trace leaves free is what a transfer may overlap compute with: a read that begins early occupies it until its event, a write
that ends late from the last use on. Before each event
 * writes whose memory the event needs are waited for, and a read that is due is asked for;
 * while the disk would run dry during the event, it gets the ready write or the fitting read with the earliest deadline.
A read's deadline is its event, a write's the event that needs its memory.
"""

from __future__ import annotations

import ctypes
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.arena import Arena
from solvers.decode import READ, Tables, Trace
from solvers.emit import OFFLOAD, PREFETCH, RELEASE, Moves, Transfer, moves_of, run_times
from solvers.evict import State
from solvers.library import load_library, native, pointer

HORIZONS = (0.008, 0.015, 0.03, 0.06, 0.12, 1.0)  # of the step's compute: how long before its event a read may begin
LOOKAHEAD = 12  # reads that are asked whether they fit


@dataclass(frozen=True, slots=True)
class Walk:
    """Its microseconds, whether a longer horizon leads to another, and the transfers."""

    time_us: int
    held_back: bool
    record: list[Transfer]


def placed(tables: Tables, state: State, horizons: Sequence[float] = HORIZONS) -> tuple[int, Moves]:
    """The least time with one of the horizons, as the replay counts it, and the transfers then. The state fits the budget."""
    best = best_walk(tables, state, horizons)
    return best.time_us, moves_of(best.record)


def best_walk(tables: Tables, state: State, horizons: Sequence[float]) -> Walk:
    """The walk of least time, with one of the horizons."""
    in_c = native(len(tables.problem.ops), "transfers")
    walk = NativePlacement(tables, state).run if in_c else lambda horizon: Placement(tables, state, horizon).run()
    best: Walk | None = None
    for horizon in horizons:
        found = walk(horizon)
        if best is None or found.time_us < best.time_us:
            best = found
        if not found.held_back:  # a longer horizon is the same walk
            break
    assert best is not None
    return best


class Placement:
    """One walk. horizon: how long before its event a read may begin, as a share of the step's compute."""

    def __init__(self, tables: Tables, state: State, horizon: float) -> None:
        self.tables, self.trace = tables, state.trace
        trace, self.count = state.trace, len(state.trace.kind)
        self.slack = tables.problem.budget_bytes - state.profile.live_bytes
        self.times = run_times(tables, state.decisions, trace)
        self.before_us = [0, *np.cumsum(np.array(self.times, dtype=np.int64)).tolist()]
        self.reads = [event for event, kind in enumerate(trace.kind) if kind == READ]
        self.horizon_us = horizon * self.before_us[-1]
        self.held_back = False  # a read could not begin yet because of the horizon
        self.next_read = 0
        self.record: list[Transfer] = []
        self.done: dict[int, int] = {}  # read event -> time at which it is complete
        self.complete: dict[int, int] = {}  # written instance -> likewise
        self.clock = self.disk = 0
        self.following = _next_births(trace)
        self.blocked = self._blocked_until()
        self.ready: dict[int, list[int]] = {}
        self.past: dict[int, list[int]] = {}
        for i in trace.writes:
            self.ready.setdefault(trace.inst_ready[i] + 1, []).append(i)
            self.past.setdefault(trace.inst_last[i] + 1, []).append(i)
        self.queue: list[tuple[int, int]] = []  # (deadline, written instance), ready and not yet asked for
        self.carried: list[int] = []  # written instances past their last use, still in memory

    def _blocked_until(self) -> dict[int, int]:
        """For every read event the event before which the storage is in memory once more, or a discarded copy; endless while that is to be
        written."""
        previous: dict[int, int] = {}
        result = {}
        written = set(self.trace.writes)
        for i, storage in enumerate(self.trace.inst_storage):
            birth = self.trace.inst_birth[i]
            if birth >= 0 and self.trace.kind[birth] == READ and self.trace.subject[birth] == storage:
                result[birth] = previous.get(storage, 0)
            previous[storage] = self.count + 1 if i in written else self.trace.inst_last[i] + 1
        for event, storage in self.trace.extra:
            for birth, bound in result.items():
                if self.trace.subject[birth] == storage and bound <= event < birth:
                    result[birth] = event + 1
        return result

    def run(self) -> Walk:
        for event in range(self.count):
            self.queue_writes(event)
            self.make_room(event)
            if self.trace.kind[event] == READ:
                if event not in self.done:
                    self.ask_read(event, event)
                self.clock = max(self.clock, self.done[event])
            else:
                self.keep_busy(event)
                self.clock += self.times[event]
        self.queue_writes(self.count)
        self.make_room(self.count)
        return Walk(self.clock, self.held_back, self.record)

    def queue_writes(self, event: int) -> None:
        for i in self.ready.get(event, ()):
            heapq.heappush(self.queue, (self.deadline(i), i))

    def deadline(self, i: int) -> int:
        """The event that needs the memory of a written instance."""
        first, last = self.trace.inst_last[i] + 1, self.following[i]
        short = self.slack[first:last] < self.tables.size[self.trace.inst_storage[i]]
        return first + int(short.argmax()) if short.any() else last

    def transfer(self, duration: int) -> int:
        """As the replay does it; returns the time at which it is complete."""
        self.disk = max(self.clock, self.disk) + duration
        self.clock += math.floor(self.tables.problem.interference * duration)
        return self.disk

    def ask_read(self, read: int, event: int) -> None:
        storage = self.trace.subject[read]
        self.slack[event:read] -= self.tables.size[storage]
        self.done[read] = self.transfer(self.tables.read_us[storage])
        self.record.append((event, PREFETCH, storage))

    def ask_write(self, i: int, event: int) -> None:
        storage = self.trace.inst_storage[i]
        self.complete[i] = self.transfer(self.tables.write_us[storage])
        self.record.append((event, OFFLOAD, storage))

    def release(self, i: int, event: int) -> None:
        """Wait for the write, and free."""
        if i not in self.complete:
            self.ask_write(i, event)
        storage, following = self.trace.inst_storage[i], self.following[i]
        self.clock = max(self.clock, self.complete[i])
        self.record.append((event, RELEASE, storage))
        if following in self.blocked:
            self.blocked[following] = event

    def make_room(self, event: int) -> None:
        """Release what is written; of the others, what can't stay in memory during the event."""
        kept = []
        self.carried += self.past.get(event, ())
        for i in sorted(self.carried, key=lambda i: (-self.complete.get(i, 1 << 62), i)):
            if self.complete.get(i, 1 << 62) <= self.clock or event >= self.following[i] or not self.may_stay(i, event):
                self.release(i, event)
            else:
                self.stay(i, event)
                kept.append(i)
        self.carried = kept

    def may_stay(self, i: int, event: int) -> bool:
        """Whether a written instance past its last use leaves the event the memory that it needs."""
        return bool(self.slack[event] >= self.tables.size[self.trace.inst_storage[i]])

    def stay(self, i: int, event: int) -> None:
        self.slack[event] -= self.tables.size[self.trace.inst_storage[i]]

    def keep_busy(self, event: int) -> None:
        """Ask for transfers until the disk has enough to do during the event."""
        while self.disk < self.clock + self.times[event]:
            while self.queue and self.queue[0][1] in self.complete:
                heapq.heappop(self.queue)
            read = self.fitting_read(event, self.queue[0][0] if self.queue else self.count)
            if read >= 0:
                self.ask_read(read, event)
            elif self.queue:
                self.ask_write(heapq.heappop(self.queue)[1], event)
            else:
                return

    def fitting_read(self, event: int, before: int) -> int:
        """The first read, of those due before a deadline, that may begin now; -1: none."""
        while self.next_read < len(self.reads) and (self.reads[self.next_read] < event or self.reads[self.next_read] in self.done):
            self.next_read += 1
        for read in self.reads[self.next_read : self.next_read + LOOKAHEAD]:
            if read > before:
                return -1
            if self.before_us[read] - self.before_us[event] > self.horizon_us:
                self.held_back = True
                return -1
            if read not in self.done and self.blocked[read] <= event and self.fits(read, event):
                return read
        return -1

    def fits(self, read: int, event: int) -> bool:
        """Whether there is memory for it from this event on."""
        return bool(self.slack[event:read].min(initial=1 << 62) >= self.tables.size[self.trace.subject[read]])


def _next_births(trace: Trace) -> dict[int, int]:
    """For every written instance the event in which the next instance of its storage begins."""
    following: dict[int, int] = {}
    result = {}
    written = set(trace.writes)
    for i in range(len(trace.inst_storage) - 1, -1, -1):
        storage = trace.inst_storage[i]
        if i in written:
            result[i] = following.get(storage, len(trace.kind))
        following[storage] = trace.inst_birth[i]
    return result


class NativePlacement:
    """The same walks in C (transfers.c), of one state with one horizon, or in one arena, after the other."""

    def __init__(self, tables: Tables, state: State) -> None:
        problem, trace = tables.problem, state.trace
        events, extras = zip(*trace.extra, strict=True) if trace.extra else ((), ())
        indices = (trace.kind, trace.subject, trace.inst_storage, trace.inst_birth, trace.inst_last, trace.inst_ready, trace.writes, events, extras)
        amounts = (tables.size, tables.read_us, tables.write_us, run_times(tables, state.decisions, trace), state.profile.live_bytes)
        self.columns: list[NDArray[Any]] = [np.array(column, np.int32) for column in indices]
        self.columns += [np.array(column, np.int64) for column in amounts]
        self.step = _Step(
            len(trace.kind), len(trace.inst_storage), len(trace.writes), len(extras), len(tables.size), LOOKAHEAD,
            *map(pointer, self.columns), problem.budget_bytes, problem.interference,
        )  # fmt: skip
        self.record = np.empty((trace.kind.count(READ) + 2 * len(trace.writes), 3), np.int32)

    def run(self, horizon: float, arena: Arena | None = None) -> Walk:
        """As Placement's; with an arena, which is changed, as ArenaPlacement's. Raises MemoryError."""
        places = _places(arena) if arena else None
        library = load_library("transfers")
        assert library is not None
        library.mebp_place_transfers.restype = ctypes.c_int64
        records, held_back = ctypes.c_int64(), ctypes.c_int32()
        time_us = library.mebp_place_transfers(
            ctypes.byref(self.step), ctypes.byref(places) if places else None, ctypes.c_double(horizon), pointer(self.record),
            ctypes.byref(records), ctypes.byref(held_back),
        )
        if time_us < 0:
            raise MemoryError(f"no memory to place the transfers of {len(self.columns[0])} events")
        return Walk(time_us, bool(held_back.value), list(map(tuple, self.record[: records.value].tolist())))


class ArenaPlacement(Placement):
    """A walk that keeps clear of what lies in an arena. A read that is asked for early takes the first place it finds there; a write's memory stays
    until others need its bytes. arena: each instance as short as it can be; changed to what they take."""

    def __init__(self, tables: Tables, state: State, horizon: float, arena: Arena) -> None:
        self.arena, trace = arena, state.trace
        self.made = {birth: i for i, birth in enumerate(trace.inst_birth) if birth >= 0 and trace.kind[birth] == READ}
        super().__init__(tables, state, horizon)

    def deadline(self, i: int) -> int:
        return min(super().deadline(i), self.arena.taken(i, self.trace.inst_last[i] + 1))

    def ask_read(self, read: int, event: int) -> None:
        i = self.made[read]
        if event < read:
            self.arena.low[i] = self.arena.place_for(i, event)
        self.arena.begin[i] = event
        super().ask_read(read, event)

    def release(self, i: int, event: int) -> None:
        super().release(i, event)
        self.arena.end[i] = event

    def may_stay(self, i: int, event: int) -> bool:
        return super().may_stay(i, event) and self.arena.taken(i, event) > event

    def stay(self, i: int, event: int) -> None:
        super().stay(i, event)
        self.arena.end[i] = event + 1

    def fits(self, read: int, event: int) -> bool:
        return super().fits(read, event) and self.arena.place_for(self.made[read], event) >= 0


class _Places(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int32), ("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("height", ctypes.c_int64),
        ("low", ctypes.c_void_p), ("size", ctypes.c_void_p),
    ]  # fmt: skip


def _places(arena: Arena) -> _Places:
    """The arena as C has it: the same numbers, not a copy."""
    begin, end, low, size = (pointer(column) for column in (arena.begin, arena.end, arena.low, arena.size))
    return _Places(len(arena.low), begin, end, arena.height, low, size)


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("events", "instances", "writes", "extras", "storages", "lookahead")),
        *((name, ctypes.c_void_p) for name in ("kind", "subject", "storage", "birth", "last", "ready", "write", "extra_event", "extra")),
        *((name, ctypes.c_void_p) for name in ("size", "read_us", "write_us", "times", "live")),
        ("budget_bytes", ctypes.c_int64), ("interference", ctypes.c_double),
    ]  # fmt: skip
