"""The truth about a schedule: replay it step by step, and say what it costs or which rule it breaks first.

This file shares no code with the solvers: it knows only the problem and the steps. Nothing here is clever.

Clocks: `clock` is the compute stream, `disk_clock` the one first-in-first-out disk stream. Integer microseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from solvers.problem import Op, Problem
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait


class ScheduleError(ValueError):
    """The schedule breaks a rule. rule: its name; step: index into schedule.steps (-1: start, len(steps): end)."""

    def __init__(self, rule: str, step: int, message: str) -> None:
        super().__init__(f"{rule} at step {step}: {message}")
        self.rule = rule
        self.step = step
        self.message = message

    def __reduce__(self) -> tuple[type[ScheduleError], tuple[str, int, str]]:
        return (ScheduleError, (self.rule, self.step, self.message))


@dataclass(frozen=True, slots=True)
class Report:
    """What a valid schedule costs.

    timeline: for every step the bytes live in it: constant, live storages, and during a Run also its new storages,
    discarded copies and workspace. peak_step: the first step that attains peak_bytes (-1: before the first step).
    stall_us: time that Wait steps added. recomputes: runs beyond each op's first. Bytes moved count whole transfers. away_bytes: of storages that
    are at home on disk or ever moved, each of which has a place there.
    """

    peak_bytes: int
    peak_step: int
    time_us: int
    timeline: tuple[int, ...]
    stall_us: int
    runs: int
    recomputes: int
    offloads: int
    prefetches: int
    written_bytes: int
    read_bytes: int
    away_bytes: int = 0


def replay(problem: Problem, schedule: Schedule, enforce_budget: bool = True) -> Report:
    """Replay the schedule. Returns its Report, or raises ScheduleError naming the first broken rule."""
    machine = _Machine(problem, schedule, enforce_budget)
    for index, step in enumerate(schedule.steps):
        machine.index = index
        if isinstance(step, Run):
            machine.run(step)
        elif isinstance(step, Free):
            machine.free(step.storage)
        elif isinstance(step, Offload):
            machine.offload(step.storage)
        elif isinstance(step, Prefetch):
            machine.prefetch(step.storage)
        elif isinstance(step, Wait):
            machine.wait(step.storage)
        else:
            machine.fail("unknown-step", f"{step!r}")
    machine.index = len(schedule.steps)
    machine.end()
    return machine.report()


def _base_versions(problem: Problem) -> tuple[list[dict[int, int]], list[int]]:
    """For every op the version of each storage that it finds in base order; and every storage's final version."""
    version = [0] * len(problem.storages)
    found = []
    for op in problem.ops:
        used = set(op.writes)
        for choice in op.choices:
            used.update(choice.reads)
        found.append({storage: version[storage] for storage in used})
        for storage in op.creates:
            version[storage] = 1
        for storage in op.writes:
            version[storage] += 1
    return found, version


class _Machine:
    """The state of the replay: live version of each storage, version on disk, pending transfers, two clocks."""

    def __init__(self, problem: Problem, schedule: Schedule, enforce_budget: bool) -> None:
        self.problem = problem
        self.enforce_budget = enforce_budget
        self.index = -1
        self.found, self.final = _base_versions(problem)
        self.live: dict[int, int] = {}  # storage -> version in memory
        self.disk: dict[int, int] = {}  # storage -> version of the complete copy on disk
        self.writing: dict[int, int] = {}  # storage -> time at which its Offload is complete
        self.reading: dict[int, int] = {}  # storage -> time at which its Prefetch is complete
        self.run_count = [0] * len(problem.ops)
        self.last_rng_op = -1
        self.clock = self.disk_clock = self.stall_us = 0
        self.offloads = self.prefetches = self.written_bytes = self.read_bytes = 0
        self.away: set[int] = set()  # storages that need a place on disk
        self.timeline: list[int] = []
        self.live_bytes = problem.constant_bytes
        self.start(schedule.resident)
        self.peak_bytes, self.peak_step = self.live_bytes, -1
        self.check_budget(self.live_bytes)

    def fail(self, rule: str, message: str) -> NoReturn:
        raise ScheduleError(rule, self.index, message)

    def name(self, storage: int) -> str:
        return self.problem.storages[storage].name

    def start(self, resident: frozenset[int]) -> None:
        """Persistent storages are at home at version 0."""
        for index in sorted(resident):
            self.require_storage(index)
            if not self.problem.storages[index].persistent:
                self.fail("bad-resident", f"{self.name(index)} is not persistent")
        self.at_home = set(resident)
        for index, storage in enumerate(self.problem.storages):
            if storage.persistent and not storage.movable:
                self.at_home.add(index)
            if storage.persistent and index in self.at_home:
                self.live[index] = 0
                self.live_bytes += storage.size_bytes
            elif storage.persistent:
                self.disk[index] = 0
                self.away.add(index)
            if storage.stored:
                self.disk[index] = 0

    def require_storage(self, storage: int) -> None:
        if not 0 <= storage < len(self.problem.storages):
            self.fail("unknown-id", f"storage {storage}")

    def check_budget(self, size_bytes: int) -> None:
        if self.enforce_budget and size_bytes > self.problem.budget_bytes:
            self.fail("over-budget", f"{size_bytes} bytes live, budget {self.problem.budget_bytes}")

    def record(self, size_bytes: int) -> None:
        """Enter the bytes of this step in the timeline."""
        self.timeline.append(size_bytes)
        if size_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_step = size_bytes, self.index
        self.check_budget(size_bytes)

    def run(self, step: Run) -> None:
        if not 0 <= step.op < len(self.problem.ops):
            self.fail("unknown-id", f"op {step.op}")
        op = self.problem.ops[step.op]
        if not 0 <= step.choice < len(op.choices):
            self.fail("bad-choice", f"{op.name} has no choice {step.choice}")
        self.check_rerun(step.op, op)
        choice = op.choices[step.choice]
        for storage in (*choice.reads, *op.writes):
            self.check_input(step.op, storage)
        for storage in op.writes:
            if storage in self.writing:
                self.fail("write-in-flight", f"{op.name} writes {self.name(storage)} while it is being offloaded")
        for storage in op.creates:
            if storage in self.reading:
                self.fail("in-flight", f"{op.name} creates {self.name(storage)} while it is being read from disk")
        created_bytes = sum(self.problem.storages[storage].size_bytes for storage in op.creates)
        self.record(self.live_bytes + created_bytes + choice.workspace_bytes)
        for storage in op.creates:
            if storage not in self.live:
                self.live[storage] = 1
                self.live_bytes += self.problem.storages[storage].size_bytes
        for storage in op.writes:
            self.live[storage] += 1
        self.run_count[step.op] += 1
        self.clock += choice.time_us

    def check_rerun(self, index: int, op: Op) -> None:
        """Rules about first runs of rng ops and about second runs."""
        if self.run_count[index] == 0:
            if op.rng:
                if index < self.last_rng_op:
                    self.fail("rng-order", f"{op.name} runs first after {self.problem.ops[self.last_rng_op].name}")
                self.last_rng_op = index
            return
        if not op.rerunnable:
            self.fail("rerun-forbidden", f"{op.name} must run once")
        if not op.writes and all(storage in self.live for storage in op.creates):
            self.fail("useless-run", f"{op.name} runs again although all that it creates is live")

    def check_input(self, index: int, storage: int) -> None:
        """The storage is live, complete, and at the version that the op finds in base order."""
        op = self.problem.ops[index]
        if storage not in self.live:
            self.fail("not-live", f"{op.name} needs {self.name(storage)}")
        if storage in self.reading:
            self.fail("in-flight", f"{op.name} needs {self.name(storage)}, which is still being read from disk")
        if self.live[storage] != self.found[index][storage]:
            versions = f"version {self.found[index][storage]} of {self.name(storage)}, not {self.live[storage]}"
            self.fail("stale-version", f"{op.name} needs {versions}")

    def free(self, storage: int) -> None:
        self.require_storage(storage)
        if storage not in self.live:
            self.fail("free-not-live", self.name(storage))
        if storage in self.writing or storage in self.reading:
            self.fail("free-in-flight", self.name(storage))
        if self.problem.storages[storage].persistent and not self.problem.storages[storage].movable:
            self.fail("free-pinned", self.name(storage))
        del self.live[storage]
        self.live_bytes -= self.problem.storages[storage].size_bytes
        self.record(self.live_bytes)

    def transfer(self, size_bytes: int, bytes_per_us: float) -> int:
        """Queue a transfer on the disk stream, which delays compute; returns the time at which it is complete."""
        start = max(self.clock, self.disk_clock)
        duration = self.problem.latency_us + math.ceil(size_bytes / bytes_per_us)
        self.disk_clock = start + duration
        self.clock += math.floor(self.problem.interference * duration)
        return self.disk_clock

    def offload(self, storage: int) -> None:
        self.require_storage(storage)
        if storage not in self.live:
            self.fail("offload-not-live", self.name(storage))
        if not self.problem.storages[storage].movable or not self.problem.can_offload:
            self.fail("offload-not-movable", self.name(storage))
        if self.problem.storages[storage].stored:
            self.fail("offload-stored", f"{self.name(storage)} is on disk already")
        if storage in self.writing or storage in self.reading:
            self.fail("transfer-pending", self.name(storage))
        size_bytes = self.problem.storages[storage].size_bytes
        self.disk.pop(storage, None)
        self.away.add(storage)
        self.writing[storage] = self.transfer(size_bytes, self.problem.write_bytes_per_us)
        self.offloads += 1
        self.written_bytes += size_bytes
        self.record(self.live_bytes)

    def prefetch(self, storage: int) -> None:
        self.require_storage(storage)
        if storage in self.live:
            self.fail("prefetch-live", self.name(storage))
        if storage not in self.disk:
            self.fail("prefetch-no-copy", self.name(storage))
        size_bytes = self.problem.storages[storage].size_bytes
        self.away.add(storage)
        self.live[storage] = self.disk[storage]
        self.live_bytes += size_bytes
        self.reading[storage] = self.transfer(size_bytes, self.problem.read_bytes_per_us)
        self.prefetches += 1
        self.read_bytes += size_bytes
        self.record(self.live_bytes)

    def wait(self, storage: int) -> None:
        self.require_storage(storage)
        if storage in self.writing:
            complete = self.writing.pop(storage)
            self.disk[storage] = self.live[storage]
        elif storage in self.reading:
            complete = self.reading.pop(storage)
        else:
            self.fail("wait-nothing", self.name(storage))
        self.stall_us += max(0, complete - self.clock)
        self.clock = max(self.clock, complete)
        self.record(self.live_bytes)

    def end(self) -> None:
        """Everything ran, nothing moves, and every storage is where it belongs."""
        for index, count in enumerate(self.run_count):
            if count == 0 and not self.problem.ops[index].optional:
                self.fail("missing-op", self.problem.ops[index].name)
        for pending in (*self.writing, *self.reading):
            self.fail("end-in-flight", self.name(pending))
        limit = self.problem.away_limit_bytes
        if self.enforce_budget and limit is not None and self.away_bytes() > limit:
            self.fail("over-away-limit", f"{self.away_bytes()} bytes have a place outside of memory, the limit is {limit}")
        for index, storage in enumerate(self.problem.storages):
            if storage.output and self.live.get(index) != self.final[index]:
                self.fail("end-output", f"{storage.name} must be live at version {self.final[index]}")
            if storage.persistent:
                self.check_home(index)
            elif not storage.output and index in self.live:
                self.fail("end-leak", f"{storage.name} is still live")

    def check_home(self, storage: int) -> None:
        """A persistent storage ends at home, at its final version."""
        if storage in self.at_home:
            if self.live.get(storage) != self.final[storage]:
                self.fail("end-home", f"{self.name(storage)} must be live at version {self.final[storage]}")
        elif storage in self.live or self.disk.get(storage) != self.final[storage]:
            self.fail("end-home", f"{self.name(storage)} must be on disk only, at version {self.final[storage]}")

    def away_bytes(self) -> int:
        return sum(self.problem.storages[storage].size_bytes for storage in self.away)

    def report(self) -> Report:
        return Report(
            peak_bytes=self.peak_bytes,
            peak_step=self.peak_step,
            time_us=self.clock,
            timeline=tuple(self.timeline),
            stall_us=self.stall_us,
            runs=sum(self.run_count),
            recomputes=sum(max(0, count - 1) for count in self.run_count),
            offloads=self.offloads,
            prefetches=self.prefetches,
            written_bytes=self.written_bytes,
            read_bytes=self.read_bytes,
            away_bytes=self.away_bytes(),
        )
