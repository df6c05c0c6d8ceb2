"""What bringing a value back takes: the ops that must run again, given what stays in memory.

The closure of a value is its producer, with the producers of those of its inputs that are neither live nor on disk; an input may also stay live
longer instead, where that is worth the bytes. In C (closure.c) where that is built, and for all but small problems.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.decode import RUN, Decisions, Tables, Trace
from solvers.library import load_library, native, pointer
from solvers.native_decode import native_decoder

NEARBY_GROUPS = 64
ROOM = 1000  # of a closure's lists, beside that for each storage once


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
class Question:
    """What a closure is asked for: storage to be back at group `use`; what a byte kept longer is worth; so many visits at most."""

    storage: int
    use: int
    price: float
    limit: int


class Closures:
    """Those of one round. present: of each storage the version in memory at the event that is relieved, or -1."""

    def __init__(self, tables: Tables, trace: Trace, decisions: Decisions, rates: Rates) -> None:
        self.tables, self.decisions, self.rates = tables, decisions, rates
        self.present: NDArray[np.int32] = np.full(len(tables.size), -1, np.int32)
        ops, groups = reruns(trace)
        self.reruns: dict[int, list[int]] = {}
        for op, group in zip(ops.tolist(), groups.tolist(), strict=True):
            self.add_rerun(op, group)

    def add_rerun(self, op: int, group: int) -> None:
        """The op runs again for this group."""
        self.reruns.setdefault(op, []).append(group)

    def chosen(self, op: int) -> None:
        """The decisions have another way for the op."""

    def gone(self, storage: int) -> None:
        """The decisions have the storage on disk."""

    def find(self, question: Question) -> Closure | None:
        """The closure of what the use finds of the storage; None: impossible, or too long."""
        closure = Closure()
        version = self.tables.version_at(question.storage, question.use)
        return closure if self.rebuild(question.storage, version, question, closure, float("inf")) else None

    def rebuild(self, storage: int, version: int, question: Question, closure: Closure, cap: float) -> bool:
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
        if closure.visits > question.limit:
            return False
        for need, need_version in tables.needs(producer, choice):
            chained = need == storage and tables.created_by[need] >= 0
            if need in tables.written and not chained and tables.version_at(need, use) != need_version:
                return False
            if not self.bring(need, need_version, question, closure, cap):
                return False
        return closure.value(question.price) <= cap

    def bring(self, storage: int, version: int, question: Question, closure: Closure, cap: float) -> bool:
        """Add to the closure what the input takes: nothing if live, a read, its own closure, or a longer life."""
        is_root = storage == question.storage
        if (not is_root and self.present[storage] == version) or storage in closure.extended:
            return True
        if not is_root and storage in closure.rebuilt:
            return True
        size = self.tables.size[storage]
        if storage in self.decisions.away or storage in self.decisions.spilled:
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

    def runs_nearby(self, op: int, use: int) -> bool:
        """The op runs again anyway, at most a little before or after group `use`."""
        return any(abs(group - use) <= NEARBY_GROUPS for group in self.reruns.get(op, ()))


def reruns(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ops that run again, and the groups in which they do."""
    runs = np.flatnonzero(np.array(trace.kind, np.int64) == RUN)
    subjects, groups = np.array(trace.subject, np.int64)[runs], np.array(trace.group, np.int64)[runs]
    again = np.ones(len(runs), bool)
    again[np.unique(subjects, return_index=True)[1]] = False
    return subjects[again], groups[again]


class _Setting(ctypes.Structure):
    _fields_ = [
        ("tables", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("choice", "present", "first_rerun", "rerun", "added_head", "added_next", "added", "on_disk", "lost")),
        ("transfer_weight", ctypes.c_double), ("tiny_bytes", ctypes.c_int64), ("nearby", ctypes.c_int32), ("room", ctypes.c_int32),
    ]  # fmt: skip


class _Closure(ctypes.Structure):
    _fields_ = [
        ("cost_us", ctypes.c_double), ("extended_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("visits", "extended_count", "rebuilt_count", "op_count")),
        *((name, ctypes.c_void_p) for name in ("extended", "rebuilt", "ops")),
    ]  # fmt: skip


class NativeClosures:
    """The same by closure.c."""

    def __init__(self, tables: Tables, trace: Trace, decisions: Decisions, rates: Rates) -> None:
        self.tables, self.decisions, self.rates = tables, decisions, rates
        self.library = load_library("closure")
        count, storages = len(tables.reads), len(tables.size)
        self.present: NDArray[np.int32] = np.full(storages, -1, np.int32)
        ops, groups = reruns(trace)
        by_op = np.argsort(ops, kind="stable")
        self.columns: dict[str, NDArray[Any]] = {
            "choice": np.array(decisions.choice, np.int32), "present": self.present,
            "first_rerun": np.searchsorted(ops[by_op], np.arange(count + 1)).astype(np.int32), "rerun": groups[by_op].astype(np.int32),
            "added_head": np.full(count, -1, np.int32), "added_next": np.empty(64, np.int32), "added": np.empty(64, np.int32),
            "on_disk": np.zeros(storages, np.uint8), "lost": np.zeros(storages, np.uint8),
        }  # fmt: skip
        self.columns["on_disk"][[*decisions.away, *decisions.spilled]] = 1
        self.columns["lost"][list(rates.lost)] = 1
        self.added = 0
        self.setting = _Setting(ctypes.addressof(native_decoder(tables).native), transfer_weight=rates.transfer_weight)
        self.setting.tiny_bytes, self.setting.nearby, self.setting.room = rates.tiny_bytes, NEARBY_GROUPS, storages + ROOM
        self.point()
        self.found = {name: np.empty(storages + ROOM, np.int32) for name in ("extended", "rebuilt", "ops")}
        self.closure = _Closure(**{name: pointer(column) for name, column in self.found.items()})

    def point(self) -> None:
        for name, column in self.columns.items():
            setattr(self.setting, name, pointer(column))

    def add_rerun(self, op: int, group: int) -> None:
        """As Closures'."""
        columns, k = self.columns, self.added
        if k == len(columns["added"]):
            columns.update({name: np.concatenate([columns[name], columns[name]]) for name in ("added", "added_next")})
            self.point()
        columns["added"][k], columns["added_next"][k], columns["added_head"][op] = group, columns["added_head"][op], k
        self.added += 1

    def chosen(self, op: int) -> None:
        """As Closures'."""
        self.columns["choice"][op] = self.decisions.choice[op]

    def gone(self, storage: int) -> None:
        """As Closures'."""
        self.columns["on_disk"][storage] = 1

    def find(self, question: Question) -> Closure | None:
        """As Closures'."""
        assert self.library is not None
        found = self.closure
        if not self.library.mebp_closure(
            ctypes.byref(self.setting), question.storage, question.use, ctypes.c_double(question.price), question.limit, ctypes.byref(found)
        ):
            return None
        counts = {"extended": found.extended_count, "rebuilt": found.rebuilt_count, "ops": found.op_count}
        return Closure(found.cost_us, found.visits, found.extended_bytes, **{name: self.found[name][:n].tolist() for name, n in counts.items()})


def closures(tables: Tables, trace: Trace, decisions: Decisions, rates: Rates) -> Closures | NativeClosures:
    """In C where that pays."""
    made = NativeClosures if native(len(tables.problem.ops), "closure", "decode") else Closures
    return made(tables, trace, decisions, rates)
