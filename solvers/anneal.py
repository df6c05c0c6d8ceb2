"""Order free: a sequence of runs found by simulated annealing (anneal.c), and the same problem with its ops in another order.

Persistent storages are left out: those at home in memory take their bytes from the budget, those at home on disk count with each run that reads
them. So the sequence is a plan of its own only where nothing is moved; elsewhere its order is what it is good for, and the solvers start from that.
Without the library (no C compiler at install) nothing is found.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import bytes_of
from solvers.decode import Tables
from solvers.library import load_library, pointer
from solvers.problem import Op, Problem
from solvers.schedule import Free, Run, Schedule, Step

MOST_OPS = 3000  # anneal.c takes a byte for each pair of them
WORK = 3_000_000_000  # ops and reads looked at: seconds
STEPS_AN_OP = 50_000
PRICE, HOT, COLD = 1.0, 1e-2, 1e-5  # of a byte above the budget, as a share of the step's time by the budget; temperatures, of the step's time
UNLESS_REPEATED, ALWAYS = 1, 2  # as in anneal.c


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays as it is while the order changes: how each op runs, and the persistent storages whose home is the disk."""

    choice: Sequence[int]
    away: frozenset[int] = frozenset()


def sequence_of(problem: Problem, setting: Setting, seed: int = 0, work: int = WORK) -> list[int]:
    """Ops in the order in which to run them, some of them more than once; empty where nothing was found. Deterministic: it ends after
    `work`, whatever the machine. The budget may be exceeded, and nobody has checked the answer."""
    library, tables = load_library("anneal"), Tables(problem)
    if library is None or not 0 < len(problem.ops) <= MOST_OPS:
        return []
    library.mebp_anneal.restype = ctypes.c_int
    start = _needed_ops(problem, setting)
    reads, makes = _reads(problem, setting), [list(op.creates) for op in problem.ops]
    total_us = sum(problem.ops[op].choices[setting.choice[op]].time_us for op in start)
    home = [s for s, info in enumerate(problem.storages) if info.persistent and s not in setting.away]
    room = problem.budget_bytes - problem.constant_bytes - bytes_of(problem, home)
    if room <= 0 or total_us <= 0:
        return []
    looks = sum(1 + len(reads[op]) for op in start)
    columns: list[NDArray[Any]] = [
        *_lists(reads), *_lists(makes), np.array(tables.size, np.int64), np.array(_more(problem, setting), np.int64),
        np.array([op.choices[k].time_us for op, k in zip(problem.ops, setting.choice, strict=True)], np.float64),
        _after(tables, setting), np.array(_once(tables), np.uint8), np.array([info.output for info in problem.storages], np.uint8),
    ]  # fmt: skip
    sequence = np.zeros(2 * len(start) + 64, np.int32)
    sequence[: len(start)] = start
    count = library.mebp_anneal(
        len(problem.ops), len(problem.storages), *(pointer(column) for column in columns), ctypes.c_double(room),
        ctypes.c_double(PRICE * total_us / room), ctypes.c_double(HOT * total_us), ctypes.c_double(COLD * total_us),
        ctypes.c_int64(min(STEPS_AN_OP * len(start), work // looks)), ctypes.c_uint64(seed), pointer(sequence), len(start), len(sequence),
    )  # fmt: skip
    return [int(op) for op in sequence[: max(count, 0)]]


def _reads(problem: Problem, setting: Setting) -> list[list[int]]:
    """For every op what it reads or writes of what the step makes."""
    storages = problem.storages
    used = [(*op.choices[k].reads, *op.writes) for op, k in zip(problem.ops, setting.choice, strict=True)]
    return [[s for s in ids if not storages[s].persistent] for ids in used]


def _needed_ops(problem: Problem, setting: Setting) -> list[int]:
    """Ops in base order, without the optional ones whose products nobody reads."""
    wanted, needed = set[int](), list[int]()
    for index in range(len(problem.ops) - 1, -1, -1):
        op = problem.ops[index]
        if not op.optional or wanted.intersection(op.creates):
            needed.append(index)
            wanted.update(op.choices[setting.choice[index]].reads)
    return needed[::-1]


def _more(problem: Problem, setting: Setting) -> list[int]:
    """For every op its workspace, and what it uses of persistent storages that are on disk."""
    result = []
    for op, k in zip(problem.ops, setting.choice, strict=True):
        used = setting.away.intersection((*op.choices[k].reads, *op.writes))
        result.append(op.choices[k].workspace_bytes + bytes_of(problem, used))
    return result


def _once(tables: Tables) -> list[bool]:
    """Ops that the annealing runs once: those that must, and all that has to do with what is written in place or with random numbers."""
    return [_runs_once(tables, op) for op in tables.problem.ops]


def _runs_once(tables: Tables, op: Op) -> bool:
    used = (*op.creates, *(s for choice in op.choices for s in choice.reads))
    return not (op.rerunnable or op.optional) or op.rng or bool(op.writes) or any(s in tables.written for s in used)


def _after(tables: Tables, setting: Setting) -> NDArray[np.uint8]:
    """after[a, b]: op a can't come before op b."""
    ops = tables.problem.ops
    result = np.zeros((len(ops), len(ops)), np.uint8)
    for index, op in enumerate(ops):
        for s in (*op.choices[setting.choice[index]].reads, *op.writes):
            maker = tables.producer.get((s, tables.version_at(s, index)), -1)
            if maker >= 0:
                result[index, maker] = ALWAYS if s in tables.written else UNLESS_REPEATED
            following = next((writer for writer in tables.written.get(s, ()) if writer > index), -1)
            if following >= 0:
                result[following, index] = ALWAYS
    for first, second in itertools.pairwise(index for index, op in enumerate(ops) if op.rng):
        result[second, first] = ALWAYS
    return result


def _lists(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where each list begins, and all of them one after the other."""
    begins = np.cumsum([0, *(len(items) for items in lists)]).astype(np.int32)
    return begins, np.array([*itertools.chain.from_iterable(lists), 0], np.int32)


def schedule_of(problem: Problem, setting: Setting, sequence: Sequence[int]) -> Schedule | None:
    """The sequence as a schedule, each storage freed after its last read before it is made again; None where something is on disk."""
    if setting.away:
        return None
    reads, steps = _reads(problem, setting), list[Step]()
    needed = {s for s, info in enumerate(problem.storages) if info.output}
    for op in reversed(sequence):
        made = problem.ops[op].creates
        steps += [Free(s) for s in (*made, *reads[op]) if s not in needed]
        steps.append(Run(op, setting.choice[op]))
        needed.difference_update(made)
        needed.update(reads[op])
    resident = frozenset(s for s, info in enumerate(problem.storages) if info.persistent and info.movable)
    return Schedule(tuple(reversed(steps)), resident)


def base_order(problem: Problem, sequence: Sequence[int]) -> list[int]:
    """All ops in the order of their first runs; an optional one that doesn't run comes where base order has it, after what it reads."""
    firsts = list(dict.fromkeys(sequence))
    missing = [index for index in range(len(problem.ops)) if index not in set(firsts)]
    made_at = {s: place for place, op in enumerate(firsts) for s in problem.ops[op].creates}
    keys = {op: (place, 0) for place, op in enumerate(firsts)}
    for index in missing:
        reads = [s for choice in problem.ops[index].choices for s in choice.reads]
        keys[index] = (max((made_at.get(s, -1) for s in reads), default=-1), 1 + index)
        made_at.update((s, keys[index][0]) for s in problem.ops[index].creates)
    return sorted(keys, key=lambda op: keys[op])


def reordered(problem: Problem, order: Sequence[int]) -> Problem:
    """The same problem with op order[k] in place k. Raises ProblemError where that order breaks a rule."""
    result = replace(problem, ops=tuple(problem.ops[op] for op in order))
    result.validate()
    return result


def renamed(schedule: Schedule, names: Sequence[int]) -> Schedule:
    """The schedule with op k called names[k]."""
    steps = (Run(names[step.op], step.choice) if isinstance(step, Run) else step for step in schedule.steps)
    return replace(schedule, steps=tuple(steps))
