"""Coarsening: what the global model decides about, so that whole steps are tractable.

*Items* are the storages that may leave memory for a while: those with a long gap between two uses, those that an optional op makes,
persistent ones that may live on disk, and the inputs of recomputes. All others are counted where they live in base order.
A *group* is an op that makes an item, with the ops before it whose outputs nobody else reads: it is run again as a whole. Its profile
is exact: a list of (inputs still needed, bytes of its interior).
A *stage* is an op before which something may be brought back; a group gets stages only within `reach` ops of what needs it.
What is tiny is pinned: it stays until the last recompute that could read it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np

from solvers.decode import Tables
from solvers.emit import Ints

LONG_SHARE = 0.05  # of the step's time: a gap this long may be worth an eviction
REACHES = (1000, 300, 150, 80, 60, 40, 25, 15)  # ops
MAX_PAIRS = 4500  # (group, stage)


@dataclass(frozen=True, slots=True)
class Group:
    """Ops that are run again together, in base order; root: the last one. inputs: items it reads. points: (inputs still needed, bytes of
    interior, workspace and outputs), only the ones that no other one dominates."""

    root: int
    ops: tuple[int, ...]
    inputs: tuple[int, ...]
    pinned: tuple[int, ...]
    interior: tuple[int, ...]
    time_us: int
    points: tuple[tuple[frozenset[int], int], ...]


@dataclass(slots=True)
class Item:
    """A storage the model decides about. needs: op -> choices of the op that use it (empty: it is used whatever the choice).
    stages: where recomputes may use it. forced: spans (first use, last use) in which it must stay."""

    storage: int
    size_bytes: int
    needs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    stages: set[int] = field(default_factory=set)
    forced: list[tuple[int, int]] = field(default_factory=list)

    def points(self) -> list[int]:
        """Ops at which the item may be used, in order: between two neighbours it stays in memory or it doesn't."""
        inside = {q for q in self.stages if any(a < q < b for a, b in self.forced)}
        return sorted({*self.needs, *(self.stages - inside)})


@dataclass(slots=True)
class Blocks:
    """The coarse problem. base_bytes: for every op the bytes of everything that is not an item. menu: op -> choices to decide among."""

    tables: Tables
    choice: list[int]
    menu: dict[int, tuple[int, ...]]
    items: dict[int, Item]
    groups: dict[int, Group]
    stages: dict[int, set[int]]  # op -> roots of the groups that may run before it
    base_bytes: Ints
    before_bytes: Ints  # the same just before the op, without what it makes and its workspace


class Builder:
    """Builds the coarse problem for one budget. choice: how ops without a menu run. free_bytes: gaps over ops that need more than this
    may be cut however short they are."""

    def __init__(self, tables: Tables, choice: list[int], menu: dict[int, tuple[int, ...]], tiny_bytes: int, free_bytes: int) -> None:
        self.tables, self.choice, self.menu, self.tiny, self.free_bytes = tables, choice, menu, tiny_bytes, free_bytes
        self.ops, self.storages = tables.problem.ops, tables.problem.storages
        self.count = len(self.ops)
        self.optional = [op.optional for op in self.ops]
        self.uses = self._uses()
        self.readers = self._readers()
        self.items: dict[int, Item] = {}
        self.groups: dict[int, Group] = {}
        self.stages: dict[int, set[int]] = {}
        self.root = [-1] * self.count

    def build(self) -> Blocks:
        """Items, groups, stages."""
        self.find_items()
        self.find_groups()
        for reach in REACHES:
            if self.find_stages(reach) <= MAX_PAIRS:
                break
        return Blocks(self.tables, self.choice, self.menu, self.items, self.groups, self.stages, *self.base_bytes())

    def choices(self, op: int) -> tuple[int, ...]:
        return self.menu.get(op, (self.choice[op],))

    def _uses(self) -> list[dict[int, tuple[int, ...]]]:
        """For every storage: op -> choices that use it (empty: all). Optional ops don't count: they need not run."""
        uses: list[dict[int, tuple[int, ...]]] = [{} for _ in self.storages]
        for index, op in enumerate(self.ops):
            if self.optional[index]:
                continue
            readers: dict[int, list[int]] = {}
            for k in self.choices(index):
                for s in op.choices[k].reads:
                    readers.setdefault(s, []).append(k)
            for s, ks in readers.items():
                uses[s][index] = () if len(ks) == len(self.choices(index)) else tuple(ks)
            for s in (*op.creates, *op.writes):
                uses[s][index] = ()
        for s, info in enumerate(self.storages):
            if info.output:
                uses[s][self.count] = ()
        return uses

    def _readers(self) -> list[list[int]]:
        """For every storage the ops that read it, optional ones included."""
        readers: list[list[int]] = [[] for _ in self.storages]
        for index, op in enumerate(self.ops):
            for s in dict.fromkeys(s for k in self.choices(index) for s in op.choices[k].reads):
                readers[s].append(index)
        return readers

    def find_items(self) -> None:
        """Storages with a gap worth deciding about."""
        clock = np.concatenate([[0], np.cumsum([min(c.time_us for c in op.choices) for op in self.ops])])
        long_us = LONG_SHARE * float(clock[-1])
        crowded = self.crowded()
        for s, info in enumerate(self.storages):
            made_at_will = self.tables.created_by[s] >= 0 and self.optional[self.tables.created_by[s]]
            if made_at_will or (self.tables.size[s] > self.tiny and self.may_leave(s)):
                self.items[s] = Item(s, self.tables.size[s], self.uses[s])
            elif info.persistent or self.tables.size[s] <= self.tiny or s in self.tables.written:
                continue
            at = sorted(self.uses[s])
            kept = [(a, b) for a, b in itertools.pairwise(at) if not self.worth(a, b, float(clock[min(b, self.count)] - clock[a]) > long_us, crowded)]
            conditional = any(self.uses[s].values())
            if s in self.items or len(kept) < len(at) - 1:
                self.items.setdefault(s, Item(s, self.tables.size[s], self.uses[s])).forced = [] if conditional else kept
            if s in self.items and s in self.tables.written:
                self.items[s].forced = self.until_written_home(s, at, kept)

    def may_leave(self, s: int) -> bool:
        return self.tables.may_leave[s] and (s not in self.tables.written or self.tables.may_spill[s])

    def until_written_home(self, s: int, at: list[int], kept: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What was written stays until its last use."""
        first = self.tables.written[s][0]
        return [(a, b) for a, b in itertools.pairwise(at) if (a, b) in kept or b > first >= a or a >= first]

    def worth(self, a: int, b: int, is_long: bool, crowded: Ints) -> bool:
        """A gap between uses a and b that may be cut: long, from one phase into another, or over ops that need too much."""
        if b - a <= 1:
            return False
        last = min(b, self.count - 1)
        return is_long or self.ops[a].phase != self.ops[last].phase or bool(crowded[last] > crowded[a + 1])

    def crowded(self) -> Ints:
        """Number of ops before each one that need more than free_bytes at once."""
        sizes = self.tables.size
        need = [
            min(c.workspace_bytes + sum(sizes[s] for s in c.reads) for c in op.choices) + sum(sizes[s] for s in (*op.creates, *op.writes))
            for op in self.ops
        ]
        return np.concatenate([[0], np.cumsum(np.array(need) > self.free_bytes)])

    def find_groups(self) -> None:
        """Reverse sweep: an op whose outputs only one group reads, and none of them an item, joins that group."""
        for index in range(self.count - 1, -1, -1):
            made = self.ops[index].creates
            roots = {self.root[reader] for s in made for reader in self.readers[s]}
            alone = not made or self.ops[index].writes or self.optional[index] or self.ops[index].rng or not self.ops[index].rerunnable
            kept = any(s in self.items or self.storages[s].output or s in self.tables.written for s in made)
            self.root[index] = index if alone or kept or len(roots) != 1 else roots.pop()

    def group(self, root: int) -> Group:
        """The group of a root, profiled."""
        if root not in self.groups:
            members = [index for index in range(max(0, root - 400), root + 1) if self.root[index] == root]
            self.groups[root] = _profiled(self, root, members)
        return self.groups[root]

    def allowed(self, root: int, stage: int) -> bool:
        """All ops of the group may run again before op `stage`: what they read has its old version there. Ops with a menu run once."""
        tables = self.tables
        for index in self.group(root).ops:
            op = self.ops[index]
            if op.writes or index in self.menu or not (op.rerunnable or op.optional):
                return False
            for s, version in tables.reads[index][self.choice[index]]:
                if s in tables.written and tables.version_at(s, stage) != version:
                    return False
        return not any(s in tables.written for s in self.ops[root].creates)

    def find_stages(self, reach: int) -> int:
        """From each end of a gap that may be cut, the groups that may bring something back; returns the number of (group, stage)."""
        self.stages = {}
        for item in self.items.values():
            item.stages = set()
        starts: dict[int, list[int]] = {}
        for s, item in list(self.items.items()):
            closed = {b for _, b in item.forced}
            for q in item.needs:
                if q not in closed and (q != self.tables.created_by[s]):
                    starts.setdefault(q, []).append(s)
        for q, wanted in sorted(starts.items()):
            self._close(q, wanted, reach)
        return sum(len(roots) for roots in self.stages.values())

    def _close(self, q: int, wanted: list[int], reach: int) -> None:
        """Stage q: the groups of the wanted items, and of the inputs of those groups, as far as `reach` goes."""
        stack = [(s, -1) for s in wanted]
        best: dict[int, int] = {}
        while stack:
            s, origin = stack.pop()
            maker = self.tables.created_by[s]
            if maker < 0 or maker >= q:
                continue
            root = self.root[maker]
            origin = max(origin, root) if origin < 0 else origin
            if (origin - root > reach and not self.optional[root]) or best.get(root, 1 << 60) <= origin - root or not self.allowed(root, q):
                continue
            best[root] = origin - root
            self.stages.setdefault(q, set()).add(root)
            group = self.groups[root]
            for need in group.inputs:
                self.item(need).stages.add(q)
                stack.append((need, origin))
            for made in self.ops[root].creates:
                if made in self.items:
                    self.items[made].stages.add(q)

    def item(self, s: int) -> Item:
        """The item of a storage; one that is needed by recomputes only stays in memory as long as base order needs it."""
        if s not in self.items:
            at = sorted(self.uses[s])
            self.items[s] = Item(s, self.tables.size[s], self.uses[s], forced=list(itertools.pairwise(at)))
        return self.items[s]

    def base_bytes(self) -> tuple[Ints, Ints]:
        """Bytes of what is not an item, in every op. Pinned storages stay until the last stage of a group that reads them."""
        last = {s: max(self.uses[s], default=-1) for s in range(len(self.storages)) if s not in self.items}
        for q, roots in self.stages.items():
            for root in roots:
                for s in self.groups[root].pinned:
                    last[s] = max(last[s], q)
        change = np.zeros(self.count + 2, dtype=np.int64)
        for s, end in last.items():
            if self.storages[s].persistent:
                change[0] += self.tables.size[s]
            elif self.tables.created_by[s] >= 0:
                change[self.tables.created_by[s]] += self.tables.size[s]
                change[max(end, self.tables.created_by[s]) + 1] -= self.tables.size[s]
        live = np.cumsum(change)[: self.count + 1] + self.tables.problem.constant_bytes
        before = live.copy()
        for index, op in enumerate(self.ops):
            before[index] -= sum(self.tables.size[s] for s in op.creates if s not in self.items)
            if index not in self.menu and not op.optional:
                live[index] += op.choices[self.choice[index]].workspace_bytes
        return live, before


def _profiled(builder: Builder, root: int, members: list[int]) -> Group:
    """Walk the members: which inputs are still needed, and how many bytes the interior takes."""
    tables, inside = builder.tables, {s for index in members for s in builder.ops[index].creates}
    reads = {index: builder.ops[index].choices[builder.choice[index]].reads for index in members}
    last = {s: index for index in members for s in reads[index]}
    outputs = set(builder.ops[root].creates)
    outer = [s for s in last if s not in inside]
    inputs = [s for s in outer if s in builder.items or (not builder.storages[s].persistent and tables.size[s] > builder.tiny)]
    inputs = [s for s in inputs if builder.items.get(s) or s not in tables.written]
    live, points = 0, []
    for index in members:
        op = builder.ops[index]
        live += sum(tables.size[s] for s in op.creates)
        needed = frozenset(s for s in inputs if last[s] >= index)
        points.append((needed, live + op.choices[builder.choice[index]].workspace_bytes))
        live -= sum(tables.size[s] for s in {*reads[index], *op.creates} if s in inside and last.get(s, index) <= index and s not in outputs)
    kept = [p for k, p in enumerate(points) if not any(_covers(other, p, j < k) for j, other in enumerate(points) if j != k)]
    pinned = tuple(s for s in outer if s not in inputs and not builder.storages[s].persistent)
    time_us = sum(builder.ops[index].choices[builder.choice[index]].time_us for index in members)
    return Group(root, tuple(members), tuple(inputs), pinned, tuple(sorted(inside - outputs)), time_us, tuple(kept))


def _covers(other: tuple[frozenset[int], int], point: tuple[frozenset[int], int], first: bool) -> bool:
    """The other point needs at least as much."""
    return point[0] <= other[0] and point[1] <= other[1] and (first or point != other)


def between(values: list[int], a: int, b: int) -> list[int]:
    """Those of the sorted values that lie strictly between a and b."""
    return values[bisect_right(values, a) : bisect_left(values, b)]
