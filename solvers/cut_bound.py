"""A lower bound of the time that holds for every schedule, whatever its order, recomputation and transfers.

`lower_bound_us` looks at two moments of which every schedule has one: the start, and the first run of the *separator*, an op (the loss)
that most others come before or after by their data. What is needed after it and isn't in memory then must be made or read again; with a
price for each byte kept, the least cost of that is a minimum cut, and the best price gives the bound (`parametric_cut`).
"""

from __future__ import annotations

import math

from solvers.bounds import alone_bytes, always_live, bytes_of, roofline_us
from solvers.decode import Tables, Value
from solvers.parametric_cut import Limits, Needs, Network, Way, least_us
from solvers.problem import Choice, Op, Problem

SEPARATORS = 4  # near the border of forward and backward
PEAKS = 6  # elsewhere
APART = 0.02  # of all ops
SPAN = (12, 60)  # ops before and after the border of forward and backward


class _Bound:
    """Everything about a problem that the bound needs."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.tables = problem, Tables(problem)
        self.pinned = always_live(problem)
        self.base_bytes = problem.constant_bytes + sum(problem.storages[s].size_bytes for s in self.pinned)
        self.ways = [self.fitting(op) for op in problem.ops]
        self.least_us = [min((op.choices[k].time_us for k in ks), default=0) for op, ks in zip(problem.ops, self.ways, strict=True)]
        self.ended_bytes = self.base_bytes + bytes_of(problem, {s for s, info in enumerate(problem.storages) if info.output} - self.pinned)
        self.base_us = sum(t for t, op in zip(self.least_us, problem.ops, strict=True) if not op.optional)
        self.ancestors = self.find_ancestors()
        self.used = {s for k, op in enumerate(problem.ops) if not op.optional for s in self.sources(k)}

    def fitting(self, op: Op) -> list[int]:
        """Choices that fit the budget alone."""
        room = self.problem.budget_bytes - self.base_bytes
        return [k for k, choice in enumerate(op.choices) if self.alone(op, choice) <= room]

    def alone(self, op: Op, choice: Choice) -> int:
        return alone_bytes(self.problem, op, choice, self.pinned)

    def is_optional(self, storage: int) -> bool:
        maker = self.tables.created_by[storage]
        return maker >= 0 and self.problem.ops[maker].optional

    def forced(self, op: int) -> list[Value]:
        """Values that every way of the op needs, products of optional ops aside."""
        lists = [self.tables.needs(op, k) for k in self.ways[op]] or [self.tables.needs(op, 0)]
        return [v for v in dict.fromkeys(lists[0]) if not self.is_optional(v[0]) and all(v in other for other in lists[1:])]

    def wished(self, op: int) -> dict[int, float]:
        """Products of optional ops -> what the op's cheapest way without it costs more (inf: there is none)."""
        choices = self.problem.ops[op].choices
        result = {}
        for s in dict.fromkeys(s for k in self.ways[op] for s in choices[k].reads if self.is_optional(s)):
            others = [choices[k].time_us for k in self.ways[op] if s not in choices[k].reads]
            more = min(others, default=math.inf) - self.least_us[op]
            if more > 0:
                result[s] = more
        return result

    def sources(self, op: int) -> set[int]:
        """Persistent storages that every way of the op needs, be it through an optional op."""
        sets = []
        for k in self.ways[op]:
            reads = {*self.problem.ops[op].choices[k].reads, *self.problem.ops[op].writes}
            for s in tuple(reads):
                if self.is_optional(s):
                    maker = self.tables.created_by[s]
                    reads |= set.intersection(*(set(c.reads) for c in self.problem.ops[maker].choices))
            sets.append({s for s in reads if self.problem.storages[s].persistent})
        return set.intersection(*sets) if sets else set()

    def find_ancestors(self) -> list[int]:
        """For every op its ancestors by data (bit k: op k)."""
        result: list[int] = []
        for op in range(len(self.problem.ops)):
            bits = 0
            for value in self.forced(op):
                producer = self.tables.producer.get(value, -1)
                if producer >= 0:
                    bits |= result[producer] | 1 << producer
            result.append(bits)
        return result

    def separators(self) -> list[int]:
        """Ops where memory is short: near the border of forward and backward those that need most bytes alone (in a small problem any op), and
        the one whose fastest way does; and the largest peaks of base order, some distance apart."""
        count, ops = len(self.problem.ops), self.problem.ops
        border = next((k for k, op in enumerate(ops) if op.phase == "backward"), count // 2)
        low, high = (border - SPAN[0], border + SPAN[1]) if count > SPAN[1] else (0, count)
        able = [op for op in range(count) if not ops[op].optional and self.ancestors[op]]
        near = [op for op in able if low <= op < high]
        least = {op: min(self.alone(ops[op], ops[op].choices[k]) for k in self.ways[op]) for op in near}
        hungry = max(near, key=lambda op: self.alone(ops[op], min(ops[op].choices, key=lambda way: way.time_us)), default=-1)
        chosen = sorted(near, key=lambda op: (op != hungry, -least[op], op))[: 1 + SEPARATORS]
        live = self.live_in_order()
        for op in sorted(able, key=lambda op: (-live[op], op)):
            if len(chosen) >= 1 + SEPARATORS + PEAKS:
                break
            if all(abs(op - other) > count * APART for other in chosen):
                chosen.append(op)
        return chosen

    def live_in_order(self) -> list[int]:
        """For every op the bytes that live while it runs in base order, of what the step makes, and its least workspace."""
        ops, size = self.problem.ops, self.tables.size
        last = {s: k for k, op in enumerate(ops) for s in (*op.creates, *op.writes, *(s for c in op.choices for s in c.reads))}
        leaving: list[list[int]] = [[] for _ in ops]
        for s, k in last.items():
            if self.tables.created_by[s] >= 0 and not self.problem.storages[s].output:
                leaving[k].append(s)
        live, result = 0, []
        for op, gone in zip(ops, leaving, strict=True):
            live += sum(size[s] for s in op.creates)
            result.append(live + min(c.workspace_bytes for c in op.choices))
            live -= sum(size[s] for s in gone)
        return result

    def needs(self, separator: int) -> Needs:
        """The graph of what is needed after the separator."""
        result = Needs()
        op = self.problem.ops[separator]
        least = self.least_us[separator]
        held: set[int] = set.intersection(*({*op.choices[k].reads, *op.writes} for k in self.ways[separator]))
        taken = self.base_bytes + bytes_of(self.problem, {*held, *op.creates} - self.pinned)
        for k in self.ways[separator]:  # what only some of its ways read may be kept for later too, so it is left to the room
            room = self.problem.budget_bytes - taken - op.choices[k].workspace_bytes
            result.choices.append((op.choices[k].time_us - least, room))
        before = {k for k in range(len(self.problem.ops)) if self.ancestors[separator] >> k & 1}
        early = {s for k in (*before, separator) for s in self.sources(k)}
        graph = _Graph(self, result, separator, before, early, held)
        for k, bits in enumerate(self.ancestors):
            if bits >> separator & 1 and not self.problem.ops[k].optional:
                graph.require(0, k)
        self.at_home(result, early)
        self.used_anywhere(result, early)
        self.made_early(result, before)
        return result

    def at_home(self, needs: Needs, early: set[int]) -> None:
        """What is used before the separator is at home in memory, or it is read before (and written home where the step changes it).

        Its node is on the sink's side where its home is memory."""
        for s in sorted(early - self.pinned):
            if self.tables.may_leave[s]:
                home, _ = needs.node("home", s)
                needs.arcs.append((0, home, (Way(home_bytes=self.tables.size[s]),)))
                needs.arcs.append((home, 1, (self.read(s, s in self.tables.written),)))

    def used_anywhere(self, needs: Needs, early: set[int]) -> None:
        """What is used neither before the separator nor by what must follow it is at home in memory too, or read once."""
        for s in sorted(self.used - self.pinned - early):
            if self.tables.may_leave[s] and ("value", s, 0) not in needs.nodes:
                needs.loose.append((Way(home_bytes=self.tables.size[s]), self.read(s, s in self.tables.written)))

    def made_early(self, needs: Needs, before: set[int]) -> None:
        """Optional ops that run before the separator, or the slower ways of the ops that wish for them."""
        more: dict[int, float] = {}
        for k in before:
            wished = self.wished(k)
            if len(wished) == 1:
                for s, penalty in wished.items():
                    more[self.tables.created_by[s]] = more.get(self.tables.created_by[s], 0.0) + penalty
        for maker, penalty in sorted(more.items()):
            needs.loose.append((Way(compute_us=min(penalty, self.least_us[maker])),))

    def read(self, s: int, write_too: bool) -> Way:
        """A read from disk, and a write where that comes with it."""
        us = [self.tables.read_us[s], self.tables.write_us[s] if write_too else 0]
        return Way(delay_us=sum(math.floor(self.problem.interference * t) for t in us), disk_us=sum(us))

    def write(self, s: int) -> Way:
        us = self.tables.write_us[s]
        return Way(delay_us=math.floor(self.problem.interference * us), disk_us=us)


class _Graph:
    """Builds the graph of one separator. before: its ancestors. early: persistent storages used by them. held: in memory anyway."""

    def __init__(self, bound: _Bound, needs: Needs, separator: int, before: set[int], early: set[int], held: set[int]) -> None:
        self.bound, self.needs_, self.separator = bound, needs, separator
        self.before, self.early, self.held = before, early, held
        self.stack: list[tuple[int, int]] = []

    def require(self, tail: int, op: int) -> None:
        """The tail needs what op reads; then all that follows from it."""
        self.stack.append((tail, op))
        while self.stack:
            tail, op = self.stack.pop()
            for value in self.bound.forced(op):
                self.value(tail, value, ())
            wished = self.bound.wished(op)
            if len(wished) == 1:
                for s, penalty in wished.items():
                    self.value(tail, (s, 1), (Way(compute_us=penalty),) if penalty < math.inf else ())

    def value(self, tail: int, value: Value, instead: tuple[Way, ...]) -> None:
        """An arc from the tail to the value's node; instead: what costs less than it, perhaps."""
        bound, (s, version) = self.bound, value
        info, producer = bound.problem.storages[s], bound.tables.producer.get(value, -1)
        if s in bound.pinned or s in self.held or (producer < 0 and not info.movable):
            return
        if producer >= 0 and (info.persistent or (not bound.problem.ops[producer].optional and self.comes_later(producer))):
            return
        node, fresh = self.needs_.node("value", s, version)
        self.needs_.arcs.append((tail, node, instead))
        if fresh:
            self.provide(node, value, producer)

    def comes_later(self, op: int) -> bool:
        """The op is the separator, or never runs before it."""
        return op == self.separator or bool(self.bound.ancestors[op] >> self.separator & 1)

    def provide(self, node: int, value: Value, producer: int) -> None:
        """Keep the value, read it, or run its producer again."""
        bound, s = self.bound, value[0]
        size = bound.tables.size[s]
        if producer < 0 and s in self.early and bound.tables.may_leave[s]:
            absent, _ = self.needs_.node("absent", s)
            home, _ = self.needs_.node("home", s)
            self.needs_.arcs += [(node, absent, (Way(kept_bytes=size),)), (absent, 1, (bound.read(s, False),))]
            if not bound.tables.stored[s]:  # whose home is memory is on disk only if it is written there
                self.needs_.arcs.append((absent, home, (bound.write(s),) if bound.tables.may_spill[s] else ()))
            return
        if producer < 0:
            late = s not in self.early
            kept = Way(kept_bytes=size, home_bytes=size if late else 0)
            self.needs_.arcs.append((node, 1, (kept, bound.read(s, late and s in bound.tables.written))))
            return
        ways = [Way(kept_bytes=size)]
        if bound.tables.may_spill[s]:
            ways.append(bound.read(s, True))
        again = bound.problem.ops[producer]
        if producer in self.before and not again.rerunnable and not again.optional:
            self.needs_.arcs.append((node, 1, tuple(ways)))
            return
        run, fresh = self.needs_.node("run", producer)
        self.needs_.arcs.append((node, run, tuple(ways)))
        if fresh:
            if producer in self.before or again.optional:  # what may as well run after the separator first costs nothing but its inputs
                self.needs_.arcs.append((run, 1, (Way(compute_us=bound.least_us[producer]),)))
            self.stack.append((run, producer))


def lower_bound_us(problem: Problem) -> int:
    """No schedule within the budget is faster, in any order, with any recomputes and transfers. Falls back on the roofline without
    ortools."""
    return bound_and_moments(problem)[0]


def bound_and_moments(problem: Problem) -> tuple[int, list[int]]:
    """The lower bound, and the ops whose first runs are moments at which memory is short: the one that says most about time, then the
    one whose fastest way needs most memory, then the others."""
    best, chosen = roofline_us(problem), list[int]()
    bound = _Bound(problem)
    if any(not ways for ways, op in zip(bound.ways, problem.ops, strict=True) if not op.optional):
        return best, chosen
    chosen = bound.separators()
    try:
        import ortools.graph.python.max_flow  # noqa: F401
    except ImportError:
        return best, chosen
    says = {}
    for separator in chosen:
        says[separator] = _bound_of(bound, bound.needs(separator), best)
        best = max(best, says[separator])
    first = max(chosen, key=lambda op: says[op], default=-1)
    return best, sorted(chosen, key=lambda op: op != first)


def _bound_of(bound: _Bound, needs: Needs, known_us: int) -> int:
    """The bound of one separator: the least over its ways, which end early where that can't exceed what is known. What is at home in memory is
    there beside the outputs at the end of the step."""
    network, planes, least, budget_bytes = Network(needs), list[Way](), math.inf, bound.problem.budget_bytes
    most = 10.0 * (bound.base_us + 1) / min(1e4, budget_bytes + 1)
    for penalty, room in sorted(needs.choices):
        if bound.base_us + penalty < least:
            limits = Limits(bound.base_us + penalty, room, budget_bytes - bound.ended_bytes)
            least = min(least, least_us(network, limits, most, planes))
        if least <= known_us:
            break
    return math.floor(least) if least < math.inf else 0
