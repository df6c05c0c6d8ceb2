"""One round of evictions: lower every event that is above a target, cheapest microseconds per byte first.

A value that is live across such an event, but not used by it, may be cut there and
 * recomputed: its closure (all ops that must run again, given what stays live) is the price; the values inside the
   closure are cut as well, so that they don't stay live in its place;
 * recomputed from inputs that stay live longer in its place (a small bf16 tensor for a big fp32 one);
 * spilled to disk, or, if persistent, given a home on disk;
and the op that attains the peak may be run in another of its ways.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from solvers.closure import Closure, Question, Rates, closures
from solvers.decode import RUN, Decisions, Tables, Trace
from solvers.emit import Ints, Profile
from solvers.problem import Choice

CLOSURE_LIMITS = (40, 200)  # ops of a closure: short ones are tried first
EVENTS_PER_ROUND = 60
PRICE_FACTORS = (1.0, 8.0, float("inf"))


@dataclass(frozen=True, slots=True)
class State:
    """Decisions and what they lead to."""

    decisions: Decisions
    trace: Trace
    profile: Profile


@dataclass(frozen=True, slots=True)
class Eviction:
    """One way to free bytes at an event. how: "rerun", "disk" or "choice"."""

    how: str
    gain_bytes: int
    cost_us: float
    closure: Closure | None = None

    @property
    def ratio(self) -> float:
        """Microseconds per byte."""
        return self.cost_us / self.gain_bytes


class Round:
    """Works on a copy of the state's decisions; `run` gives the new ones."""

    def __init__(self, tables: Tables, state: State, target_bytes: int, rates: Rates) -> None:
        self.tables, self.trace, self.rates, self.target = tables, state.trace, rates, target_bytes
        self.decisions = state.decisions.copy()
        self.live = state.profile.live_bytes.copy()
        trace = state.trace
        self.closures = closures(tables, trace, self.decisions, rates)
        self.start = np.array(trace.seg_start, dtype=np.int64)
        self.end = np.array(trace.seg_end, dtype=np.int64)
        self.inst_storage = np.array(trace.inst_storage, dtype=np.int64)
        self.storage: Ints = self.inst_storage[np.array(trace.seg_instance, dtype=np.int64)]
        sizes, staying = np.array(tables.size, dtype=np.int64), np.array(tables.pinned, dtype=bool)
        staying[list(rates.kept_storages)] = True
        self.open = (sizes[self.storage] > rates.tiny_bytes) & ~staying[self.storage] & (self.end - self.start > 1)
        self.evicted = np.zeros(len(self.start), dtype=bool)
        self.birth = np.array(trace.inst_birth, dtype=np.int64)
        self.last = np.array(trace.inst_last, dtype=np.int64)
        self.kept_longer: list[tuple[int, int, int]] = []  # (storage, first event, last event)
        self.first_version = (np.array(tables.created_by, dtype=np.int64) >= 0).astype(np.int32)
        self.written = np.zeros(len(sizes), dtype=bool)
        self.written[list(tables.written)] = True
        runs = np.array(trace.subject, dtype=np.int64)[np.array(trace.kind, dtype=np.int64) == RUN]
        self.run_count: list[int] = np.bincount(runs, minlength=len(tables.reads)).tolist()
        self.options: list[tuple[int, int]] = []
        self.applied = 0
        self.closure_limit = CLOSURE_LIMITS[0]

    def group_of(self, event: int) -> int:
        """The group of an event; -1 before the first one, the last group after the last one."""
        if event < 0:
            return -1
        return self.trace.group[event] if event < len(self.trace.group) else len(self.tables.reads)

    def run(self) -> Decisions | None:
        """Evict at the events above the target, highest first. None if nothing can be evicted at the highest."""
        for _ in range(EVENTS_PER_ROUND if len(self.live) else 0):  # without a run or a read there is nothing to relieve
            event = int(self.live.argmax())
            if self.live[event] <= self.target:
                break
            for self.closure_limit in CLOSURE_LIMITS:
                self.relieve(event)
                if self.live[event] <= self.target:
                    break
            if not self.applied:
                return None
            self.live[event] = min(int(self.live[event]), self.target)
        return self.decisions if len(self.live) else None

    def relieve(self, event: int) -> None:
        """Evict at one event, cheapest first, until it is at the target. Prices are refreshed when their turn comes."""
        self.look(event)
        heap: list[tuple[float, int]] = []
        self.options = self.other_choices(event)
        inside = np.flatnonzero((self.start < event) & (self.end > event) & self.open & ~self.evicted)
        for candidate in (*inside.tolist(), *(-1 - k for k in range(len(self.options)))):
            eviction = self.price(candidate, event)
            if eviction is not None:
                heap.append((eviction.ratio, candidate))
        heapq.heapify(heap)
        while heap and self.live[event] > self.target:
            ratio, candidate = heapq.heappop(heap)
            fresh = self.price(candidate, event)
            if fresh is None:
                continue
            if heap and fresh.ratio > ratio * 1.0001 and fresh.ratio > heap[0][0]:
                heapq.heappush(heap, (fresh.ratio, candidate))
                continue
            self.apply(fresh, candidate, event)

    def look(self, event: int) -> None:
        """What is in memory during the event, and at which version, as far as this round knows."""
        present, group = self.closures.present, self.group_of(event)
        storages = self.inst_storage[(self.birth <= event) & (self.last >= event)]
        present.fill(-1)
        present[storages] = self.first_version[storages]
        for storage in storages[self.written[storages]].tolist():
            present[storage] = self.tables.version_at(storage, group)
        present[self.storage[self.evicted & (self.start < event) & (self.end > event)]] = -1
        for storage, first, last in self.kept_longer:
            if first < event < last:
                present[storage] = self.tables.version_at(storage, group)

    def other_choices(self, event: int) -> list[tuple[int, int]]:
        """(op, choice): other ways, which take less, of the event's op; and, where it makes what need not be made, of those who read that."""
        if self.trace.kind[event] != RUN:
            return []
        op = self.trace.subject[event]
        result = [(op, k) for k in self.lighter(op)]
        if self.tables.problem.ops[op].optional:
            for segment in np.flatnonzero(self.start == event).tolist():
                reader, made = self.reader(segment), int(self.storage[segment])
                result += [(reader, k) for k in self.lighter(reader) if made not in self.choices(reader)[k].reads] if reader >= 0 else []
        return result

    def reader(self, segment: int) -> int:
        """The op that runs where the segment ends, or -1."""
        end = int(self.end[segment])
        return self.trace.subject[end] if end < len(self.trace.kind) and self.trace.kind[end] == RUN else -1

    def choices(self, op: int) -> tuple[Choice, ...]:
        return self.tables.problem.ops[op].choices

    def lighter(self, op: int) -> list[int]:
        """Choices of the op that take less memory than its present one."""
        if op in self.rates.kept_ops:
            return []
        now = self.taken(self.choices(op)[self.decisions.choice[op]])
        return [k for k, choice in enumerate(self.choices(op)) if self.taken(choice) < now]

    def taken(self, choice: Choice) -> int:
        """Bytes of a choice's workspace and of what it reads, as far as that can leave memory."""
        return choice.workspace_bytes + sum(self.tables.size[s] for s in choice.reads if not self.tables.pinned[s])

    def price(self, candidate: int, event: int) -> Eviction | None:
        """The best way to evict segment `candidate` (or to take option -1 - candidate) at the event; None: no way."""
        if candidate < 0:
            return self.price_choice(*self.options[-1 - candidate])
        storage = int(self.storage[candidate])
        if self.boundary(candidate, event) is None:
            return None
        if self.tables.problem.storages[storage].persistent:
            return self.price_away(storage)
        ways = [self.price_spill(storage)]
        for factor in PRICE_FACTORS:
            ways.append(self.price_rerun(candidate, event, factor * self.rates.price_us_per_byte))
            if ways[-1] is not None and ways[-1].closure is not None and not ways[-1].closure.extended:
                break
        return min((way for way in ways if way is not None), key=lambda way: way.ratio, default=None)

    def boundary(self, segment: int, event: int) -> int | None:
        """Where to cut the segment; None if it begins and ends in one group."""
        first, last = self.group_of(int(self.start[segment])), self.group_of(int(self.end[segment]))
        group = max(self.group_of(event), first + 1)
        return group if group <= last else None

    def price_choice(self, op: int, k: int) -> Eviction | None:
        now, other = self.choices(op)[self.decisions.choice[op]], self.choices(op)[k]
        here = sum(self.tables.size[s] for s in other.reads if self.closures.present[s] >= 0 and s not in now.reads and not self.tables.pinned[s])
        gain = self.taken(now) - self.taken(other) + here
        if gain <= 0:
            return None
        return Eviction("choice", gain, max(0, other.time_us - now.time_us) * self.run_count[op])

    def price_away(self, storage: int) -> Eviction | None:
        tables = self.tables
        if not tables.may_leave[storage] or (storage in tables.written and not tables.may_spill[storage]):
            return None
        cost = tables.read_us[storage]
        if storage in tables.written and storage not in self.decisions.away:
            cost += tables.write_us[storage]
        return Eviction("disk", tables.size[storage], cost * self.rates.transfer_weight)

    def price_spill(self, storage: int) -> Eviction | None:
        if not self.tables.may_spill[storage]:
            return None
        cost = self.tables.read_us[storage]
        if storage not in self.decisions.spilled:
            cost += self.tables.write_us[storage]
        return Eviction("disk", self.tables.size[storage], cost * self.rates.transfer_weight)

    def price_rerun(self, segment: int, event: int, price: float) -> Eviction | None:
        """Recompute at the segment's end. Inputs that aren't live stay live longer where that is worth `price`."""
        storage = int(self.storage[segment])
        if storage in self.decisions.spilled:
            return None
        size = self.tables.size[storage]
        closure = self.closures.find(Question(storage, self.group_of(int(self.end[segment])), price, self.closure_limit))
        if closure is None:
            return None
        gain = size - closure.extended_bytes
        return Eviction("rerun", gain, closure.cost_us, closure) if gain * 8 >= size and gain > 0 else None

    def apply(self, eviction: Eviction, candidate: int, event: int) -> None:
        """Carry the eviction out in the decisions and in the estimate of live bytes."""
        self.applied += 1
        self.rates.price_us_per_byte = max(self.rates.price_us_per_byte, eviction.ratio)
        if eviction.how == "choice":
            op, k = self.options[-1 - candidate]
            self.decisions.choice[op] = k
            self.closures.chosen(op)
            self.live[event] -= eviction.gain_bytes
            return
        storage, boundary = int(self.storage[candidate]), self.boundary(candidate, event)
        assert boundary is not None
        inner = 0 < boundary and 0 <= self.start[candidate] and self.end[candidate] < len(self.live)
        self.drop(candidate)
        if self.tables.problem.storages[storage].persistent:
            if not (inner and self.tables.stored[storage]):  # whose home may stay memory
                self.move_away(storage)
        elif eviction.how == "disk":
            self.decisions.spilled.add(storage)
            self.closures.gone(storage)
        if inner or not self.tables.problem.storages[storage].persistent:
            self.decisions.cut(storage, boundary)
        if eviction.closure is not None:
            self.apply_closure(eviction.closure, candidate, boundary)

    def apply_closure(self, closure: Closure, candidate: int, boundary: int) -> None:
        first, last = int(self.start[candidate]), int(self.end[candidate])
        for storage in closure.rebuilt:
            if self.tables.size[storage] > self.rates.tiny_bytes:
                self.decisions.cut(storage, boundary)
        for storage in closure.extended:
            self.kept_longer.append((storage, first, last))
            self.closures.present[storage] = self.tables.version_at(storage, boundary)
            self.live[max(first + 1, 0) : last] += self.tables.size[storage]
        for op in closure.ops:
            self.closures.add_rerun(op, self.group_of(last))

    def drop(self, segment: int) -> None:
        """The segment no longer occupies memory between its two events."""
        storage = int(self.storage[segment])
        self.evicted[segment] = True
        self.closures.present[storage] = -1
        self.live[self.start[segment] + 1 : self.end[segment]] -= self.tables.size[storage]

    def move_away(self, storage: int) -> None:
        """Give a persistent storage its home on disk: it leaves memory before its first and after its last use."""
        if storage in self.decisions.away:
            return
        self.decisions.away.add(storage)
        self.closures.gone(storage)
        outer = (self.start < 0) | (self.end >= len(self.live))
        for segment in np.flatnonzero((self.storage == storage) & outer & ~self.evicted).tolist():
            self.drop(segment)
