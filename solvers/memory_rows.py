"""(C3) of the global model (milp.py): the rows that keep memory within the budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from solvers.linear import Expression, Variable

if TYPE_CHECKING:
    from solvers.milp import Residency

UNIT = 1024.0  # bytes: memory rows are in KiB
BLOCK_ROWS = 16


class Memory:
    """(C3): rows in the order of time. Before each op with a use: one for each moment of each group that may run there; then the op's."""

    def __init__(self, model: Residency) -> None:
        self.m, self.blocks, self.size = model, model.blocks, model.tables.size
        self.rows: list[Expression] = []
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def build(self) -> None:
        events = sorted({*self.m.local, *self.blocks.menu})
        base, count = self.blocks.base_bytes, self.m.count
        previous = -1
        for q in [*events, count]:
            region = base[previous + 1 : q]
            floor = max((int(base[e]) for e in (previous, q) if 0 <= e <= count), default=0)
            if len(region) and int(region.max()) > floor:
                self.rows.append(Expression(constant=float(region.max())))
            if q not in self.first:
                self.first[q] = len(self.rows)
                self.add_moments(q)
                self.add_op(q)
                self.last[q] = len(self.rows) - 1
            previous = q
        self.cover()
        for row in self.rows:
            self.m.row(row.scaled(1 / UNIT), most=self.m.budget / UNIT)

    def add_op(self, q: int) -> None:
        """The row of op q itself."""
        row = Expression(constant=float(self.blocks.base_bytes[q]))
        for k in self.blocks.menu.get(q, ()):
            row.add(self.m.way[q, k], self.m.problem.ops[q].choices[k].workspace_bytes)
        for s in self.m.local.get(q, ()):
            row.add(self.lasting(s, q), self.size[s])
        self.rows.append(row)

    def lasting(self, s: int, q: int) -> Variable | float:
        """The item is in memory while op q runs: it uses it, or it stays."""
        need, after = self.m.need(s, q), self.m.after(s, q)
        if need.constant or not need.terms:
            return 1.0 if need.constant else after
        both = self.m.share()
        self.m.row(Expression().add(both).add(need, -1.0), 0.0)
        self.m.row(Expression().add(both).add(after, -1.0), 0.0)
        return both

    def add_moments(self, q: int) -> None:
        """One row for each moment of each group that may run just before op q."""
        roots = sorted(self.blocks.stages.get(q, ()))
        if not roots:
            return
        lives = [Life(self.m, s, q, roots) for s in self.m.local.get(q, ())]
        for j, root in enumerate(roots):
            for needed, transient in self.blocks.groups[root].points:
                row = Expression(constant=float(self.blocks.before_bytes[q])).add(self.m.rerun[root, q], transient)
                for life in lives:
                    row.add(life.at(j, life.s in needed), self.size[life.s])
                self.rows.append(row)

    def cover(self) -> None:
        """Bytes of items in the gaps between their uses."""
        carried: dict[int, Expression] = {}
        for s, points in self.m.points.items():
            if s in self.m.home:
                end = self.first[points[0]] if points else len(self.rows)
                self.span(self.m.home[s], self.size[s], 0, end - 1, carried)
                if points:
                    self.span(self.m.home[s], self.size[s], self.last[points[-1]] + 1, len(self.rows) - 1, carried)
            for a, b in itertools.pairwise(points):
                self.span(self.m.stay[s, b], self.size[s], self.last[a] + 1, self.first[b] - 1, carried)
        self.carry(carried)

    def span(self, stay: Variable | float, size: int, low: int, high: int, carried: dict[int, Expression]) -> None:
        """Add the item to rows low..high: whole blocks through `carried`, the others directly."""
        first, beyond = -(-low // BLOCK_ROWS), (high + 1) // BLOCK_ROWS
        direct: Iterable[int] = range(low, high + 1)
        if first < beyond and not isinstance(stay, float):
            carried.setdefault(first, Expression()).add(stay, size)
            carried.setdefault(beyond, Expression()).add(stay, -size)
            direct = (*range(low, first * BLOCK_ROWS), *range(beyond * BLOCK_ROWS, high + 1))
        for r in direct:
            self.rows[r].add(stay, size)

    def carry(self, carried: dict[int, Expression]) -> None:
        """K[b + 1] = K[b] + what begins - what ends."""
        previous = None
        for b in range(-(-len(self.rows) // BLOCK_ROWS)):
            change = carried.get(b)
            if previous is None or change:
                now = self.m.variable(0.0, self.m.budget / UNIT)
                balance = Expression().add(change or Expression(), 1 / UNIT).add(now, -1.0)
                self.m.row(balance.add(previous) if previous is not None else balance, 0.0, 0.0)
                previous = now
            for r in range(b * BLOCK_ROWS, min(len(self.rows), (b + 1) * BLOCK_ROWS)):
                self.rows[r].add(previous, UNIT)


class Life:
    """Where an item is in memory while the groups of one stage run."""

    def __init__(self, model: Residency, s: int, q: int, roots: list[int]) -> None:
        self.s = s
        self.start = model.before(s, q)
        groups = model.blocks.groups
        self.users = [j for j, root in enumerate(roots) if s in groups[root].inputs]
        own = model.maker.get(s, -1)
        self.producer = roots.index(own) if own in roots else -1
        self.used_by_op = model.need(s, q).constant == 1.0
        self.arrived = Expression().add(self.start)
        if self.producer >= 0:
            self.arrived.add(model.rerun[own, q])
        fetched = model.fetch.get((s, q))
        self.arrived_read = Expression().add(self.arrived)
        if fetched is not None:
            self.arrived_read.add(fetched)
        self.chain: list[Variable | float] = []
        if not self.used_by_op and self.users:
            following: Variable | float = model.after(s, q) if s in model.local[q] else 0.0
            self.end = following
            for j in reversed(self.users):
                variable = model.share()
                model.row(Expression().add(variable).add(model.rerun[roots[j], q], -1.0), 0.0)
                model.row(Expression().add(variable).add(following, -1.0), 0.0)
                self.chain.insert(0, variable)
                following = variable
        else:
            self.end = model.after(s, q)

    def at(self, j: int, needed: bool) -> Variable | float | Expression:
        """In memory while group number j runs; needed: that group still reads it."""
        if j <= self.producer or (self.users and self.producer < 0 and j < self.users[0]):
            return self.start
        if self.used_by_op:
            return self.arrived_read if self.users and self.users[0] <= j else self.arrived
        for k, user in enumerate(self.users):
            if user > j or (user == j and needed):
                return self.chain[k]
        return self.end if self.users or self.producer >= 0 else self.start
