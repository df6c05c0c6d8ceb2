"""The exact model, for small problems: a Boolean model over a grid of events, solved by CP-SAT.

Its space: first runs in base order; every op at most twice; between two first runs (and after the last one) the
reruns are in base order; transfers are synchronous (Offload, Wait; Prefetch, Wait); any choice for every run; any
homes. A bound from here holds for this space only: overlapped transfers or another order may be faster.

Grid: stage p has events (p, k) for k < p (rerun of op k, optional) and (p, p) (first run); stage n has reruns only.
Before each event lies a boundary at which storages may be freed, written to disk or read from disk.
    m[e, s, v]  version v of storage s is in memory when event e begins      d[e, s, v]  ... is on disk
    a[e, s, v]  ... is in memory when event e ends                           c[e, j]     event e runs choice j
    o[e, s, v]  it is written to disk at the boundary before e               f[e, s, v]  it is read from disk there
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from solvers.bounds import roofline_us
from solvers.decode import Tables, Value
from solvers.problem import Problem
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import CpModel, CpSolver, IntVar, LinearExprT

MAX_CELLS = 60_000


@dataclass(frozen=True, slots=True)
class ExactAnswer:
    """schedule: None if none was found. bound_us holds in the module's space. status: "optimal", "feasible",
    "infeasible" (proven in this space), "unknown", or "too large"."""

    schedule: Schedule | None
    bound_us: int | None
    status: str


@dataclass(frozen=True, slots=True)
class Event:
    """A possible run of op `op` in stage `stage`; first: the one of its own stage, which must happen unless it is optional."""

    stage: int
    op: int
    first: bool


def events_of(problem: Problem) -> list[Event]:
    """The grid in order. Ops that may not run again have no rerun events."""
    count = len(problem.ops)
    return [
        Event(stage, op, op == stage)
        for stage in range(count + 1)
        for op in range(min(stage + 1, count))
        if op == stage or problem.ops[op].rerunnable
    ]


class Model:
    """The variables, and one method per constraint family. The last boundary (index len(events)) is the end."""

    def __init__(self, problem: Problem) -> None:
        from ortools.sat.python import cp_model

        self.problem, self.tables = problem, Tables(problem)
        self.model: CpModel = cp_model.CpModel()
        self.events = events_of(problem)
        self.values = self._values()
        self.m: dict[tuple[int, Value], LinearExprT] = {}
        self.a: dict[tuple[int, Value], LinearExprT] = {}
        self.d: dict[tuple[int, Value], LinearExprT] = {}
        self.o: dict[tuple[int, Value], IntVar] = {}
        self.f: dict[tuple[int, Value], IntVar] = {}
        self.c: dict[tuple[int, int], IntVar] = {}
        self.resident: dict[int, LinearExprT] = {}
        self._variables()
        for event in range(len(self.events)):
            self._add_run(event)
            self._add_effects(event)
            self._add_memory(event)
        for boundary in range(len(self.events) + 1):
            self._add_boundary(boundary)
        self._add_start()
        self._add_end()
        self._add_rerun_limit()
        self._add_objective()

    def _values(self) -> list[list[Value]]:
        """For every storage its values: persistent ones from version 0, created ones from version 1."""
        first = [0 if s.persistent else 1 for s in self.problem.storages]
        final = self.tables.final
        return [[(s, v) for v in range(first[s], final[s] + 1)] for s in range(len(first))]

    def _bool(self, name: str) -> IntVar:
        return self.model.new_bool_var(name)

    def _movable(self, storage: int) -> bool:
        return self.problem.storages[storage].movable

    def _variables(self) -> None:
        """All Booleans; a value exists only from the stage of its producer's first run on."""
        for e in range(len(self.events) + 1):
            stage = self.events[e].stage if e < len(self.events) else len(self.problem.ops)
            for value in (v for values in self.values for v in values):
                storage, born = value[0], self.tables.producer.get(value, -1)
                if born > stage:
                    continue
                self.m[e, value] = self._bool(f"m{e}_{value}")
                if e < len(self.events):
                    self.a[e, value] = self._bool(f"a{e}_{value}")
                if self._movable(storage) and (self.problem.can_offload or self.problem.storages[storage].persistent):
                    self.d[e, value] = self._bool(f"d{e}_{value}")
                    self.f[e, value] = self._bool(f"f{e}_{value}")
                    if self.tables.may_spill[storage]:
                        self.o[e, value] = self._bool(f"o{e}_{value}")
            if e < len(self.events):
                for j in range(len(self.problem.ops[self.events[e].op].choices)):
                    self.c[e, j] = self._bool(f"c{e}_{j}")

    def ran(self, event: int) -> LinearExprT:
        """1 if the event happens."""
        choices = self.problem.ops[self.events[event].op].choices
        return sum(self.c[event, j] for j in range(len(choices)))

    def live(self, event: int, storage: int) -> LinearExprT:
        """1 if any version of the storage is in memory when the event begins."""
        return sum(self.m[event, value] for value in self.values[storage] if (event, value) in self.m)

    def _add_run(self, event: int) -> None:
        """c[e, j] <= m[e, u] for reads u of choice j; sum_j c[e, j] <= m[e, u] for writes; first runs happen."""
        item = self.events[event]
        op = self.problem.ops[item.op]
        self.model.add(self.ran(event) == 1) if item.first and not op.optional else self.model.add(self.ran(event) <= 1)
        for j in range(len(op.choices)):
            for value in self.tables.reads[item.op][j]:
                self.model.add(self.c[event, j] <= self.m[event, value])
        for value in self.tables.writes[item.op]:
            self.model.add(self.ran(event) <= self.m[event, value])
        if not item.first and not op.writes:  # a rerun makes something that isn't live
            self.model.add(self.ran(event) <= sum(1 - self.live(event, s) for s in op.creates))

    def _add_effects(self, event: int) -> None:
        """a[e] from m[e]: creation gives version 1 unless a copy is live, a write moves the version up by one."""
        op = self.problem.ops[self.events[event].op]
        written = dict(self.tables.writes[self.events[event].op])
        for storage, values in enumerate(self.values):
            for value in values:
                if (event, value) not in self.a:
                    continue
                after, before, ran = self.a[event, value], self.m[event, value], self.ran(event)
                if storage in op.creates and value[1] == 1:
                    self.model.add(after >= before)
                    self.model.add(after <= before + ran)
                    self.model.add(after <= before + 1 - self.live(event, storage))
                    self.model.add(after >= ran - self.live(event, storage))
                elif storage in written and value[1] == written[storage]:
                    self.model.add(after == before - ran)
                elif storage in written and value[1] == written[storage] + 1:
                    self.model.add(after == before + ran)
                else:
                    self.model.add(after == before)

    def _add_memory(self, event: int) -> None:
        """constant + sum_s size_s m[e, s] + (creates + workspace) ran[e] <= budget."""
        op, size = self.problem.ops[self.events[event].op], self.tables.size
        made = sum(size[s] for s in op.creates)
        used = sum(
            size[value[0]] * self.m[event, value]
            for values in self.values
            for value in values
            if (event, value) in self.m
        )
        run = sum((made + choice.workspace_bytes) * self.c[event, j] for j, choice in enumerate(op.choices))
        self.model.add(used + run + self.problem.constant_bytes <= self.problem.budget_bytes)

    def _before(self, boundary: int, value: Value, state: str) -> LinearExprT:
        """What precedes a boundary: the end of the previous event, or the start."""
        if boundary == 0:
            if value[1] != 0:
                return 0
            home = self._home(value[0])
            return home if state == "memory" else 1 if self.tables.stored[value[0]] else 1 - home
        if state == "memory":
            return self.a.get((boundary - 1, value), 0)
        return self.d.get((boundary - 1, value), 0)

    def _home(self, storage: int) -> LinearExprT:
        """1 if the persistent storage's home is memory."""
        if storage not in self.resident:
            self.resident[storage] = self._bool(f"r{storage}") if self._movable(storage) else 1
        return self.resident[storage]

    def _add_boundary(self, boundary: int) -> None:
        """m <= a + f;  f <= d;  d <= d' + o;  o <= a;  one version at a time in memory and on disk."""
        for storage, values in enumerate(self.values):
            here = [value for value in values if (boundary, value) in self.m]
            for value in here:
                key, before = (boundary, value), self._before(boundary, value, "memory")
                self.model.add(self.m[key] <= before + self.f.get(key, 0))
                if key in self.d:
                    self.model.add(self.f[key] <= self.d[key])
                    self.model.add(self.d[key] <= self._before(boundary, value, "disk") + self.o.get(key, 0))
                if key in self.o:
                    self.model.add(self.o[key] <= before)
                if self.problem.storages[storage].persistent and not self._movable(storage):
                    self.model.add(self.m[key] >= before)
            self.model.add(sum(self.m[boundary, value] for value in here) <= 1)
            self.model.add(sum(self.d.get((boundary, value), 0) for value in here) <= 1)

    def _add_start(self) -> None:
        """constant + resident storages <= budget before the first step."""
        homes = [(s, self._home(s)) for s, info in enumerate(self.problem.storages) if info.persistent]
        used = sum(self.tables.size[s] * home for s, home in homes)
        self.model.add(used + self.problem.constant_bytes <= self.problem.budget_bytes)

    def _add_end(self) -> None:
        """Outputs live; persistent storages at home at their final version; nothing else live; within the budget."""
        end, size = len(self.events), self.tables.size
        for storage, info in enumerate(self.problem.storages):
            final = (storage, self.tables.final[storage])
            stays: LinearExprT = self._home(storage) if info.persistent else int(info.output)
            for value in self.values[storage]:
                self.model.add(self.m[end, value] == (stays if value == final else 0))
            if info.persistent and info.movable:
                self.model.add(self.d[end, final] >= 1 - stays)
        used = sum(size[value[0]] * self.m[end, value] for values in self.values for value in values)
        self.model.add(used + self.problem.constant_bytes <= self.problem.budget_bytes)

    def _add_rerun_limit(self) -> None:
        """Every op runs at most twice."""
        for op in range(len(self.problem.ops)):
            again = [e for e, item in enumerate(self.events) if item.op == op and not item.first]
            self.model.add(sum(self.ran(e) for e in again) <= 1)

    def _add_objective(self) -> None:
        """min compute + synchronous transfers."""
        tables, ops = self.tables, self.problem.ops
        compute = sum(ops[self.events[e].op].choices[j].time_us * run for (e, j), run in self.c.items())
        writes = sum(tables.write_us[value[0]] * o for (_, value), o in self.o.items())
        reads = sum(tables.read_us[value[0]] * f for (_, value), f in self.f.items())
        self.model.minimize(compute + writes + reads)

    def schedule(self, solver: CpSolver) -> Schedule:
        """The steps of the solver's answer."""
        steps: list[Step] = []
        resident = frozenset(s for s, home in self.resident.items() if self._movable(s) and solver.value(home) == 1)
        live = {s: 0 for s, home in self.resident.items() if solver.value(home) == 1}
        for boundary in range(len(self.events) + 1):
            steps += self._boundary_steps(solver, boundary, live)
            if boundary == len(self.events):
                break
            op = self.events[boundary].op
            steps += [Run(op, j) for j in range(len(self.problem.ops[op].choices)) if solver.value(self.c[boundary, j])]
            live.clear()
            live.update(value for (e, value), a in self.a.items() if e == boundary and solver.value(a))
        return Schedule(tuple(steps), resident)

    def _boundary_steps(self, solver: CpSolver, boundary: int, live: dict[int, int]) -> list[Step]:
        """Writes, then frees, then reads."""
        steps: list[Step] = []
        wanted = {value[0]: value[1] for (e, value), m in self.m.items() if e == boundary and solver.value(m)}
        for (e, value), o in self.o.items():
            if e == boundary and solver.value(o) and live.get(value[0]) == value[1]:
                steps += [Offload(value[0]), Wait(value[0])]
        steps += [Free(storage) for storage in live if wanted.get(storage) != live[storage]]
        reads = [storage for storage in wanted if live.get(storage) != wanted[storage]]
        return steps + [step for storage in reads for step in (Prefetch(storage), Wait(storage))]


def cells(problem: Problem) -> int:
    """Size of the model: events times values."""
    return len(events_of(problem)) * (len(problem.storages) + sum(len(op.writes) for op in problem.ops))


def solve_exact(problem: Problem, time_limit_s: float, seed: int = 0, workers: int = 1) -> ExactAnswer:
    """The fastest schedule of the module's space within the budget, or the best found within the limit."""
    if cells(problem) > MAX_CELLS:
        return ExactAnswer(None, None, "too large")
    from ortools.sat.python import cp_model

    built = Model(problem)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = workers
    status = solver.solve(built.model)
    if status == cp_model.INFEASIBLE:
        return ExactAnswer(None, None, "infeasible")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ExactAnswer(None, None, "unknown")
    bound = max(roofline_us(problem), math.ceil(solver.best_objective_bound - 1e-6))
    return ExactAnswer(built.schedule(solver), bound, "optimal" if status == cp_model.OPTIMAL else "feasible")
