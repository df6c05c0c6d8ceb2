"""The linear program of the bound of base order: some moments, the first runs of ops z, cut the step into phases.

Of a schedule only this is kept: what is in memory at those moments, what runs again, is read or written in each phase, which way each op takes.
Order and memory within a phase don't count, so every schedule gives a solution, and the optimum is a bound for the problem as `check` replays it;
nothing is contracted. For a value v = (storage, version), op o, phase k (0: before the first moment; k: from moment k on):

    K[k, v]  v is in memory at moment k     R[k, o]  o runs (again) in phase k     F[k, v], W[k, v]  v is read from disk, written; asked for there
    X[o, c]  op o runs in way c             H[s]     the home of persistent s is memory
    P[k, v]  its transfer given before moment k is still to be done then: v is in memory, P[k, v] <= K[k, v], and z neither reads nor writes it
    N[k, v]  v is in memory at moment k, and was all the time since it was made

    minimise the sum over k of T[k];   T[k] >= runs of phase k + what transfers ordered there delay them;   T[k] >= transfers done there
    T[k] >= first run of its z + transfers both ordered and done there: none of them begins before z has run
    available(k, v) = K[k, v] + R[k, maker(v)] + F[k, v]  (k = 0, version 0: H[s] for K);     1 where v is first made
    available(k, v) >= X[o, c], R[k, o]  where o (in way c) needs v in phase k;   >= K[k + 1, v];   >= W[k, v], without F: what was read is on disk
    F[k, v] <= D[k, v] = sum of W[0..k, v] + (1 - H[s] for version 0);   N[k, v] + R[k, maker(v)] + D[k, v] >= what is needed in phase k
    D = 1 for what is stored, which has no W
    an optional op's result: no F in phase 0, where it has to be made once, and F[k, v] <= sum of R[0..k-1, maker(v)]
    memory at moment k: what z uses and creates, its workspace, and all other K[k, v], within the budget; homes at the start and at the end too
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from solvers.bounds import alone_bytes, always_live, bytes_of
from solvers.decode import Tables, Value
from solvers.linear import Expression, LinearProgram, Variable, total
from solvers.problem import Op, Problem

UNIT = 1024.0  # bytes


class Facts:
    """What is the same at every moment. needs[o]: what op o needs -> the ways that need it, without what is always in memory. What is no larger than
    tiny_bytes counts as always there, and as nothing."""

    def __init__(self, problem: Problem, tiny_bytes: int = 0) -> None:
        self.pinned = always_live(problem)
        self.problem = _with_fitting_ways(problem, self.pinned)
        self.tables = Tables(self.problem)
        self.disk = any(self.tables.may_leave) or any(self.tables.may_spill)
        self.ignored = self.pinned | {s for s, size in enumerate(self.tables.size) if size <= tiny_bytes}
        self.needs = [self.needs_of(o) for o in range(len(problem.ops))]

    def needs_of(self, o: int) -> dict[Value, list[int]]:
        result: dict[Value, list[int]] = {}
        for c in range(len(self.problem.ops[o].choices)):
            for value in self.tables.needs(o, c):
                if value[0] not in self.ignored:
                    result.setdefault(value, []).append(c)
        return result


class Program(LinearProgram):
    """The linear program for some moments, in order: the first runs of these ops. phase[o]: that of op o's first run."""

    def __init__(self, facts: Facts, moments: Sequence[int]) -> None:
        super().__init__()
        self.problem, self.tables, self.pinned, self.needs = facts.problem, facts.tables, facts.pinned, facts.needs
        self.ignored = facts.ignored
        self.starts = (0, *moments)  # the op with which each phase begins
        self.phase = [bisect_right(moments, op) for op in range(len(self.needs))]
        self.phases = range(len(self.starts))
        self.kept: dict[tuple[int, Value], Variable] = {}
        self.again: dict[tuple[int, int], Variable] = {}
        self.fetched: dict[tuple[int, Value], Variable] = {}
        self.way: dict[tuple[int, int], Variable] = {}
        self.home: dict[int, Variable] = {}
        self.written: dict[tuple[int, Value], Variable] = {}
        self.off_disk: dict[tuple[int, Value], Variable] = {}
        self.late: dict[tuple[int, int, Value], Variable] = {}
        self.busy, self.disk, self.after_first = ([Expression() for _ in self.phases] for _ in range(3))

    def build(self) -> None:
        self.add_ways()
        self.add_homes()
        for o, op in enumerate(self.problem.ops):
            for k in self.phases if op.optional else ():
                self.run_again(k, o)
        useful = [sorted(self.useful_from(start)) for start in self.starts]
        for k in self.phases:
            for value in useful[k]:
                if k:
                    self.kept[k, value] = self.binary()
                self.bring(k, value)
        for k in self.phases[1:] if len(self.phases) > 2 else ():
            for value in useful[k]:
                self.keep_off_disk(k, value)
        for k in self.phases:
            self.add_needs(k)
            if k:
                self.add_moment(k)
        self.add_end()
        for k, values in enumerate(useful):
            for value in values if k else ():
                self.postpone(k, value)
        self.add_clocks()

    def large(self, least_bytes: float) -> list[Variable]:
        """X, and K and H of storages above so many bytes."""
        kept = [variable for (_, (s, _)), variable in self.kept.items() if self.tables.size[s] > least_bytes]
        return [*self.way.values(), *kept, *(variable for s, variable in self.home.items() if self.tables.size[s] > least_bytes)]

    def add_ways(self) -> None:
        """X: of each op that must run, one way."""
        for o, op in enumerate(self.problem.ops):
            if op.optional:
                continue
            busy = self.busy[self.phase[o]]
            if len(op.choices) == 1:
                busy.add(float(op.choices[0].time_us))
                continue
            for c, choice in enumerate(op.choices):
                self.way[o, c] = self.binary()
                busy.add(self.way[o, c], choice.time_us)
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
            if may and s not in self.ignored:
                self.home[s] = self.binary()
                start.add(self.home[s], self.tables.size[s])
        self.row(start.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)

    def base_bytes(self) -> int:
        return self.problem.constant_bytes + bytes_of(self.problem, self.pinned)

    def transfer(self, k: int, variable: Variable, us: int) -> None:
        """A transfer that is asked for in phase k."""
        self.busy[k].add(variable, math.floor(self.problem.interference * us))
        self.disk[k].add(variable, us)
        self.after_first[k].add(variable, us)

    def write(self, k: int, value: Value) -> None:
        """W: the value may be written in phase k, where it is in memory."""
        if (k, value) not in self.written:
            self.written[k, value] = self.binary()
            self.transfer(k, self.written[k, value], self.tables.write_us[value[0]])

    def forced(self, o: int) -> list[Value]:
        return [value for value, ways in self.needs[o].items() if len(ways) == len(self.problem.ops[o].choices)]

    def may_run(self, k: int, o: int) -> bool:
        """Op o may run in phase k beside its first run: it ran before, or is optional, and comes when it is needed."""
        op = self.problem.ops[o]
        return op.optional or (op.rerunnable and self.phase[o] < k)

    def useful_from(self, first: int) -> set[Value]:
        """Values that op `first` or something after it may need and that are there before."""
        stack = [v for o in range(first, len(self.problem.ops)) for v in self.needs[o]]
        stack += [(s, v) for s, v in enumerate(self.tables.final) if self.problem.storages[s].output or s in self.home]
        result = set[Value]()
        while stack:
            value = stack.pop()
            maker = self.tables.producer.get(value, -1)
            late = maker >= first and not self.problem.ops[maker].optional
            if value in result or value[0] in self.ignored or late:
                continue
            result.add(value)
            if maker >= 0 and (self.problem.ops[maker].optional or self.problem.ops[maker].rerunnable):
                stack += self.forced(maker)
        return result

    def bring(self, k: int, value: Value) -> None:
        """R, F and W: what may bring a value in phase k, and write it there or in the phase that made it."""
        s, version = value
        maker = self.tables.producer.get(value, -1)
        self.run_again(k, maker)
        optional = maker >= 0 and self.problem.ops[maker].optional
        at_home = version == 0 and s in self.home
        made = 0 if maker < 0 or optional else self.phase[maker]
        if self.tables.may_spill[s]:
            for phase in range(made, k + 1):
                self.write(phase, value)
        if (at_home or self.tables.may_spill[s]) and not (optional and k == 0):
            self.fetched[k, value] = self.binary()
            self.transfer(k, self.fetched[k, value], self.tables.read_us[s])
            self.row(self.on_disk(k, value).add(self.fetched[k, value], -1.0), 0.0)
            if optional:
                was_made = total(self.again[phase, maker] for phase in range(k))
                self.row(was_made.add(self.fetched[k, value], -1.0), 0.0)

    def writes(self, value: Value, last: int) -> Expression:
        """How much of the value was written up to phase `last`."""
        return total(self.written[k, value] for k in range(last + 1) if (k, value) in self.written)

    def on_disk(self, k: int, value: Value) -> Expression:
        """How much of the value is on disk in phase k, or was."""
        if self.tables.stored[value[0]]:
            return Expression(constant=1.0)
        result = self.writes(value, k)
        return result.add(1.0).add(self.home[value[0]], -1.0) if value[1] == 0 and value[0] in self.home else result

    def again_of(self, k: int, value: Value) -> Expression:
        """How much of the value's maker runs again in phase k."""
        return total(self.again[key] for key in [(k, self.tables.producer.get(value, -1))] if key in self.again)

    def run_again(self, k: int, o: int) -> None:
        if o >= 0 and (k, o) not in self.again and self.may_run(k, o):
            self.again[k, o] = self.binary()
            self.busy[k].add(self.again[k, o], min(choice.time_us for choice in self.problem.ops[o].choices))

    def available(self, k: int, value: Value, read: bool = True) -> Expression | None:
        """None: it is made there for the first time. read: it may come from disk."""
        s, version = value
        maker = self.tables.producer.get(value, -1)
        if maker >= 0 and self.phase[maker] == k and not self.problem.ops[maker].optional:
            return None
        result = Expression()
        if k == 0 and version == 0:
            result.add(self.home.get(s, 1.0))
        for part in (self.kept.get((k, value)), self.again.get((k, maker)), self.fetched.get((k, value)) if read else None):
            if part is not None:
                result.add(part)
        return result

    def add_needs(self, k: int) -> None:
        for o, op in enumerate(self.problem.ops):
            if self.phase[o] == k and not op.optional:
                for value, ways in self.needs[o].items():
                    self.demand(k, value, self.ways(o, ways))
        for (phase, o), run in self.again.items():
            for value in self.forced(o) if phase == k else ():
                self.demand(k, value, Expression().add(run))
        for (phase, value), kept in self.kept.items():
            if phase == k + 1:
                self.demand(k, value, Expression().add(kept))
        for (phase, value), written in self.written.items():
            if phase == k:
                self.demand(k, value, Expression().add(written), read=False)  # what was read is on disk

    def demand(self, k: int, value: Value, amount: Expression, read: bool = True) -> None:
        available = self.available(k, value, read)
        if available is None:
            return
        if read and (k, value) in self.off_disk:
            self.row(self.on_disk(k, value).add(amount, -1.0).add(self.off_disk[k, value]).add(self.again_of(k, value)), 0.0)
        self.row(available.add(amount, -1.0), 0.0)

    def add_moment(self, k: int) -> None:
        """Memory while the op that begins phase k runs for the first time."""
        z, size = self.starts[k], self.tables.size
        op = self.problem.ops[z]
        memory = Expression(constant=float(self.base_bytes() + bytes_of(self.problem, op.creates)))
        for value, ways in self.needs[z].items():
            self.row(Expression().add(self.kept[k, value]).add(self.ways(z, ways), -1.0), 0.0)
        for (phase, (s, _)), kept in self.kept.items():
            if phase == k and s not in op.creates:
                memory.add(kept, size[s])
        for c, choice in enumerate(op.choices):
            memory.add(self.ways(z, [c]), choice.workspace_bytes)
        self.row(memory.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)

    def add_end(self) -> None:
        """Outputs and homes in memory, at their last versions; what is at home on disk is there."""
        memory, last = Expression(constant=float(self.base_bytes())), self.phases[-1]
        for s, info in enumerate(self.problem.storages):
            if s in self.ignored:
                continue
            final = (s, self.tables.final[s])
            if info.output:
                self.demand(last, final, Expression(constant=1.0))
                memory.add(float(info.size_bytes))
            elif s in self.home:
                memory.add(self.home[s], info.size_bytes)
                self.demand(last, final, Expression().add(self.home[s]))
                if final[1]:
                    self.write_home(s, final)
        self.row(memory.scaled(1 / UNIT), most=self.problem.budget_bytes / UNIT)

    def write_home(self, s: int, final: Value) -> None:
        """What the step changed is written unless its home is memory."""
        last = self.phases[-1]
        if self.tables.may_spill[s] and (last, final) not in self.written:  # the last phase made it
            self.write(last, final)
        self.row(self.writes(final, last).add(self.home[s]), 1.0)

    def keep_off_disk(self, k: int, value: Value) -> None:
        """N: the share of a value that is not on disk is there only if it was kept since it was made. Without it two halves of one half would do."""
        if (k, value) not in self.fetched:
            return
        never = self.off_disk[k, value] = self.binary()
        self.row(Expression().add(self.kept[k, value]).add(never, -1.0), 0.0)
        before = self.available(k - 1, value, read=False)
        if before is None:
            return
        if (k - 1, value) in self.off_disk:
            before.add(self.off_disk[k - 1, value]).add(self.kept[k - 1, value], -1.0)
        self.row(before.add(never, -1.0), 0.0)

    def postpone(self, k: int, value: Value) -> None:
        """P: what was asked for before moment k may be at work, or wait for its turn, then: it is in memory."""
        pending = Expression()
        for number, (transfers, us) in enumerate(((self.fetched, self.tables.read_us), (self.written, self.tables.write_us))):
            if (k - 1, value) not in transfers or self.in_use(self.starts[k], value, written=transfers is self.written):
                continue
            late = self.late[number, k, value] = self.share()
            asked = Expression().add(transfers[k - 1, value])
            if (number, k - 1, value) in self.late:
                asked.add(self.late[number, k - 1, value])
            self.row(asked.add(late, -1.0), 0.0)
            self.disk[k - 1].add(late, -us[value[0]])
            self.after_first[k - 1].add(late, -us[value[0]])
            self.disk[k].add(late, us[value[0]])
            pending.add(late)
        if pending.terms:
            self.row(pending.add(self.kept[k, value], -1.0), most=0.0)

    def in_use(self, z: int, value: Value, written: bool) -> bool:
        """No transfer of the value is at work while op z runs: all its ways need it, and where it is `written`, z changes it."""
        return value in self.forced(z) and (not written or value[0] in self.problem.ops[z].writes)

    def add_clocks(self) -> None:
        """The step takes as long as its phases, each of them as long as any of its clocks."""
        for k in self.phases[1:]:
            z = self.starts[k]
            for c, choice in enumerate(self.problem.ops[z].choices):
                self.after_first[k].add(self.ways(z, [c]), choice.time_us)
        length = Expression()
        for clocks in zip(self.busy, self.disk, self.after_first, strict=True):
            phase = self.variable()
            length.add(phase)
            for clock in clocks:
                self.row(Expression().add(phase).add(clock, -1.0), 0.0)
        self.minimise(length)


def _with_fitting_ways(problem: Problem, pinned: frozenset[int]) -> Problem:
    """The problem without the ways of ops that need more than the budget alone: no schedule takes them."""
    room = problem.budget_bytes - problem.constant_bytes - bytes_of(problem, pinned)

    def fitting(op: Op) -> Op:
        ways = tuple(way for way in op.choices if alone_bytes(problem, op, way, pinned) <= room)
        return replace(op, choices=ways or op.choices)

    return replace(problem, ops=tuple(map(fitting, problem.ops)))
