"""The global model: what stays in memory in every gap between uses, in base order, solved by HiGHS through MathOpt.

After Checkmate (Jain et al., MLSys 2020) in the residency form: a variable for each gap of an item instead of one for each op. For item
i, stage q (an op before which things may be brought back), group g (ops that run again together), blocks.py:
    s[i, q]  i stayed in memory from the possible use before q to q      r[g, q]  g runs (again) just before op q
    f[i, q]  i is read from disk just before op q                       y[i]     i is written to disk once
    h[i]     the home of persistent i is memory                         x[o, c]  op o runs in its way c
minimise  sum time_g r[g, q] + rate * transfers + sum time_oc x[o, c]   subject to
(C1) need     s[i, q] + r[maker(i), q] + f[i, q] >= 1 where op q uses i; >= r[g, q] where g reads i
(C1') home    s[i, q] >= h[i] unless i is stored
(C2) retain   s[i, next q] <= s[i, q] + r[maker(i), q] + f[i, q] where op q doesn't use i
(C3) memory   at every op, and inside every r[g, q]: bytes of base order + bytes of items there <= budget
(C4) disk     f[i, q] <= y[i] for what the step made; all transfers together take no longer than the step
(C5) purpose  r[g, q] <= uses of what g makes before or in op q; f[i, q] likewise
Memory rows would be long: bytes of gaps that span whole blocks of rows are carried from block to block in one variable each.
A solution becomes `Decisions`; the decoder and the replay say what it is worth.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

from solvers.blocks import LONG_SHARE, Blocks, Builder, Item
from solvers.bounds import always_live
from solvers.closure_cuts import add_closures
from solvers.decode import Decisions, Tables
from solvers.linear import Answer, Expression, LinearProgram, Variable, total
from solvers.memory_rows import Memory

LEAST_RATE = 0.02  # of a transfer's duration, where it delays compute by less: it isn't hidden always
DISK_SHARE = 0.9  # of the step, that the disk may be busy
RELATIVE_GAP = 7e-4
EPSILON = 1e-6
CORES = (5e-7, 5e-5, math.inf)  # of the step's time: each wider core is for the case that those before have no good solution
GOOD_CORE = 1.001  # times the relaxation
THRESHOLDS = (0.3, 0.5)
MAX_RERUNS = 20_000
LEAST_SECONDS = 1.0
TINY_SHARE = 1 / 2000  # of the budget: storages up to this size are pinned
CROWDED_SHARE = 0.5
MENU_SHARE = 0.1


class Residency(LinearProgram):
    """The model of one coarse problem. `build`, then `solve`."""

    def __init__(self, blocks: Blocks, budget_bytes: int) -> None:
        super().__init__()
        self.blocks, self.tables, self.budget = blocks, blocks.tables, budget_bytes
        self.problem = blocks.tables.problem
        self.count = len(self.problem.ops)
        self.rate = max(LEAST_RATE, self.problem.interference)
        self.points = {s: item.points() for s, item in blocks.items.items()}
        self.stay: dict[tuple[int, int], Variable | float] = {}  # (item, use): from the use before it
        self.home: dict[int, Variable] = {}
        self.rerun: dict[tuple[int, int], Variable] = {}
        self.fetch: dict[tuple[int, int], Variable] = {}
        self.spill: dict[int, Variable] = {}
        self.way: dict[tuple[int, int], Variable] = {}
        self.cost, self.disk = Expression(), Expression()
        self.maker = {s: root for root, group in blocks.groups.items() for s in self.problem.ops[root].creates}
        self.local: dict[int, list[int]] = {}

    def build(self) -> None:
        self.add_ways()
        self.add_reruns()
        for s, item in self.blocks.items.items():
            self.add_gaps(s, item)
        self.add_needs()
        self.add_purposes()
        for s in self.blocks.items:
            self.add_retention(s)
        Memory(self).build()
        self.add_disk()
        add_closures(self)
        self.minimise(self.cost)

    def add_ways(self) -> None:
        """x: exactly one way for each op with a menu."""
        for op, ways in self.blocks.menu.items():
            for k in ways:
                self.way[op, k] = self.binary()
                self.cost.add(self.way[op, k], self.problem.ops[op].choices[k].time_us)
            self.row(total(self.way[op, k] for k in ways), 1.0, 1.0)

    def add_reruns(self) -> None:
        for q, roots in sorted(self.blocks.stages.items()):
            for root in sorted(roots):
                self.rerun[root, q] = self.binary()
                self.cost.add(self.rerun[root, q], self.blocks.groups[root].time_us)

    def add_gaps(self, s: int, item: Item) -> None:
        """s, h, f, y of one item."""
        info, points = self.problem.storages[s], self.points[s]
        for q in points:
            self.local.setdefault(q, []).append(s)
        if info.persistent:
            self.home[s] = self.binary()
            self.stay[s, points[0] if points else self.count] = self.home[s]
            written = self.tables.write_us[s] if s in self.tables.written else 0
            for total, rate in ((self.cost, self.rate), (self.disk, 1.0)):
                total.add(written * rate).add(self.home[s], -written * rate)
        for a, b in itertools.pairwise(points):
            if self.is_forced(item, a, b):
                self.stay[s, b] = 1.0
                continue
            self.stay[s, b] = self.binary()
            if info.persistent and not info.stored:
                self.row(Expression().add(self.stay[s, b]).add(self.home[s], -1.0), 0.0)
        for q in points:
            if self.may_fetch(s, q):
                self.add_fetch(s, q)

    def is_forced(self, item: Item, a: int, b: int) -> bool:
        return any(first <= a and b <= last for first, last in item.forced)

    def may_fetch(self, s: int, q: int) -> bool:
        info = self.problem.storages[s]
        if info.persistent:
            return self.tables.version_at(s, q) == 0 and not isinstance(self.stay[s, q], float)
        if not self.tables.may_spill[s] or isinstance(self.stay.get((s, q), 1.0), float) or s in self.tables.written:
            return False
        if self.problem.ops[self.tables.created_by[s]].optional:
            return False
        needs = self.blocks.items[s].needs
        later = [stage for stage in self.points[s] if stage > max(needs, default=-1)]
        return q in needs or q in later[:2]

    def add_fetch(self, s: int, q: int) -> None:
        self.fetch[s, q] = self.binary()
        self.cost.add(self.fetch[s, q], self.rate * self.tables.read_us[s])
        self.disk.add(self.fetch[s, q], self.tables.read_us[s])
        if self.problem.storages[s].persistent:
            return
        if s not in self.spill:
            self.spill[s] = self.binary()
            self.cost.add(self.spill[s], self.rate * self.tables.write_us[s])
            self.disk.add(self.spill[s], self.tables.write_us[s])
        self.row(Expression().add(self.spill[s]).add(self.fetch[s, q], -1.0), 0.0)

    def before(self, s: int, q: int) -> Variable | float:
        """The item is in memory when stage q begins."""
        return self.stay.get((s, q), 0.0)

    def after(self, s: int, q: int) -> Variable | float:
        """The item stays in memory after op q."""
        points = self.points[s]
        k = points.index(q)
        if k + 1 < len(points):
            return self.stay[s, points[k + 1]]
        return self.home.get(s, 0.0)

    def available(self, s: int, q: int) -> Expression:
        """What brings the item to stage q."""
        result = Expression().add(self.before(s, q))
        for source in (self.rerun.get((self.maker.get(s, -1), q)), self.fetch.get((s, q))):
            if source is not None:
                result.add(source)
        return result

    def need(self, s: int, q: int) -> Expression:
        """1 where op q uses the item; less where only some of its ways do."""
        needs = self.blocks.items[s].needs
        if q not in needs:
            return Expression()
        return total(self.way[q, k] for k in needs[q]) if needs[q] else Expression(constant=1.0)

    def add_needs(self) -> None:
        """(C1)"""
        for s, points in self.points.items():
            for q in points:
                if q in self.blocks.items[s].needs and q != self.tables.created_by[s] and not isinstance(self.before(s, q), float):
                    self.row(self.available(s, q).add(self.need(s, q), -1.0), 0.0)
                elif q in self.blocks.items[s].needs and self.before(s, q) == 0.0 and self.tables.created_by[s] != q:
                    self.row(self.available(s, q).add(self.need(s, q), -1.0), 0.0)
        for (root, q), run in self.rerun.items():
            for s in self.blocks.groups[root].inputs:
                if q in self.local and s in self.local[q]:
                    self.row(self.available(s, q).add(run, -1.0), 0.0)

    def add_purposes(self) -> None:
        """(C5) Nothing is brought back before a stage that doesn't use it: the decoder is as lazy."""
        readers: dict[tuple[int, int], list[Variable]] = {}
        for (root, q), run in self.rerun.items():
            for s in self.blocks.groups[root].inputs:
                readers.setdefault((s, q), []).append(run)
        for (root, q), run in self.rerun.items():
            purpose = Expression()
            for s in self.problem.ops[root].creates:
                purpose.add(self.need(s, q) if s in self.points else 0.0).add(total(readers.get((s, q), ())))
            if purpose.constant < 1.0:
                self.row(purpose.add(run, -1.0), 0.0)
        for (s, q), fetch in self.fetch.items():
            purpose = Expression().add(self.need(s, q)).add(total(readers.get((s, q), ())))
            if purpose.constant < 1.0:
                self.row(purpose.add(fetch, -1.0), 0.0)

    def add_retention(self, s: int) -> None:
        """(C2)"""
        item, points = self.blocks.items[s], self.points[s]
        for q, following in itertools.pairwise(points):
            used = q in item.needs and not item.needs[q]
            stay = self.stay[s, following]
            if not used and not isinstance(stay, float):
                self.row(self.available(s, q).add(stay, -1.0), 0.0)

    def add_disk(self) -> None:
        """(C4) Transfers together take at most a share of the step."""
        if not self.disk.terms:
            return
        self.row(Expression().add(self.disk).add(self.cost, -DISK_SHARE), most=DISK_SHARE * (self.base_us() - self.cost.constant))

    def relax(self, seconds: float) -> Answer | None:
        """The linear relaxation, or None where it has no solution in time."""
        relaxed = self.run(seconds)
        return relaxed if relaxed is not None and relaxed.optimal else None

    def run(self, seconds: float, whole: Sequence[Variable] = ()) -> Answer | None:
        """What HiGHS finds in time; None where that is nothing."""
        answer = self.answer(seconds, RELATIVE_GAP, whole) if seconds >= LEAST_SECONDS else None
        return answer if answer is not None and answer.values else None

    def fix_core(self, relaxed: Answer, worth_us: float) -> None:
        """Fix what the relaxation sets to 0 or 1 and would change for more than worth_us each: the rest, the core, is small."""
        for variable in self.binaries:
            if relaxed.values[variable] < EPSILON and relaxed.prices[variable] > worth_us:
                self.upper[variable] = 0.0
            elif relaxed.values[variable] > 1 - EPSILON and relaxed.prices[variable] < -worth_us:
                self.lower[variable] = 1.0

    def free_core(self) -> None:
        for variable in self.binaries:
            self.lower[variable], self.upper[variable] = 0.0, 1.0

    def rounded(self, relaxed: Answer, threshold: float) -> Decisions:
        """The relaxation as decisions: what it keeps or does by more than the threshold. They may exceed the budget a little."""
        return self.decisions([value - threshold + 0.5 for value in relaxed.values])

    def core(self, relaxed: Answer, worth_us: float, seconds: float) -> Answer | None:
        """The core as a mixed-integer program; None where it has no solution in time."""
        self.fix_core(relaxed, worth_us)
        answer = self.run(seconds, self.binaries)
        self.free_core()
        return answer

    def base_us(self) -> float:
        """Microseconds that the objective leaves out: every op once that must run, except those with a menu; and its constant."""
        ops = zip(self.problem.ops, self.blocks.choice, strict=True)
        once = sum(op.choices[k].time_us for index, (op, k) in enumerate(ops) if index not in self.blocks.menu and not op.optional)
        return once + self.cost.constant

    def time_us(self, answer: Answer) -> float:
        """What the step takes, as the model sees it."""
        return answer.objective + self.base_us() - self.cost.constant

    def decisions(self, values: Sequence[float]) -> Decisions:
        """Values as decisions: a cut for every gap that isn't kept, and for the interior of what runs again."""

        def chosen(variable: Variable | float) -> bool:
            return (variable if isinstance(variable, float) else values[variable]) > 0.5

        result = Decisions(list(self.blocks.choice))
        for op, ways in self.blocks.menu.items():
            result.choice[op] = max(ways, key=lambda k: values[self.way[op, k]])
        result.away = {s for s, variable in self.home.items() if not chosen(variable)}
        result.spilled = {s for s, variable in self.spill.items() if chosen(variable)}
        for (s, q), stay in self.stay.items():
            if not (self.points[s] and q == self.points[s][0]) and not chosen(stay):
                result.cut(s, q)
        for (root, q), variable in self.rerun.items():
            if chosen(variable):
                for s in self.blocks.groups[root].interior:
                    result.cut(s, q)
        return result


def menu_of(tables: Tables, choice: list[int], grouped: set[int]) -> dict[int, tuple[int, ...]]:
    """Ops whose way the model decides: those whose ways differ by much, and that don't run again or are too long for that."""
    problem, pinned = tables.problem, always_live(tables.problem)
    room = problem.budget_bytes - problem.constant_bytes - sum(tables.size[s] for s in pinned)
    longest_us = LONG_SHARE * sum(op.choices[k].time_us for op, k in zip(problem.ops, choice, strict=True))
    result = {}
    for index, op in enumerate(problem.ops):
        if len(op.choices) == 1 or op.optional or (index in grouped and op.choices[choice[index]].time_us < longest_us):
            continue
        need = [c.workspace_bytes + sum(tables.size[s] for s in {*c.reads, *op.creates, *op.writes} - pinned) for c in op.choices]
        if max(need) - min(need) > MENU_SHARE * problem.budget_bytes:
            result[index] = tuple(k for k, bytes_ in enumerate(need) if bytes_ <= room) or (choice[index],)
    return result


def coarse(tables: Tables, choice: list[int], tiny_share: float = TINY_SHARE) -> Blocks:
    """The coarse problem of the budget. Groups are found first without a menu: ops in them keep their way."""
    budget = tables.problem.budget_bytes
    tiny, free = int(tiny_share * budget), int(CROWDED_SHARE * budget)
    plain = Builder(tables, choice, {}, tiny, free)
    grouped = {op for roots in plain.build().stages.values() for root in roots for op in plain.groups[root].ops}
    menu = menu_of(tables, choice, grouped)
    return Builder(tables, choice, menu, tiny, free).build() if menu else plain.build()


def plans(tables: Tables, choice: list[int], deadline: float) -> Iterator[Decisions]:
    """Decisions for ops run in the given ways, to be decoded, repaired and replayed: the relaxation rounded, then the cores' solutions.

    Ends at the deadline (time.monotonic), or early where the model has no solution.
    """
    model = Residency(coarse(tables, choice), tables.problem.budget_bytes)
    if not model.points or len(model.rerun) > MAX_RERUNS:
        return
    model.build()
    relaxed = model.relax(deadline - time.monotonic())
    if relaxed is None:
        return
    for threshold in THRESHOLDS:
        yield model.rounded(relaxed, threshold)
    for worth in CORES:
        answer = model.core(relaxed, worth * model.base_us(), deadline - time.monotonic())
        if answer is not None:
            yield model.decisions(answer.values)
            if model.time_us(answer) <= GOOD_CORE * model.time_us(relaxed):
                return
