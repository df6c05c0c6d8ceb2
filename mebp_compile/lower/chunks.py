"""Regions of a step that go row by row run in blocks of tokens, so that what is wide in them never exists whole.

An MLP's intermediates are several times as wide as the residual stream, and a norm computes in float32: at a long sequence they are the peak of a
step. A region is a set of row-wise ops (see `rows`) joined by values wider than the stream; what leaves it stays whole. The backward's region
makes the wide values of the forward that it needs again, block by block, from what went into the forward's region. Each region becomes one op,
a Loop over blocks with a menu of trip counts, 1 among them. The arithmetic of a row stays as it is; sums over the tokens (gradients of weights)
are added up block by block, which rounds them otherwise.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

from mebp_compile.graph import Graph, LoopChoice, Op, inputs_of
from mebp_compile.lower.chunk_body import Body
from mebp_compile.lower.cuts import ROWS_MULTIPLE, block_counts
from mebp_compile.lower.naming import Namer
from mebp_compile.lower.order import predecessors
from mebp_compile.lower.rows import ROWS, Rows, Split, stream_bytes, tokens_of
from mebp_compile.lower.tables import without_storages

TRIPS = (2, 4, 8, 16, 32)
PHASES = ("forward", "backward")


@dataclass
class _Region:
    """Ops of one phase that run in blocks, and the forward's ops whose results the blocks make again."""

    ops: list[int]
    phase: str
    again: list[int]
    once: bool = False  # holds what a region of the forward made, and makes it where the backward needs it

    @property
    def all(self) -> list[int]:
        return sorted({*self.ops, *self.again})


def in_chunks(graph: Graph, exact: bool = False, again: bool = True, tell: Callable[[str], None] = lambda text: None) -> Graph:
    """The graph with its row-wise regions as Loops over blocks of tokens; `tell` gets a note on them. The same graph where there are none.

    `exact`: without sums over the tokens, whose bits depend on the blocks. `again`: with the regions whose blocks make parts of the forward a
    second time; without them what is left takes no more time than it would whole.
    """
    tokens = tokens_of(graph)
    if tokens < 2 * ROWS_MULTIPLE:
        return graph
    return _Chunks(graph, Rows(graph, tokens, sums=not exact)).graph(again, tell)


class _Chunks:
    def __init__(self, graph: Graph, rows: Rows) -> None:
        self.old, self.rows = graph, rows
        self.stream = stream_bytes(self.rows)
        self.splits: list[Split | None] = [self.rows.split(op) if op.phase in PHASES else None for op in graph.ops]
        self.readers: dict[int, list[int]] = {}
        self.writers: dict[int, list[int]] = {}
        for index, op in enumerate(graph.ops):
            for storage in (*op.reads, *op.writes):
                self.readers.setdefault(storage, []).append(index)
            for storage in op.writes:
                self.writers.setdefault(storage, []).append(index)
        self.results = {graph.storage_of(name) for _, name in graph.results}
        self.before = predecessors(graph)

    def graph(self, again: bool, tell: Callable[[str], None]) -> Graph:
        regions = [region for region in self._regions() if self._closed(region)]
        self._make_again(regions)
        regions = [region for region in self._made_once(regions) if again or region.once]
        while True:
            self._make_again(regions)
            sound = [region for region in regions if self._sound(region)]
            order, stuck = self._order(sound) if len(sound) == len(regions) else ([], None)
            if len(sound) == len(regions) and stuck is None:
                break
            regions = [region for region in sound if region is not stuck]
        if not regions:
            return self.old
        new = self._rewritten(regions, order)
        saved = sum(storage.size_bytes for storage in self.old.storages) - sum(storage.size_bytes for storage in new.storages)
        tell(f"chunks: {len(regions)} regions in blocks of {self.rows.tokens:,} tokens; {saved:,} bytes of a step are never whole")
        return new

    # --- regions ---

    def _wide(self, storage: int) -> bool:
        """Whether the region that makes it may keep a storage to its blocks, and gains by it."""
        maker = self.old.producer.get(storage)
        if maker is None or self.splits[maker] is None or storage in self.results or storage in self.writers:
            return False
        return self._is_rows(maker, storage) and self.old.storages[storage].size_bytes > self.stream * self.rows.tokens

    def _is_rows(self, maker: int, storage: int) -> bool:
        split, op = self.splits[maker], self.old.ops[maker]
        assert split is not None
        return any(
            name is not None and kind == ROWS and self.old.storage_of(name) == storage
            for name, kind in zip(op.outputs, split.results, strict=True)
        )

    def _regions(self) -> list[_Region]:
        """Row-wise ops of a phase that wide values join."""
        parent = list(range(len(self.old.ops)))

        def find(index: int) -> int:
            while parent[index] != index:
                parent[index] = index = parent[parent[index]]
            return index

        joined: set[int] = set()
        served: dict[int, int] = {}  # an op of the backward that needs wide values of the forward's region
        for maker, op in enumerate(self.old.ops):
            for storage in filter(self._wide, op.creates):
                near = [index for index in self.readers.get(storage, ()) if self.splits[index] is not None]
                for phase in PHASES:
                    same = [index for index in (maker, *near) if self.old.ops[index].phase == phase]
                    joined.update(same)
                    for index in same[1:]:
                        parent[find(index)] = find(same[0])
                if op.phase == "forward":
                    served |= {index: maker for index in near if self.old.ops[index].phase == "backward"}
        first: dict[int, int] = {}
        for index, maker in served.items():  # together they make what they need again once
            parent[find(index)] = find(first.setdefault(find(maker), index))
        groups: dict[int, list[int]] = {}
        for index in sorted(joined):
            groups.setdefault(find(index), []).append(index)
        return [_Region(ops, self.old.ops[ops[0]].phase, []) for ops in groups.values()]

    def _closed(self, region: _Region) -> bool:
        """Take in the ops between those of the region; False where one of them does not go row by row."""
        inside, first, last = set(region.ops), region.ops[0], region.ops[-1]
        after: set[int] = set()  # ops that need something of the region
        for index in range(first, last + 1):
            if index in inside or self.before[index] & (after | inside):
                after.add(index)
        needed: set[int] = set()
        for index in range(last, first - 1, -1):
            if index in inside or index in needed:
                needed |= self.before[index]
        between = (after & needed) - inside
        if any(self.splits[index] is None or self.old.ops[index].phase != region.phase for index in between):
            return False
        region.ops = sorted(inside | between)
        return True

    def _make_again(self, regions: list[_Region]) -> None:
        """Find, for each region of the backward, what of the forward its blocks make again: all that nobody else needs whole."""
        forward = {index for region in regions if region.phase == "forward" for index in region.ops}
        backward = {index for region in regions if region.phase == "backward" for index in region.ops}
        for region in regions:
            region.again = []
            todo, seen = list(region.ops) if region.phase == "backward" else [], set[int]()
            while todo:
                for storage in self._block_reads(todo.pop()):
                    maker = self.old.producer.get(storage, -1)
                    if maker in forward and maker not in seen and self._only_read_by(storage, forward | backward):
                        seen.add(maker)
                        todo.append(maker)
            region.again = sorted(seen)

    def _made_once(self, regions: list[_Region]) -> list[_Region]:
        """The regions; where a region of the backward makes again what one of the forward makes, and needs nothing that comes of that one
        elsewhere, both are one. So it is with logits and their gradients."""
        gone: list[_Region] = []
        for own in (region for region in regions if region.phase == "forward"):
            others = [region for region in regions if not set(own.ops).isdisjoint(region.again)]
            if len(others) == 1 and not self._leads_to(own, others[0]):
                others[0].ops, others[0].once = sorted({*own.ops, *others[0].ops}), True
                gone.append(own)
        return [region for region in regions if region not in gone]

    def _leads_to(self, first: _Region, second: _Region) -> bool:
        """Whether the second region needs an op outside of both that needs the first."""
        inside, made = {*first.ops, *second.ops}, set(first.ops)
        todo, seen = list(second.ops), set(inside)
        while todo:
            for index in self.before[todo.pop()] - seen:
                if self.before[index] & made:
                    return True
                seen.add(index)
                todo.append(index)
        return False

    def _only_read_by(self, storage: int, inside: set[int]) -> bool:
        """Whether a storage of the forward's regions is rows that only regions read, each of which can make it again."""
        same = storage not in self.results and self._is_rows(self.old.producer[storage], storage)
        return same and all(index in inside and storage in self._block_reads(index) for index in self.readers.get(storage, ()))

    def _block_reads(self, index: int) -> set[int]:
        split = self.splits[index]
        return {self.old.storage_of(name) for name in split.blocks} if split else set()

    def _sound(self, region: _Region) -> bool:
        """Whether blocks of the region need nothing whole that the region makes, and the region spares a wide value."""
        made = {storage for index in region.all for storage in self.old.ops[index].creates}
        for index in region.all:
            op, split = self.old.ops[index], self.splits[index]
            assert split is not None
            whole = {self.old.storage_of(name) for name in inputs_of(op) if name not in split.blocks}
            summed = {s for maker in region.all for s in self.old.ops[maker].creates if not self._is_rows(maker, s)}
            if whole & made or self._block_reads(index) & summed:
                return False
        return any(self._wide(storage) for index in region.ops for storage in (*self.old.ops[index].creates, *self._block_reads(index)))

    # --- order ---

    def _order(self, regions: list[_Region]) -> tuple[list[int], _Region | None]:
        """Ops and regions (as their first op) in an order that respects what each needs, as near to the old one as may be; or a region that
        stands in the way of it."""
        node = list(range(len(self.old.ops)))
        for region in regions:
            for index in region.ops:
                node[index] = region.ops[0]
        needs: dict[int, set[int]] = {each: set() for each in node}
        for index, before in enumerate(self.before):
            needs[node[index]] |= {node[other] for other in before}
        for region in regions:
            self._need_again(region, node, needs)
        done, order = _sorted({each: before - {each} for each, before in needs.items()})
        left = [region for region in regions if region.ops[0] not in done]
        return order, left[0] if left else None

    def _need_again(self, region: _Region, node: list[int], needs: dict[int, set[int]]) -> None:
        """What the blocks make again reads things as they were in the forward: what changes them comes later."""
        own = region.ops[0]
        for index in region.again:
            needs[own] |= {node[other] for other in self.before[index]}
            for storage in self.old.ops[index].reads:
                later = next((writer for writer in self.writers.get(storage, ()) if writer > index), None)
                if later is not None:
                    needs[node[later]].add(own)

    # --- the new graph ---

    def _rewritten(self, regions: list[_Region], order: list[int]) -> Graph:
        by_first = {region.ops[0]: region for region in regions}
        inside = {index for region in regions for index in region.ops}
        outputs = self._outputs(regions, inside)
        namer = Namer()
        namer.taken |= {value.name for value in self.old.values} | {op.name for op in self.old.ops}
        ops = [self._op(by_first[index], outputs, namer) if index in by_first else self.old.ops[index] for index in order]
        made = {storage for op in ops for storage in op.creates}
        gone = {storage for index in inside for storage in self.old.ops[index].creates} - made
        return without_storages(replace(self.old, ops=tuple(ops)), gone)

    def _outputs(self, regions: list[_Region], inside: set[int]) -> set[int]:
        """Storages made in regions that somebody else reads."""
        found = set(self.results)
        for region in regions:
            for storage in (storage for index in region.ops for storage in self.old.ops[index].creates):
                maker = self.old.producer[storage]
                others = [other for other in regions if maker in (*other.ops, *other.again)]
                own = {index for other in others for index in other.all}
                if any(index not in own or not self._made_there(index, maker, regions) for index in self.readers.get(storage, ())):
                    found.add(storage)
        return found

    def _made_there(self, reader: int, maker: int, regions: list[_Region]) -> bool:
        return all(maker in region.all for region in regions if reader in region.all)

    def _op(self, region: _Region, outputs: set[int], namer: Namer) -> Op:
        own = {storage for index in region.ops for storage in self.old.ops[index].creates}
        body = Body(self.rows, outputs & own)
        for index in region.all:
            split = self.splits[index]
            assert split is not None
            body.add(self.old.ops[index], split)
        like = max((self.old.ops[index] for index in region.ops), key=lambda op: sum(self.old.storages[s].size_bytes for s in op.creates))
        op = body.region(namer.unique(f"{like.name}_chunks"), like)
        return replace(op, menu=tuple(LoopChoice(trips, op.reads) for trips in block_counts(self.rows.tokens, TRIPS)))


def _sorted(needs: dict[int, set[int]]) -> tuple[set[int], list[int]]:
    """The nodes that can be put in order, and the order: the smallest first of those that need no other."""
    after: dict[int, list[int]] = {}
    left = {each: len(before) for each, before in needs.items()}
    for each, before in needs.items():
        for other in before:
            after.setdefault(other, []).append(each)
    ready = [each for each, count in left.items() if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for each in after.get(order[-1], ()):
            left[each] -= 1
            if not left[each]:
                heapq.heappush(ready, each)
    return set(order), order
