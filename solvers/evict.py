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
from dataclasses import dataclass, field

import numpy as np

from solvers.decode import RUN, Decisions, Tables, Trace
from solvers.emit import Ints, Profile
from solvers.problem import Choice

CLOSURE_LIMITS = (40, 200)  # ops of a closure: short ones are tried first
EVENTS_PER_ROUND = 60
PRICE_FACTORS = (1.0, 8.0, float("inf"))
NEARBY_GROUPS = 64


@dataclass(frozen=True, slots=True)
class State:
    """Decisions and what they lead to."""

    decisions: Decisions
    trace: Trace
    profile: Profile


@dataclass(slots=True)
class Closure:
    """What bringing a value back takes: microseconds, inputs kept longer, storages rebuilt, ops run again."""

    cost_us: float = 0.0
    visits: int = 0  # never rolled back: it bounds the search for the closure
    extended_bytes: int = 0
    extended: list[int] = field(default_factory=list)
    rebuilt: list[int] = field(default_factory=list)
    ops: list[int] = field(default_factory=list)

    def value(self, price: float) -> float:
        """Microseconds, with each byte kept longer counted at `price`."""
        return self.cost_us + (price * self.extended_bytes if self.extended_bytes else 0.0)

    def mark(self) -> tuple[float, int, int, int, int]:
        """A point to roll back to."""
        return self.cost_us, self.extended_bytes, len(self.extended), len(self.rebuilt), len(self.ops)

    def rollback(self, mark: tuple[float, int, int, int, int]) -> None:
        """Forget what was added since `mark`."""
        self.cost_us, self.extended_bytes = mark[0], mark[1]
        del self.extended[mark[2] :], self.rebuilt[mark[3] :], self.ops[mark[4] :]


@dataclass(frozen=True, slots=True)
class _Question:
    """What a closure is asked for: storage to be back at group `use`; what a byte kept longer is worth."""

    storage: int
    use: int
    price: float


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


@dataclass(slots=True)
class Rates:
    """How the rounds judge: price_us_per_byte grows with the evictions made; transfers count with a weight < 1
    where they overlap compute; storages up to tiny_bytes stay; lost storages can't be recomputed; kept storages stay, and kept ops run as they do."""

    transfer_weight: float
    tiny_bytes: int
    price_us_per_byte: float = 1e-9
    lost: set[int] = field(default_factory=set)
    kept_storages: frozenset[int] = frozenset()
    kept_ops: frozenset[int] = frozenset()


class Round:
    """Works on a copy of the state's decisions; `run` gives the new ones."""

    def __init__(self, tables: Tables, state: State, target_bytes: int, rates: Rates) -> None:
        self.tables, self.trace, self.rates, self.target = tables, state.trace, rates, target_bytes
        self.decisions = state.decisions.copy()
        self.live = state.profile.live_bytes.copy()
        trace = state.trace
        self.instance = np.array(trace.seg_instance, dtype=np.int64)
        self.start = np.array(trace.seg_start, dtype=np.int64)
        self.end = np.array(trace.seg_end, dtype=np.int64)
        self.storage: Ints = np.array(trace.inst_storage, dtype=np.int64)[self.instance]
        sizes, staying = np.array(tables.size, dtype=np.int64), np.array(tables.pinned, dtype=bool)
        staying[list(rates.kept_storages)] = True
        self.open = (sizes[self.storage] > rates.tiny_bytes) & ~staying[self.storage] & (self.end - self.start > 1)
        self.evicted = np.zeros(len(self.start), dtype=bool)
        self.birth = np.array(trace.inst_birth, dtype=np.int64)
        self.last = np.array(trace.inst_last, dtype=np.int64)
        self.kept_longer: list[tuple[int, int, int]] = []  # (storage, first event, last event)
        self.reruns = _reruns(trace)
        self.run_count = _run_counts(trace, len(tables.reads))
        self.present: dict[int, int] = {}
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
        self.present = self.present_at(event)
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

    def present_at(self, event: int) -> dict[int, int]:
        """Storages in memory during the event -> version, as far as this round knows."""
        inside = np.flatnonzero((self.birth <= event) & (self.last >= event)).tolist()
        group = self.group_of(event)
        present = {s: self.tables.version_at(s, group) for s in (self.trace.inst_storage[i] for i in inside)}
        gone = np.flatnonzero(self.evicted & (self.start < event) & (self.end > event))
        for storage in self.storage[gone].tolist():
            present.pop(storage, None)
        for storage, first, last in self.kept_longer:
            if first < event < last:
                present[storage] = self.tables.version_at(storage, group)
        return present

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
        here = sum(self.tables.size[s] for s in other.reads if s in self.present and s not in now.reads and not self.tables.pinned[s])
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
        use = self.group_of(int(self.end[segment]))
        closure, size = Closure(), self.tables.size[storage]
        version = self.tables.version_at(storage, use)
        if not self.rebuild(storage, version, _Question(storage, use, price), closure, float("inf")):
            return None
        gain = size - closure.extended_bytes
        return Eviction("rerun", gain, closure.cost_us, closure) if gain * 8 >= size and gain > 0 else None

    def rebuild(self, storage: int, version: int, question: _Question, closure: Closure, cap: float) -> bool:
        """Add to the closure what running the value's producer again takes. False: impossible, or dearer than cap."""
        tables, use = self.tables, question.use
        producer = tables.producer.get((storage, version), -1)
        if producer < 0 or not tables.problem.ops[producer].rerunnable or storage in self.rates.lost:
            return False
        closure.visits += 1
        closure.rebuilt.append(storage)
        if producer in closure.ops:
            return True
        closure.ops.append(producer)
        choice = self.decisions.choice[producer]
        if not self.runs_nearby(producer, use):
            closure.cost_us += tables.problem.ops[producer].choices[choice].time_us
        if closure.visits > self.closure_limit:
            return False
        for need, need_version in tables.needs(producer, choice):
            chained = need == storage and tables.created_by[need] >= 0
            if need in tables.written and not chained and tables.version_at(need, use) != need_version:
                return False
            if not self.bring(need, need_version, question, closure, cap):
                return False
        return closure.value(question.price) <= cap

    def bring(self, storage: int, version: int, question: _Question, closure: Closure, cap: float) -> bool:
        """Add to the closure what the input takes: nothing if live, a read, its own closure, or a longer life."""
        is_root = storage == question.storage
        if (not is_root and self.present.get(storage) == version) or storage in closure.extended:
            return True
        if not is_root and storage in closure.rebuilt:
            return True
        size = self.tables.size[storage]
        if self.comes_from_disk(storage):
            closure.cost_us += self.rates.transfer_weight * self.tables.read_us[storage]
            return True
        may_stay = not is_root and self.tables.version_at(storage, question.use) == version
        mark = closure.mark()
        if not may_stay or (size > self.rates.tiny_bytes and self.tables.created_by[storage] >= 0):
            own_cap = closure.value(question.price) + question.price * size if may_stay else float("inf")
            if self.rebuild(storage, version, question, closure, min(cap, own_cap)):
                return True
        closure.rollback(mark)
        if not may_stay or (question.price == float("inf") and size > self.rates.tiny_bytes):
            return False
        closure.extended.append(storage)
        closure.extended_bytes += size
        return True

    def comes_from_disk(self, storage: int) -> bool:
        return storage in self.decisions.away or storage in self.decisions.spilled

    def runs_nearby(self, op: int, use: int) -> bool:
        """The op runs again anyway, at most a little before or after group `use`."""
        return any(abs(group - use) <= NEARBY_GROUPS for group in self.reruns.get(op, ()))

    def apply(self, eviction: Eviction, candidate: int, event: int) -> None:
        """Carry the eviction out in the decisions and in the estimate of live bytes."""
        self.applied += 1
        self.rates.price_us_per_byte = max(self.rates.price_us_per_byte, eviction.ratio)
        if eviction.how == "choice":
            op, k = self.options[-1 - candidate]
            self.decisions.choice[op] = k
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
            self.present[storage] = self.tables.version_at(storage, boundary)
            self.live[max(first + 1, 0) : last] += self.tables.size[storage]
        for op in closure.ops:
            self.reruns.setdefault(op, []).append(self.group_of(last))

    def drop(self, segment: int) -> None:
        """The segment no longer occupies memory between its two events."""
        storage = int(self.storage[segment])
        self.evicted[segment] = True
        self.present.pop(storage, None)
        self.live[self.start[segment] + 1 : self.end[segment]] -= self.tables.size[storage]

    def move_away(self, storage: int) -> None:
        """Give a persistent storage its home on disk: it leaves memory before its first and after its last use."""
        if storage in self.decisions.away:
            return
        self.decisions.away.add(storage)
        outer = (self.start < 0) | (self.end >= len(self.live))
        for segment in np.flatnonzero((self.storage == storage) & outer & ~self.evicted).tolist():
            self.drop(segment)


def _reruns(trace: Trace) -> dict[int, list[int]]:
    """Op -> groups in which it runs again."""
    seen: set[int] = set()
    result: dict[int, list[int]] = {}
    for kind, subject, group in zip(trace.kind, trace.subject, trace.group, strict=True):
        if kind == RUN and subject in seen:
            result.setdefault(subject, []).append(group)
        elif kind == RUN:
            seen.add(subject)
    return result


def _run_counts(trace: Trace, count: int) -> list[int]:
    result = [0] * count
    for kind, subject in zip(trace.kind, trace.subject, strict=True):
        if kind == RUN:
            result[subject] += 1
    return result
