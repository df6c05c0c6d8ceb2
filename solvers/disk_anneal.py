"""What goes to disk and when: simulated annealing over the gaps of a trace (disk_anneal.c), each candidate judged by both clocks.

A plan for the disk (disk_plan.py) sees phases and a greedy path single evictions; here the whole step is walked for each change of a few gaps or
homes, some thousand times a second. The runs stay as they are. Without the library (no C compiler at install) nothing is found.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.decode import READ, RUN, Decisions, DecodeError, Tables
from solvers.emit import Ints, Moves, moves_of, run_times
from solvers.evict import State
from solvers.gaps import TINY_SHARE, Gap, beside_gaps, in_one_group, movable_gaps, with_gaps
from solvers.greedy import evaluate
from solvers.library import load_library, pointer
from solvers.transfers import HORIZONS

HOT, COLD = 1e-4, 3e-6  # temperatures, of the step's compute
CANDIDATES = 100_000  # ten seconds for 1,600 runs
NUMBERS = ("runs", "gaps", "values", "storages")
COLUMNS = (  # of disk_anneal.c's Step, in its order: name, type
    ("time", np.int64), ("clock", np.int64), ("from", np.int32), ("to", np.int32), ("storage", np.int32), ("due", np.int32),
    ("free", np.uint8), ("maker", np.int32), ("first", np.int32), ("last", np.int32), ("made", np.int32), ("stored", np.uint8), ("size", np.int64),
    ("read_us", np.int64), ("write_us", np.int64), ("first_gap", np.int32), ("last_gap", np.int32), ("persistent", np.uint8), ("open", np.int32),
)  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in NUMBERS), *((name, ctypes.c_void_p) for name, _ in COLUMNS),
        ("opens", ctypes.c_int32), ("interference", ctypes.c_double),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Annealed:
    """What was found: microseconds as the walk counts them, the state, its transfers, and how many candidates were tried."""

    time_us: int
    state: State
    moves: Moves
    tried: int


class DiskAnnealing:
    """The gaps of a state, which fits the budget, as disk_anneal.c has them. away (of a gap), home (of a storage), lead_us: what it decides; room:
    bytes free at each run beside all gaps."""

    def __init__(self, tables: Tables, state: State) -> None:
        self.tables, self.state, trace = tables, state, state.trace
        self.gaps = movable_gaps(tables, state, 0)
        self.flat: list[Gap] = [gap for of_storage in self.gaps.values() for gap in of_storage]
        self.ids = list(self.gaps)
        self.runs = [event for event, kind in enumerate(trace.kind) if kind == RUN]
        self.columns = self._columns()
        self.away = np.array([not kept for kept in self._kept()], np.uint8)
        self.home = np.array([s not in state.decisions.away for s in self.ids], np.uint8)
        fixed, _ = beside_gaps(tables, state, self.gaps)
        self.room: Ints = np.ascontiguousarray(tables.problem.budget_bytes - fixed[self.runs])
        self.lead_us = 0

    def possible(self) -> bool:
        """The library is there, something may change, and all transfers of the state are in gaps (none of what is made twice)."""
        trace = self.state.trace
        moved = {trace.subject[e] for e, kind in enumerate(trace.kind) if kind == READ} | {trace.inst_storage[i] for i in trace.writes}
        return load_library("disk_anneal") is not None and len(self.columns["open"]) > 0 and moved <= set(self.ids)

    def run(self, seconds: float, seed: int = 0, candidates: int = CANDIDATES) -> Annealed | None:
        """The best found, from the best so far on. Deterministic where the candidates end it and not the seconds. None where it has no schedule."""
        if not self.lead_us:
            self.lead_us = min((math.ceil(share * self.columns["clock"][-1]) for share in HORIZONS), key=self._walk_us)
        time_us, record, tried = self._anneal(seconds, seed, candidates)
        if time_us < 0:
            return None
        try:
            found = evaluate(self.tables, self._decisions())
        except DecodeError:
            return None
        runs = [event for event, kind in enumerate(found.trace.kind) if kind == RUN]
        if len(runs) != len(self.runs):
            return None
        return Annealed(time_us, found, self._moves([0, *(event + 1 for event in runs)], record), tried)

    def _walk_us(self, lead_us: int) -> int:
        """Microseconds of the plan as it is, where each read may begin so long before it is due."""
        self.lead_us = lead_us
        return self._anneal(0.0, 0, 0)[0]

    def _anneal(self, seconds: float, seed: int, candidates: int) -> tuple[int, NDArray[np.int32], int]:
        """The plan into the best found: its microseconds, the transfers of its walk (run before which, what, storage), the number of candidates."""
        library = load_library("disk_anneal")
        assert library is not None
        library.mebp_disk_anneal.restype = ctypes.c_int64
        columns, lead = self.columns, ctypes.c_int64(self.lead_us)
        step = _Step(
            len(self.runs), len(self.flat), len(columns["maker"]), len(self.ids), *(pointer(columns[name]) for name, _ in COLUMNS),
            len(columns["open"]), self.tables.problem.interference,
        )  # fmt: skip
        record, records, tried = np.zeros(9 * len(self.flat) + 1, np.int32), ctypes.c_int64(), ctypes.c_int64()
        hot, cold = (ctypes.c_double(share * max(1, int(columns["clock"][-1]))) for share in (HOT, COLD))
        time_us = library.mebp_disk_anneal(
            ctypes.byref(step), pointer(self.away), pointer(self.home), ctypes.byref(lead), pointer(self.room), hot, cold, ctypes.c_int64(candidates),
            ctypes.c_double(seconds), ctypes.c_uint64(seed), pointer(record), ctypes.byref(records), ctypes.byref(tried),
        )  # fmt: skip
        self.lead_us = lead.value
        return time_us, record[: records.value].reshape(-1, 3), tried.value

    def _kept(self) -> list[bool]:
        """Of each gap, whether the state keeps its value in memory."""
        trace = self.state.trace
        spans: dict[int, list[tuple[int, int]]] = {}
        for i, s in enumerate(trace.inst_storage):
            spans.setdefault(s, []).append((trace.inst_birth[i], trace.inst_last[i]))
        end, away = len(trace.kind), self.state.decisions.away

        def kept(gap: Gap) -> bool:
            if gap.b == end:
                return gap.storage not in away
            return any(birth <= gap.a and gap.b <= last for birth, last in spans[gap.storage])

        return [kept(gap) for gap in self.flat]

    def _columns(self) -> dict[str, NDArray[Any]]:
        """The columns of disk_anneal.c's Step."""
        tables, trace, problem = self.tables, self.state.trace, self.tables.problem
        times = run_times(tables, self.state.decisions, trace)
        index = {-1: -1, len(trace.kind): len(self.runs), **{event: run for run, event in enumerate(self.runs)}}
        tiny_bytes, number = TINY_SHARE * problem.budget_bytes, {s: k for k, s in enumerate(self.ids)}
        values: dict[tuple[int, int], list[int]] = {}
        for k, gap in enumerate(self.flat):
            values.setdefault((gap.storage, gap.change), []).append(k)
        first_gaps = np.cumsum([0, *(len(gaps) for gaps in self.gaps.values())])
        lists: dict[str, Sequence[int]] = {
            "time": [times[event] for event in self.runs],
            "clock": [0, *np.cumsum([times[event] for event in self.runs]).tolist()],
            "from": [index[gap.a] for gap in self.flat],
            "to": [index[gap.b] for gap in self.flat],
            "storage": [number[gap.storage] for gap in self.flat],
            "due": sorted(range(len(self.flat)), key=lambda k: index[self.flat[k].b]),
            "free": [not in_one_group(tables, trace, gap) for gap in self.flat],
            "maker": [index[change] for _, change in values],
            "first": [gaps[0] for gaps in values.values()],
            "last": [gaps[-1] for gaps in values.values()],
            "made": [v for v, _ in sorted(enumerate(values), key=lambda each: index[each[1][1]])],
            "stored": [problem.storages[s].stored for s, _ in values],
            "size": [tables.size[s] for s in self.ids],
            "read_us": [tables.read_us[s] for s in self.ids],
            "write_us": [tables.write_us[s] for s in self.ids],
            "first_gap": first_gaps[:-1].tolist(),
            "last_gap": (first_gaps[1:] - 1).tolist(),
            "persistent": [problem.storages[s].persistent for s in self.ids],
            "open": sorted(
                (k for k, gap in enumerate(self.flat) if tables.size[gap.storage] > tiny_bytes),
                key=lambda k: (-tables.size[self.flat[k].storage], k - int(first_gaps[number[self.flat[k].storage]]), k),
            ),
        }
        return {name: np.array(lists[name], kind) for name, kind in COLUMNS}

    def _decisions(self) -> Decisions:
        """The state's, with what the plan decides."""
        kept = {gap for gap, away in zip(self.flat, self.away.tolist(), strict=True) if not away}
        home = {s for s, at_home in zip(self.ids, self.home.tolist(), strict=True) if at_home}
        return with_gaps(self.tables, self.state, self.gaps, kept.__contains__, home)

    def _moves(self, begins: Sequence[int], record: NDArray[np.int32]) -> Moves:
        """The transfers of the plan's walk. begins: the event that follows each run, from the one before the first on."""
        return moves_of((begins[run], what, self.ids[number]) for run, what, number in record.tolist())
