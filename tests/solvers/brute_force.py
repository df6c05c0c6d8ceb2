"""The optimum by exhaustive search over exactly the space of solvers.cp_sat, written independently of it.

A* over states (next first run, last rerun of this stage, which ops have rerun, memory, disk). The estimate of what
remains (the fastest choice of every op that hasn't run) never exceeds the truth. Steps: free one storage, write one
to disk, read one from disk, run an op again, run the next op for the first time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import combinations

from solvers.problem import Problem, final_versions, used_versions

Contents = frozenset[tuple[int, int]]  # (storage, version)
State = tuple[int, int, int, Contents, Contents]


def optimum_us(problem: Problem, limit_us: int | None = None) -> int | None:
    """The least time in the space, or None. limit_us: look no further than schedules of that time."""
    movable = [k for k, s in enumerate(problem.storages) if s.persistent and s.movable]
    homes = (frozenset(h) for n in range(len(movable) + 1) for h in combinations(movable, n))
    times = [time for home in homes if (time := _Search(problem, home, limit_us).run()) is not None]
    return min(times, default=None)


class _Search:
    def __init__(self, problem: Problem, home: frozenset[int], limit_us: int | None) -> None:
        self.problem, self.limit_us = problem, limit_us
        self.size = [s.size_bytes for s in problem.storages]
        self.room = problem.budget_bytes - problem.constant_bytes
        self.versions, final = used_versions(problem), final_versions(problem)
        best = [0 if op.optional else min(c.time_us for c in op.choices) for op in problem.ops]
        self.remaining = [sum(best[k:]) for k in range(len(best) + 1)]
        infos = list(enumerate(problem.storages))
        self.memory0 = frozenset((k, 0) for k, s in infos if s.persistent and (k in home or not s.movable))
        self.disk0 = frozenset((k, 0) for k, s in infos if s.stored or (s.persistent and s.movable and k not in home))
        self.memory_end = frozenset(
            (k, final[k]) for k, s in infos if s.output or (s.persistent and (k in home or not s.movable))
        )
        self.disk_end = frozenset((k, final[k]) for k, _ in self.disk0)

    def fits(self, memory: Contents, more: int = 0) -> bool:
        return sum(self.size[s] for s, _ in memory) + more <= self.room

    def run(self) -> int | None:
        start: State = (0, -1, 0, self.memory0, self.disk0)
        if not self.fits(self.memory0):
            return None
        cost, heap, tie = {start: 0}, [(self.remaining[0], 0, start)], 0
        while heap:
            estimate, _, state = heapq.heappop(heap)
            spent = cost[state]
            if estimate > spent + self.remaining[state[0]]:
                continue
            if state[0] == len(self.problem.ops) and state[3] == self.memory_end and self.disk_end <= state[4]:
                return spent
            for following, time_us in self.moves(state):
                total = spent + time_us
                bound = total + self.remaining[following[0]]
                if (self.limit_us is None or bound <= self.limit_us) and total < cost.get(following, math.inf):
                    cost[following] = total
                    tie += 1
                    heapq.heappush(heap, (bound, tie, following))
        return None

    def moves(self, state: State) -> Iterator[tuple[State, int]]:
        position, last, rerun, memory, disk = state
        yield from self.data_moves(state)
        if position < len(self.problem.ops):
            if self.problem.ops[position].optional:
                yield (position + 1, -1, rerun, memory, disk), 0
            for after, time_us in self.runs(position, memory, True):
                yield (position + 1, -1, rerun, after, disk), time_us
        for op in range(last + 1, position):
            if self.problem.ops[op].rerunnable and not rerun >> op & 1:
                for after, time_us in self.runs(op, memory, False):
                    yield (position, op, rerun | 1 << op, after, disk), time_us

    def data_moves(self, state: State) -> Iterator[tuple[State, int]]:
        """Free, write and read. A write or read takes effect at once and costs its whole duration."""
        position, last, rerun, memory, disk = state
        problem, live = self.problem, {s for s, _ in memory}
        for value in memory:
            info = problem.storages[value[0]]
            if info.movable or not info.persistent:
                yield (position, last, rerun, memory - {value}, disk), 0
            if info.movable and problem.can_offload and not info.stored and value not in disk:
                others = frozenset(x for x in disk if x[0] != value[0])
                duration = problem.latency_us + math.ceil(info.size_bytes / problem.write_bytes_per_us)
                yield (position, last, rerun, memory, others | {value}), duration
        for value in disk:
            if value[0] not in live and self.fits(memory | {value}):
                duration = problem.latency_us + math.ceil(self.size[value[0]] / problem.read_bytes_per_us)
                yield (position, last, rerun, memory | {value}, disk), duration

    def runs(self, index: int, memory: Contents, first: bool) -> Iterator[tuple[Contents, int]]:
        """The memory after a run of the op, for every choice that is possible now."""
        op, versions = self.problem.ops[index], self.versions[index]
        live = {s for s, _ in memory}
        new = [s for s in op.creates if s not in live]
        if any((s, versions[s]) not in memory for s in op.writes) or (not first and not new and not op.writes):
            return
        kept = frozenset(x for x in memory if x[0] not in op.writes)
        after = kept | {(s, versions[s] + 1) for s in op.writes} | {(s, 1) for s in new}
        made = sum(self.size[s] for s in op.creates)
        for choice in op.choices:
            if all((s, versions[s]) in memory for s in choice.reads) and self.fits(
                memory, made + choice.workspace_bytes
            ):
                yield after, choice.time_us
