"""decode.py and the profile in C (decode.c): the same trace and numbers, ten times sooner. Where it was not built (no C compiler at install), and for
problems so small that the call would cost as much, Python's own."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.decode import FEWEST_RUNS, RUNS_AN_OP, Decisions, DecodeError, Tables, Trace, decode
from solvers.emit import Profile, profile
from solvers.library import load_library, native, pointer

NO_ROOM = 1
ERRORS = {  # of decode.c -> what is said of the storage
    2: "is made over and over: versions undo each other", 3: "is needed at two versions at once", 4: "can't be brought back at version {}",
    5: "would be made by op {}, which must run once", 6: "is lost before the end", 7: "can't go home",
}  # fmt: skip
COLUMNS = ("kind", "subject", "group", "storage", "birth", "last", "ready", "version", "touched",
           "seg_instance", "seg_start", "seg_end", "write", "extra_event", "extra")  # fmt: skip
INDEX_LISTS = ("first_way", "first_need", "first_write", "first_create", "create", "first_producer", "producer", "first_writer", "writer",
               "created_by", "final", "need", "write")  # fmt: skip
NUMBERS, FLAGS = ("way_us", "workspace", "size", "read_us", "write_us"), ("optional", "rerunnable", "persistent", "output", "stored", "may_spill")


class _Tables(ctypes.Structure):
    _fields_ = [
        ("ops", ctypes.c_int32), ("storages", ctypes.c_int32), ("constant_bytes", ctypes.c_int64), ("most_events", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (*INDEX_LISTS, *NUMBERS, *FLAGS)),
    ]  # fmt: skip


class _Decisions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("choice", "cut_from", "cut_to", "cut", "spilled", "away")]


class _Trace(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("room", "events", "instances", "segments", "writes", "extras")),
        *((name, ctypes.c_void_p) for name in (*COLUMNS, "live")),
        *((name, ctypes.c_int64) for name in ("peak", "compute_us", "transfer_us")),
        ("error_storage", ctypes.c_int32), ("error_number", ctypes.c_int32),
    ]  # fmt: skip


def traced(tables: Tables, decisions: Decisions) -> tuple[Trace, Profile]:
    """The trace of the decisions, and what it occupies and costs with synchronous transfers. Raises DecodeError where a dropped value can't be
    brought back."""
    if native(len(tables.problem.ops), "decode"):
        return native_decoder(tables).run(decisions)
    trace = decode(tables, decisions)
    return trace, profile(tables, decisions, trace)


def native_decoder(tables: Tables) -> NativeDecoder:
    """The one of the tables."""
    decoder: NativeDecoder = tables.native or NativeDecoder(tables)
    tables.native = decoder
    return decoder


class NativeDecoder:
    """The tables of a problem as decode.c has them, and room for a trace."""

    def __init__(self, tables: Tables) -> None:
        problem, ops = tables.problem, tables.problem.ops
        self.storages = len(problem.storages)
        ways = [choice for op in ops for choice in op.choices]
        needs = [needed for of_op in tables.needed for needed in of_op]
        producers: list[list[int]] = [[] for _ in problem.storages]
        for (s, version), op in tables.producer.items():
            producers[s] += [-1] * (version + 1 - len(producers[s]))
            producers[s][version] = op
        writers = [tables.written.get(s, []) for s in range(self.storages)]
        self.columns: dict[str, NDArray[Any]] = {
            "first_way": _firsts(op.choices for op in ops), "first_need": _firsts(needs), "need": _joined(needs),
            "first_write": _firsts(tables.writes), "write": _joined(tables.writes),
            "first_create": _firsts(op.creates for op in ops), "create": _joined(op.creates for op in ops),
            "first_producer": _firsts(producers), "producer": _joined(producers),
            "first_writer": _firsts(writers), "writer": _joined(writers),
            **{name: np.array(getattr(tables, name), np.int32) for name in ("created_by", "final")},
            "way_us": np.array([way.time_us for way in ways], np.int64), "workspace": np.array([way.workspace_bytes for way in ways], np.int64),
            **{name: np.array(getattr(tables, name), np.int64) for name in ("size", "read_us", "write_us")},
            **{name: np.array([getattr(op, name) for op in ops], np.uint8) for name in ("optional", "rerunnable")},
            **{name: np.array([getattr(s, name) for s in problem.storages], np.uint8) for name in ("persistent", "output", "stored")},
            "may_spill": np.array(tables.may_spill, np.uint8),
        }  # fmt: skip
        self.native = _Tables(
            len(ops), self.storages, problem.constant_bytes, RUNS_AN_OP * len(ops) + FEWEST_RUNS,
            **{name: pointer(column) for name, column in self.columns.items()},
        )  # fmt: skip
        self.grow(2 * len(self.columns["need"]) + self.storages + FEWEST_RUNS)

    def grow(self, room: int) -> None:
        """Room for so many elements of each column of a trace."""
        self.room = room
        self.made = {name: np.empty(room, np.int32) for name in COLUMNS}
        self.live = np.empty(room + 2, np.int64)

    def run(self, decisions: Decisions) -> tuple[Trace, Profile]:
        """As `traced`."""
        library = load_library("decode")
        assert library is not None
        columns = self.decided(decisions)
        decided = _Decisions(*(pointer(column) for column in columns))
        while True:
            out = _Trace(room=self.room, live=pointer(self.live), **{name: pointer(column) for name, column in self.made.items()})
            error = library.mebp_decode(ctypes.byref(self.native), ctypes.byref(decided), ctypes.byref(out))
            if error != NO_ROOM:
                break
            self.grow(2 * self.room)
        if error:
            raise DecodeError(out.error_storage, f"storage {out.error_storage} " + ERRORS[error].format(out.error_number))
        live = self.live[: out.events].copy()
        return self.trace(out), Profile(live, out.peak, out.compute_us, out.transfer_us)

    def decided(self, decisions: Decisions) -> tuple[NDArray[Any], ...]:
        """The columns of decode.c's Decisions."""
        cut_from, cut_to = np.zeros(self.storages, np.int32), np.zeros(self.storages, np.int32)
        counts = np.fromiter(map(len, decisions.cuts.values()), np.int32, len(decisions.cuts))
        at = np.fromiter(decisions.cuts, np.int64, len(decisions.cuts))
        cut_to[at] = counts.cumsum()
        cut_from[at] = cut_to[at] - counts
        cuts = _joined(decisions.cuts.values())
        return np.array(decisions.choice, np.int32), cut_from, cut_to, cuts, self.flags(decisions.spilled), self.flags(decisions.away)

    def flags(self, some: set[int]) -> NDArray[np.uint8]:
        result = np.zeros(self.storages, np.uint8)
        result[list(some)] = 1
        return result

    def trace(self, out: _Trace) -> Trace:
        made, result = self.made, Trace()

        def first(count: int, *names: str) -> Iterable[list[int]]:
            return (made[name][:count].tolist() for name in names)

        result.kind, result.subject, result.group = first(out.events, "kind", "subject", "group")
        names = ("storage", "birth", "last", "ready", "version")
        result.inst_storage, result.inst_birth, result.inst_last, result.inst_ready, result.inst_version = first(out.instances, *names)
        result.seg_instance, result.seg_start, result.seg_end = first(out.segments, "seg_instance", "seg_start", "seg_end")
        (result.writes,) = first(out.writes, "write")
        result.extra = list(zip(*first(out.extras, "extra_event", "extra"), strict=True))
        return result


def _firsts(lists: Iterable[Sequence[Any]]) -> NDArray[np.int32]:
    """Where each of the lists begins when they are joined, and where the last one ends."""
    return np.cumsum([0, *map(len, lists)]).astype(np.int32)


def _joined(lists: Iterable[Iterable[Any]]) -> NDArray[np.int32]:
    """All elements of the lists: numbers, or pairs of them in rows."""
    return np.array(list(itertools.chain.from_iterable(lists)), np.int32)
