"""Decisions -> trace: walk the base order, bring back just in time whatever a decision dropped.

By default a value, once in memory, is available to every later op; it occupies memory from its birth to its last use
only, so what nobody needs again costs nothing. A *cut* (storage, boundary b) says: the storage doesn't stay in memory
from before op b to op b. What is needed after a cut is read back from disk where the decisions say so, and is
recomputed otherwise, by running its producer again, whose own inputs are brought back in the same way.

Events are runs and reads from disk. Those that serve base op q form *group* q. The last group (n) is the end of the
step, which needs the outputs and the resident storages.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from typing import Any

from solvers.problem import Problem, creators, final_versions, used_versions

RUNS_AN_OP, FEWEST_RUNS = 16, 1000  # a trace beyond both together is no schedule that anybody wants


class DecodeError(Exception):
    """These decisions have no schedule. storage: a dropped one that can't be brought back."""

    def __init__(self, storage: int, message: str) -> None:
        super().__init__(message)
        self.storage = storage


@dataclass(slots=True)
class Decisions:
    """What the solvers decide.

    cuts: storage -> sorted boundaries. spilled: storages that are brought back from disk and not recomputed.
    away: persistent movable storages whose home is the disk. choice: for every op the way in which it runs.
    """

    choice: list[int]
    cuts: dict[int, list[int]] = field(default_factory=dict)
    spilled: set[int] = field(default_factory=set)
    away: set[int] = field(default_factory=set)

    def cut(self, storage: int, boundary: int) -> None:
        """Forbid the storage to stay in memory across the boundary."""
        boundaries = self.cuts.setdefault(storage, [])
        if boundary not in boundaries:
            insort(boundaries, boundary)

    def uncut(self, storage: int, boundary: int) -> None:
        """Undo `cut`."""
        self.cuts[storage].remove(boundary)
        if not self.cuts[storage]:
            del self.cuts[storage]

    def copy(self) -> Decisions:
        """An independent copy."""
        cuts = {storage: list(boundaries) for storage, boundaries in self.cuts.items()}
        return Decisions(list(self.choice), cuts, set(self.spilled), set(self.away))


Value = tuple[int, int]  # (storage, version)


class Tables:
    """What the solvers look up about a problem again and again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.size = [storage.size_bytes for storage in problem.storages]
        self.created_by = creators(problem)
        self.final = final_versions(problem)
        self.reads: list[list[list[Value]]] = []
        self.writes: list[list[Value]] = []
        self.producer: dict[Value, int] = {}
        for index, (op, used) in enumerate(zip(problem.ops, used_versions(problem), strict=True)):
            self.reads.append([[(s, used[s]) for s in choice.reads] for choice in op.choices])
            self.writes.append([(s, used[s]) for s in op.writes])
            self.producer.update(((s, 1), index) for s in op.creates)
            self.producer.update(((s, used[s] + 1), index) for s in op.writes)
        self.written: dict[int, list[int]] = {}
        self.needed = [[reads + writes for reads in ways] for ways, writes in zip(self.reads, self.writes, strict=True)]
        for index, op in enumerate(problem.ops):
            for s in op.writes:
                self.written.setdefault(s, []).append(index)
        self.may_leave = [s.movable and s.persistent for s in problem.storages]
        self.stored = [s.stored for s in problem.storages]
        self.may_spill = [s.movable and problem.can_offload and not s.stored for s in problem.storages]
        self.pinned = [s.persistent and not s.movable for s in problem.storages]
        self.native: Any = None  # as native_decode.py keeps them
        self.read_us = [problem.latency_us + math.ceil(size / problem.read_bytes_per_us) for size in self.size]
        self.write_us = [problem.latency_us + math.ceil(size / problem.write_bytes_per_us) for size in self.size]

    def version_at(self, storage: int, op: int) -> int:
        """Version that base op `op` finds (n: the end)."""
        first = 0 if self.created_by[storage] < 0 else 1
        return first + bisect_left(self.written.get(storage, ()), op)

    def needs(self, op: int, choice: int) -> list[Value]:
        """Values that must be in memory to run the op: its reads and the old versions of what it writes."""
        return self.needed[op][choice]


RUN, READ = 0, 1


class Trace:
    """What decisions lead to: events, the memory instances of storages, and their use segments.

    Event e is (kind[e], subject[e]): run op subject[e], or read storage subject[e] from disk, for group[e].
    Instance i holds storage inst_storage[i] during events inst_birth[i] .. inst_last[i] inclusive (-1: from the
    start, len(kind): to the end). inst_ready[i]: event of its last change. A segment is a stretch between two
    consecutive touches of an instance. writes: instances that are written to disk after their last event.
    extra: (event, storage) of outputs that a rerun makes although they are live.
    """

    def __init__(self) -> None:
        self.kind: list[int] = []
        self.subject: list[int] = []
        self.group: list[int] = []
        self.inst_storage: list[int] = []
        self.inst_birth: list[int] = []
        self.inst_last: list[int] = []
        self.inst_ready: list[int] = []
        self.inst_version: list[int] = []
        self.seg_instance: list[int] = []
        self.seg_start: list[int] = []
        self.seg_end: list[int] = []
        self.writes: list[int] = []
        self.extra: list[tuple[int, int]] = []


class Decoder:
    """One walk over the base order. Use `decode`."""

    def __init__(self, tables: Tables, decisions: Decisions) -> None:
        self.tables, self.decisions, self.trace = tables, decisions, Trace()
        self.versions = self.trace.inst_version
        self.cuts, self.choice = decisions.cuts, decisions.choice
        count = len(tables.size)
        self.instance = [-1] * count
        self.inst_group: list[int] = []
        self.disk = [-1] * count
        self.ran = [False] * len(decisions.choice)
        self.group = 0
        self.most_events = RUNS_AN_OP * len(self.ran) + FEWEST_RUNS
        for storage, info in enumerate(tables.problem.storages):
            if info.persistent and storage in decisions.away:
                self.disk[storage] = 0
            elif info.persistent:
                self.born(storage, 0, -1, -1)
                if info.stored:
                    self.disk[storage] = 0

    def born(self, storage: int, version: int, event: int, group: int) -> None:
        """A new instance begins at the event."""
        trace = self.trace
        self.instance[storage] = len(trace.inst_storage)
        trace.inst_storage.append(storage)
        trace.inst_birth.append(event)
        trace.inst_last.append(event)
        trace.inst_ready.append(event)
        trace.inst_version.append(version)
        self.inst_group.append(group)

    def available(self, storage: int, version: int) -> bool:
        """The value is in memory, and no cut lies between its last touch and now."""
        i = self.instance[storage]
        if i < 0 or self.versions[i] != version:
            return False
        boundaries = self.cuts.get(storage)
        if boundaries is None:
            return True
        k = bisect_right(boundaries, self.inst_group[i])
        return k == len(boundaries) or boundaries[k] > self.group

    def touch(self, values: list[Value], event: int) -> None:
        """Current instances are used at the event."""
        trace, instance, group, last = self.trace, self.instance, self.group, self.trace.inst_last
        for storage, _ in values:
            i = instance[storage]
            if last[i] != event:
                trace.seg_instance.append(i)
                trace.seg_start.append(last[i])
                trace.seg_end.append(event)
                last[i] = event
            self.inst_group[i] = group

    def event(self, kind: int, subject: int) -> int:
        trace = self.trace
        trace.kind.append(kind)
        trace.subject.append(subject)
        trace.group.append(self.group)
        return len(trace.kind) - 1

    def on_disk(self, storage: int, version: int) -> bool:
        """The value can be read from disk: a copy is there, or can be written there at the value's last use."""
        if self.disk[storage] == version:
            return True
        i = self.instance[storage]
        spills = storage in self.decisions.spilled or self.tables.problem.storages[storage].persistent
        return i >= 0 and self.trace.inst_version[i] == version and spills and self.tables.may_spill[storage]

    def read_back(self, storage: int, version: int) -> None:
        """Read the value from disk; if no copy is there, write it at its last use."""
        if self.disk[storage] != version:
            self.trace.writes.append(self.instance[storage])
            self.disk[storage] = version
        self.born(storage, version, self.event(READ, storage), self.group)

    def run(self, op: int) -> None:
        """Run the op: everything it needs is available."""
        event = self.event(RUN, op)
        if event > self.most_events:
            raise DecodeError(next(iter(self.tables.problem.ops[op].creates), -1), "versions that undo each other are made over and over")
        self.ran[op] = True
        needs, instance, versions = self.tables.needs(op, self.choice[op]), self.instance, self.versions
        for storage, version in needs:
            if versions[instance[storage]] != version:
                raise DecodeError(storage, f"storage {storage} is needed at two versions at once")
        self.touch(needs, event)
        for storage, version in self.tables.writes[op]:
            i = instance[storage]
            versions[i] = version + 1
            self.trace.inst_ready[i] = event
        for storage in self.tables.problem.ops[op].creates:
            i = self.instance[storage]
            if i >= 0 and self.trace.inst_version[i] > 1 and self.available(storage, self.trace.inst_version[i]):
                self.trace.extra.append((event, storage))
            else:
                self.born(storage, 1, event, self.group)

    def missing(self, needs: list[Value]) -> list[Value]:
        """Those to bring back, in the order in which to do it: recompute first, read from disk right before the use."""
        gone = [value for value in needs if not self.available(*value)]
        return sorted(gone, key=lambda value: self.on_disk(*value)) if len(gone) > 1 else gone

    def obtain(self, needs: list[Value], first: int = -1) -> None:
        """Make the values available, then run op `first` (if any). Depth first, with an explicit stack."""
        gone = self.missing(needs)
        if not gone:
            if first >= 0:
                self.run(first)
            return
        stack, open_ops = [(first, gone, 0)], {first}
        while stack:
            op, wanted, position = stack.pop()
            while position < len(wanted):
                storage, version = wanted[position]
                if not self.available(storage, version):
                    if not self.on_disk(storage, version):
                        break
                    self.read_back(storage, version)
                position += 1
            if position == len(wanted):
                open_ops.discard(op)
                if op >= 0:
                    self.run(op)
                continue
            producer = self.tables.producer.get(wanted[position], -1)
            self.check_rerun(producer, open_ops, wanted[position], op if op != first else -1)
            open_ops.add(producer)
            inner = self.missing(self.tables.needs(producer, self.choice[producer]))
            stack += [(op, wanted, position), (producer, inner, 0)]

    def check_rerun(self, producer: int, open_ops: set[int], value: Value, asker: int) -> None:
        """The value's producer may run again. The error blames what the op that asks for the value makes."""
        ops, blamed = self.tables.problem.ops, value[0]
        if asker >= 0 and ops[asker].creates:
            blamed = ops[asker].creates[0]
        if producer < 0 or producer in open_ops:
            raise DecodeError(blamed, f"storage {value[0]} can't be brought back at version {value[1]}")
        if self.ran[producer] and not ops[producer].rerunnable:
            raise DecodeError(value[0], f"op {producer} must run once")

    def end(self) -> None:
        """The last group: outputs and residents in memory, the others written home."""
        tables, trace = self.tables, self.trace
        self.group = len(self.ran)
        storages = tables.problem.storages
        away = self.decisions.away
        stay = [s for s, info in enumerate(storages) if info.output or (info.persistent and s not in away)]
        self.obtain([(s, tables.final[s]) for s in stay])
        for storage in stay:
            if not self.available(storage, tables.final[storage]):
                raise DecodeError(storage, f"storage {storage} is lost before the end")
        self.touch([(storage, tables.final[storage]) for storage in stay], len(trace.kind))
        for storage in sorted(away):
            if self.disk[storage] != tables.final[storage]:
                i = self.instance[storage]
                if trace.inst_version[i] != tables.final[storage]:
                    raise DecodeError(storage, f"storage {storage} can't go home")
                trace.writes.append(i)


def decode(tables: Tables, decisions: Decisions) -> Trace:
    """The trace of the decisions. Raises DecodeError where a dropped value can't be brought back."""
    decoder = Decoder(tables, decisions)
    for op in range(len(decisions.choice)):
        decoder.group = op
        if tables.problem.ops[op].optional:  # it runs when somebody reads what it makes
            continue
        decoder.obtain(tables.needs(op, decisions.choice[op]), op)
    decoder.end()
    return decoder.trace
