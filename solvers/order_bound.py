"""A lower bound of the time of every schedule whose first runs come in base order, whatever it recomputes and moves.

One moment cuts the step in two, the first run of some op z. Of a schedule only this is kept: what is in memory at that moment, what runs again or is
read before and after it, which way each op takes. Order and memory before and after don't count, so every schedule gives a solution of the linear
program below, and its optimum is a bound for the problem as `check` replays it; nothing is contracted. It knows what cut_bound.py can't know for
lack of an order: what else has run by then, and that each way of each op needs its inputs on its own side. For a value v = (storage, version), op o,
side k (0: before z, 1: from z on):

    K[v]     v is in memory while z runs       R[k, o]  o runs (again) on side k         F[k, v]  v is read from disk there
    X[o, c]  op o runs in way c                H[s]     the home of persistent s is memory    Y[v]  v is written to disk

    minimise T;   T >= all runs + what transfers delay them;   T >= all transfers
    available(0, v) = R[0, maker(v)] + F[0, v] + H[s] (version 0);     available(1, v) = K[v] + R[1, maker(v)] + F[1, v];     1 where v is first made
    an optional op's result: no F before z, where it has to be made once, and from z on F[1, v] <= R[0, maker(v)]
    available(k, v) >= X[o, c], R[k, o]  where o (in way c) needs v on side k;     K[v] <= available(0, v)
    memory while z runs: what it uses and creates, its workspace, and all other K[v], within the budget; homes at the start and at the end too

Several moments in one program, each with its own rows and the runs in common, say what the best of them says alone. Solved in whole numbers, which a
schedule's are, that one says a little more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from solvers.bounds import alone_bytes, always_live, bytes_of, roofline_us
from solvers.decode import Tables, Value
from solvers.linear import Expression
from solvers.problem import Op, Problem

if TYPE_CHECKING:
    from ortools.math_opt.python.mathopt import Variable

UNIT = 1024.0  # bytes
LEAST_SECONDS = 0.01
SAFE = 1e-6  # of the bound: what the linear program may be wrong by


class _Facts:
    """What is the same at every moment. needs[o]: what op o needs -> the ways that need it, without what is always in memory."""

    def __init__(self, problem: Problem) -> None:
        self.pinned = always_live(problem)
        self.problem = _with_fitting_ways(problem, self.pinned)
        self.tables = Tables(self.problem)
        self.needs = [self.needs_of(o) for o in range(len(problem.ops))]

    def needs_of(self, o: int) -> dict[Value, list[int]]:
        result: dict[Value, list[int]] = {}
        for c in range(len(self.problem.ops[o].choices)):
            for value in self.tables.needs(o, c):
                if value[0] not in self.pinned:
                    result.setdefault(value, []).append(c)
        return result


class _Program:
    """The linear program for one moment, the first run of op z. side[o]: that of op o's first run. `whole`: in whole numbers."""

    def __init__(self, facts: _Facts, z: int, whole: bool = False) -> None:
        from ortools.math_opt.python import mathopt

        self.problem, self.tables, self.pinned, self.needs = facts.problem, facts.tables, facts.pinned, facts.needs
        self.z, self.whole = z, whole
        self.model = mathopt.Model(name="order bound")
        self.side = [int(z <= op) for op in range(len(self.needs))]
        self.kept: dict[Value, Variable] = {}
        self.again: dict[tuple[int, int], Variable] = {}
        self.fetched: dict[tuple[int, Value], Variable] = {}
        self.way: dict[tuple[int, int], Variable] = {}
        self.home: dict[int, Variable] = {}
        self.written: dict[Value, Variable] = {}
        self.busy, self.disk = Expression(), Expression()

    def build(self) -> None:
        self.add_ways()
        self.add_homes()
        for o, op in enumerate(self.problem.ops):
            for k in (0, 1) if op.optional else ():
                self.run_again(k, o)
        for value in sorted(self.useful_from(self.z)):
            self.kept[value] = self.share()
            self.bring(1, value)
        for value in sorted(self.useful_from(0)):
            self.bring(0, value)
        for k in (0, 1):
            self.add_needs(k)
        self.add_moment()
        self.add_end()
        step = self.model.add_variable(lb=0.0)
        for clock in (self.busy, self.disk):
            self.row(Expression().add(step).add(clock, -1.0), 0.0)
        self.model.minimize(step)

    def row(self, expression: Expression, least: float = -math.inf, most: float = math.inf) -> None:
        row = self.model.add_linear_constraint(lb=least - expression.constant, ub=most - expression.constant)
        for variable, value in expression.terms.items():
            row.set_coefficient(variable, value)

    def share(self) -> Variable:
        return self.model.add_variable(lb=0.0, ub=1.0, is_integer=self.whole)

    def add_ways(self) -> None:
        """X: of each op that must run, one way."""
        for o, op in enumerate(self.problem.ops):
            if op.optional:
                continue
            if len(op.choices) == 1:
                self.busy.add(float(op.choices[0].time_us))
                continue
            for c, choice in enumerate(op.choices):
                self.way[o, c] = self.share()
                self.busy.add(self.way[o, c], choice.time_us)
            self.row(self.ways(o, range(len(op.choices))), 1.0, 1.0)

    def ways(self, o: int, chosen: range | list[int]) -> Expression:
        """How much of op o runs in these ways."""
        if (o, 0) not in self.way:
            return Expression(constant=float(bool(chosen)))
        result = Expression()
        for c in chosen:
            result.add(self.way[o, c])
        return result

    def add_homes(self) -> None:
        start = Expression(constant=float(self.base_bytes()))
        for s, may in enumerate(self.tables.may_leave):
            if may and s not in self.pinned:
                self.home[s] = self.share()
                start.add(self.home[s], self.tables.size[s])
        self.row(start.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)

    def base_bytes(self) -> int:
        return self.problem.constant_bytes + bytes_of(self.problem, self.pinned)

    def transfer(self, variable: Variable, us: int) -> None:
        self.busy.add(variable, math.floor(self.problem.interference * us))
        self.disk.add(variable, us)

    def write(self, value: Value) -> Variable:
        """Y"""
        if value not in self.written:
            self.written[value] = self.share()
            self.transfer(self.written[value], self.tables.write_us[value[0]])
        return self.written[value]

    def forced(self, o: int) -> list[Value]:
        return [value for value, ways in self.needs[o].items() if len(ways) == len(self.problem.ops[o].choices)]

    def may_run(self, k: int, o: int) -> bool:
        """Op o may run on side k beside its first run: it ran before, or is optional, and comes when it is needed."""
        op = self.problem.ops[o]
        return op.optional or (op.rerunnable and self.side[o] < k)

    def useful_from(self, first: int) -> set[Value]:
        """Values that op `first` or something after it may need and that are there before."""
        stack = [v for o in range(first, len(self.problem.ops)) for v in self.needs[o]]
        stack += [(s, v) for s, v in enumerate(self.tables.final) if self.problem.storages[s].output or s in self.home]
        result = set[Value]()
        while stack:
            value = stack.pop()
            maker = self.tables.producer.get(value, -1)
            late = maker >= first and not self.problem.ops[maker].optional
            if value in result or value[0] in self.pinned or late:
                continue
            result.add(value)
            if maker >= 0 and (self.problem.ops[maker].optional or self.problem.ops[maker].rerunnable):
                stack += self.forced(maker)
        return result

    def bring(self, k: int, value: Value) -> None:
        """R and F: what may bring a value on side k."""
        s, version = value
        maker = self.tables.producer.get(value, -1)
        self.run_again(k, maker)
        optional = maker >= 0 and self.problem.ops[maker].optional
        at_home = version == 0 and s in self.home
        if (at_home or self.tables.may_spill[s]) and not (optional and k == 0):
            self.fetched[k, value] = self.share()
            self.transfer(self.fetched[k, value], self.tables.read_us[s])
            on_disk = Expression().add(self.fetched[k, value], -1.0)
            if at_home:
                on_disk.add(1.0).add(self.home[s], -1.0)
            if self.tables.may_spill[s]:
                on_disk.add(self.write(value))
            self.row(on_disk, 0.0)
            if optional:
                self.row(Expression().add(self.fetched[k, value], -1.0).add(self.again[0, maker]), 0.0)

    def run_again(self, k: int, o: int) -> None:
        if o >= 0 and (k, o) not in self.again and self.may_run(k, o):
            self.again[k, o] = self.share()
            self.busy.add(self.again[k, o], min(choice.time_us for choice in self.problem.ops[o].choices))

    def available(self, k: int, value: Value) -> Expression | None:
        """None: it is made there for the first time."""
        s, version = value
        maker = self.tables.producer.get(value, -1)
        if maker >= 0 and self.side[maker] == k and not self.problem.ops[maker].optional:
            return None
        result = Expression()
        if k == 0 and version == 0:
            result.add(self.home.get(s, 1.0))
        for part in (self.kept.get(value) if k else None, self.again.get((k, maker)), self.fetched.get((k, value))):
            if part is not None:
                result.add(part)
        return result

    def add_needs(self, k: int) -> None:
        for o, op in enumerate(self.problem.ops):
            if self.side[o] == k and not op.optional:
                for value, ways in self.needs[o].items():
                    self.demand(k, value, self.ways(o, ways))
        for (side, o), run in self.again.items():
            for value in self.forced(o) if side == k else ():
                self.demand(k, value, Expression().add(run))
        for value, kept in self.kept.items() if k == 0 else ():
            self.demand(0, value, Expression().add(kept))

    def demand(self, k: int, value: Value, amount: Expression) -> None:
        available = self.available(k, value)
        if available is not None:
            for variable, factor in amount.terms.items():
                available.add(variable, -factor)
            self.row(available, amount.constant)

    def add_moment(self) -> None:
        """Memory while op z runs for the first time."""
        op, size = self.problem.ops[self.z], self.tables.size
        memory = Expression(constant=float(self.base_bytes() + bytes_of(self.problem, op.creates)))
        for value, ways in self.needs[self.z].items():
            self.row(Expression().add(self.kept[value]).add(self.ways(self.z, ways), -1.0), 0.0)
        for (s, _), kept in self.kept.items():
            if s not in op.creates:
                memory.add(kept, size[s])
        for c, choice in enumerate(op.choices):
            memory.add(self.ways(self.z, [c]), choice.workspace_bytes)
        self.row(memory.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)

    def add_end(self) -> None:
        """Outputs and homes in memory, at their last versions; what is at home on disk is there."""
        memory = Expression(constant=float(self.base_bytes()))
        for s, info in enumerate(self.problem.storages):
            if s in self.pinned:
                continue
            final = (s, self.tables.final[s])
            if info.output:
                self.demand(1, final, Expression(constant=1.0))
                memory.add(float(info.size_bytes))
            elif s in self.home:
                memory.add(self.home[s], info.size_bytes)
                self.demand(1, final, Expression().add(self.home[s]))
                if final[1]:
                    self.row(Expression().add(self.write(final)).add(self.home[s]), 1.0)
        self.row(memory.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)


def base_order_bound_us(problem: Problem, moments: Sequence[int], deadline: float) -> int:
    """No schedule with its first runs in base order is faster. The largest bound of as many of the moments (ops that aren't optional) as are solved
    before the deadline (time.monotonic), and of the best of them again in whole numbers; the roofline at least, and without ortools."""
    best, until = (roofline_us(problem), -1), (time.monotonic() + deadline) / 2  # half of the time for the moments
    facts = _Facts(problem)
    for z in moments:
        best = max(best, (_bound_us(facts, z, until), z))
    return max(best[0], _bound_us(facts, best[1], deadline, whole=True)) if best[1] >= 0 else best[0]


def _with_fitting_ways(problem: Problem, pinned: frozenset[int]) -> Problem:
    """The problem without the ways of ops that need more than the budget alone: no schedule takes them."""
    room = problem.budget_bytes - problem.constant_bytes - bytes_of(problem, pinned)

    def fitting(op: Op) -> Op:
        ways = tuple(way for way in op.choices if alone_bytes(problem, op, way, pinned) <= room)
        return replace(op, choices=ways or op.choices)

    return replace(problem, ops=tuple(map(fitting, problem.ops)))


def _bound_us(facts: _Facts, z: int, deadline: float, whole: bool = False) -> int:
    """The bound for one moment; 0 where it is not solved before the deadline. `whole`: in whole numbers, which a schedule gives."""
    try:
        from ortools.math_opt.python import mathopt
    except ImportError:
        return 0
    if time.monotonic() > deadline:
        return 0
    program = _Program(facts, z, whole)
    program.build()
    left = timedelta(seconds=max(deadline - time.monotonic(), LEAST_SECONDS))
    try:
        result = mathopt.solve(program.model, mathopt.SolverType.HIGHS, params=mathopt.SolveParameters(time_limit=left))
    except (AttributeError, RuntimeError, ValueError):  # as in milp.py: so some failures of the solver arrive here
        return 0
    optimal = result.termination.reason.name == "OPTIMAL"
    if not optimal and not whole:
        return 0
    proven = result.best_objective_bound() if whole else result.objective_value()
    return math.floor(proven * (1 - SAFE)) if math.isfinite(proven) else 0
