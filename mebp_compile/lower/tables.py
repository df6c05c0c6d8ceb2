"""A trained table too large for the budget becomes blocks of rows, each a storage of its own with its optimizer state, at home on disk.

A language model's embedding, tied to its head, is its largest parameter, and its gradient is as large again. Everything that touches it goes
row by row: the lookup, the head's walk over the vocabulary, both gradients, their sum and the update. So the table is cut into blocks; the
head's walk takes block after block, and the step is closed block by block: the head's gradient is made again from the hidden states, the
lookup's rows are added, the block is updated and written back. Each block is an ordinary persistent storage, which the solver keeps, fetches
and writes as any other, and the arithmetic is the same: bit for bit what the whole table's ops give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from mebp_compile.graph import Graph, Op, Ref, Storage, Value, inputs_of, map_refs
from mebp_compile.lower.loss_loop import TILED_LOSS
from mebp_compile.lower.naming import Namer

ROWS = 2048  # a block is a multiple of it: that many rows the walk of the whole table takes at a time, too
BLOCK_BYTES = 8 << 20
WHOLE_COPIES = 4  # of the table, that closing the step with it whole takes: itself, two gradients and their sum
SUMS = ("top", "rest", "aim", "flat", "aimed", "pulled")  # as kernels.tables.cross_entropy_begin gives them
HEAD_GRADIENT, LOOK_UP, LOOK_UP_GRADIENT = "mebp.head_gradient.default", "aten.embedding.default", "aten.embedding_dense_backward.default"
ROW_WISE = {
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "neg_", "sqrt", "sqrt_", "rsqrt", "pow", "square", "lerp", "lerp_",
    "addcmul", "addcmul_", "addcdiv", "addcdiv_", "clone", "_to_copy", "copy_", "maximum", "minimum", "abs", "sign", "reciprocal", "zeros_like",
}  # fmt: skip


class _Whole(Exception):
    """Why a table stays whole."""


@dataclass
class _Table:
    """A table and what goes with it row by row: storages of its shape, and the ops on them."""

    graph: Graph
    value: Value
    members: dict[int, Value] = field(default_factory=dict)  # storage -> the value that has all of it
    closing: list[int] = field(default_factory=list)  # ops that make or change members
    special: list[int] = field(default_factory=list)  # lookups and walks, which read the table

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def split_tables(graph: Graph, budget_bytes: int, tell: Callable[[str], None] = lambda text: None) -> Graph:
    """The graph with every trained table that the budget can't hold WHOLE_COPIES times in blocks of rows; `tell` gets a note on each."""
    for value in _trained_tables(graph):
        name, size_bytes = value.name, graph.storages[value.storage].size_bytes
        if len(_bounds(value)) == 1 or WHOLE_COPIES * size_bytes <= budget_bytes:
            continue
        try:
            graph = _Split(_gather(graph, value)).graph()
            tell(f"table {name} in {len(_bounds(value))} blocks of rows")
        except _Whole as reason:
            tell(f"table {name} stays whole, because {reason}")
    return graph


def _trained_tables(graph: Graph) -> list[Value]:
    """Parameters that are looked up in, and updated."""
    looked_up = {op.args[0].name for op in graph.ops if op.target == LOOK_UP and isinstance(op.args[0], Ref)}
    written = {storage for op in graph.ops for storage in op.writes}
    found = [value for value in graph.values if value.name in looked_up and value.storage in written]
    return [value for value in found if graph.storages[value.storage].role == "parameter" and len(value.shape) == 2]


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return int(getattr(torch, dtype).itemsize)


def _bounds(value: Value) -> list[tuple[int, int]]:
    """First row and number of rows of each block."""
    rows, row_bytes = value.shape[0], value.shape[1] * itemsize(value.dtype)
    size = max(1, BLOCK_BYTES // (row_bytes * ROWS)) * ROWS
    return [(start, min(size, rows - start)) for start in range(0, rows, size)]


# --- what goes with a table ---


def _gather(graph: Graph, value: Value) -> _Table:
    """The table with all that has its shape and depends on it or changes it. Raises _Whole where something does not go row by row."""
    table = _Table(graph, value)
    kept = {graph.storage_of(name) for _, name in graph.results}
    by_storage: dict[int, list[int]] = {}
    for index, op in enumerate(graph.ops):
        for storage in (*op.reads, *op.writes, *op.creates):
            by_storage.setdefault(storage, []).append(index)
    todo, seen = [value.storage], set[int]()
    while todo:
        storage = todo.pop()
        if storage in table.members:
            continue
        table.members[storage] = _base(graph, storage, table.shape)
        if storage in kept:
            raise _Whole(f"the step gives back {graph.storages[storage].name}")
        for index in by_storage.get(storage, ()):
            if index not in seen:
                seen.add(index)
                todo += _touched(table, index)
    table.closing.sort()
    return table


def _base(graph: Graph, storage: int, shape: tuple[int, ...]) -> Value:
    """The value that has all of a storage, row after row."""
    for value in graph.values:
        if value.storage == storage and value.shape == shape and value.stride == (shape[1], 1) and value.name not in graph.view:
            return value
    raise _Whole(f"{graph.storages[storage].name} is not rows of the table's shape")


def _touched(table: _Table, index: int) -> list[int]:
    """File an op that touches a member; returns the storages that it draws in."""
    graph, op = table.graph, table.graph.ops[index]
    name = table.value.name
    if op.target in (LOOK_UP, TILED_LOSS):
        position = 0 if op.target == LOOK_UP else 1
        if op.args[position] != Ref(name) or any(arg == Ref(name) for place, arg in enumerate(op.args) if place != position):
            raise _Whole(f"{op.name} uses it in another way than as a table")
        if op.target == TILED_LOSS and op.args[5]:
            raise _Whole("its labels are smoothed, for which every row of a gradient needs the whole table")
        table.special.append(index)
        return []
    table.closing.append(index)
    if op.target in (HEAD_GRADIENT, LOOK_UP_GRADIENT):
        if op.target == LOOK_UP_GRADIENT and op.args[4]:
            raise _Whole("its gradient is scaled by how often a word comes")
        return list(op.creates)
    if not op.target.startswith("aten.") or op.target.split(".")[1] not in ROW_WISE or op.rng:
        raise _Whole(f"{op.target} ({op.name}) does not go row by row")
    drawn = [graph.storage_of(used) for used in inputs_of(op) if _is_rows(table, op, graph.value[used])]
    return [*drawn, *op.creates]


def _is_rows(table: _Table, op: Op, value: Value) -> bool:
    """Whether an input of a row-wise op has the table's rows; the others must be single numbers."""
    if value.dtype == "number" or math.prod(value.shape) == 1:
        return False
    if value.shape != table.shape or value.stride != (table.shape[1], 1):
        raise _Whole(f"{op.name} joins it with {value.name}, which has another shape")
    return True


# --- blocks ---


class _Split:
    """The graph with a table's members in blocks."""

    def __init__(self, table: _Table) -> None:
        self.table, self.old = table, table.graph
        self.namer = Namer()
        self.namer.taken |= {value.name for value in self.old.values} | {op.name for op in self.old.ops}
        self.storages, self.values = list(self.old.storages), list(self.old.values)
        self.blocks = _bounds(table.value)
        self.parts = {storage: self._cut(storage, value) for storage, value in table.members.items()}
        self.same = {  # every name of a whole member -> its storage
            value.name: value.storage for value in self.old.values if value.storage in table.members and value.shape == table.shape
        }

    def _cut(self, storage: int, whole: Value) -> list[Value]:
        """A storage and a value for each block."""
        old, columns = self.old.storages[storage], whole.shape[1]
        result = []
        for start, rows in self.blocks:
            name = self.namer.unique(f"{whole.name}_rows_{start}")
            source = f"{old.source}#{start}:{start + rows}" if old.source else ""
            self.storages.append(Storage(name, rows * columns * itemsize(whole.dtype), old.role, source))
            self.values.append(Value(name, len(self.storages) - 1, whole.dtype, (rows, columns), (columns, 1)))
            result.append(self.values[-1])
        return result

    def graph(self) -> Graph:
        ops: list[Op] = []
        last = self.table.closing[-1]
        for index, op in enumerate(self.old.ops):
            if index in self.table.special:
                ops += [self._look_up(op)] if op.target == LOOK_UP else self._walk(op)
            elif index not in self.table.closing:
                ops.append(op)
            if index == last:
                ops += [self._block(self.old.ops[k], number) for number in range(len(self.blocks)) for k in self.table.closing]
        gone = set(self.table.members)
        inputs = [name for name in self.old.inputs if self.old.storage_of(name) not in gone]
        inputs += [part.name for storage, parts in self.parts.items() if self.old.storages[storage].source for part in parts]
        new = replace(self.old, storages=tuple(self.storages), values=tuple(self.values), ops=tuple(ops), inputs=tuple(inputs))
        return without_storages(new, gone)

    def _look_up(self, op: Op) -> Op:
        """Rows of the table from wherever their blocks are; it runs once, before any block changes."""
        read = tuple(storage for storage in op.reads if storage != self.table.value.storage)
        return replace(op, target="run.table_rows", args=(self.table.value.name, op.args[1]), reads=read, out_target="run.table_rows", out=("out",))

    def _walk(self, op: Op) -> list[Op]:
        """The head's walk: begin, each block in turn, end."""
        x, _, target, reduction, ignored, _, cap, _ = op.args
        sums = self._sums(op, self.old.value[x.name])
        refs, written = tuple(Ref(value.name) for value in sums), tuple(value.storage for value in sums)
        seen = tuple(self.old.storage_of(arg.name) for arg in (x, target))
        made = tuple(value.name for value in sums)
        begin = self._like(op, "begin", "mebp.cross_entropy_begin.default", (x,), outputs=made, creates=written, reads=seen[:1])
        walk = [
            self._like(
                op, str(start), "mebp.cross_entropy_rows_.default", (x, Ref(part.name), target, start, cap, *refs),
                reads=(*seen, part.storage), writes=written,
            )
            for (start, _), part in zip(self.blocks, self.parts[self.table.value.storage], strict=True)
        ]  # fmt: skip
        last = (target, self.table.shape[0], reduction, ignored, cap, *refs)
        reads = (seen[1], *written)
        end = self._like(op, "end", "mebp.cross_entropy_end.default", last, outputs=op.outputs, creates=op.creates, reads=reads)
        return [begin, *walk, end]

    def _like(self, op: Op, suffix: str, target: str, args: tuple[object, ...], **fields: tuple[object, ...]) -> Op:
        """A part of an op, in its place."""
        name = self.namer.unique(f"{op.name}_{suffix}")
        return Op(name, target, args, phase=op.phase, module=op.module, source=op.source, **fields)  # type: ignore[arg-type]

    def _sums(self, op: Op, x: Value) -> list[Value]:
        """What the walk carries: four numbers a token, a tensor like x, and one like x in float32."""
        tokens, features = x.shape
        row, wide = ("float32", (tokens,), (1,)), (tokens, features)
        kinds = (row, row, row, row, (x.dtype, wide, (features, 1)), ("float32", wide, (features, 1)))
        for name, (dtype, shape, stride) in zip(SUMS, kinds, strict=True):
            label = self.namer.unique(f"{op.name}_{name}")
            self.storages.append(Storage(label, math.prod(shape) * itemsize(dtype), "activation"))
            self.values.append(Value(label, len(self.storages) - 1, dtype, shape, stride))
        return self.values[-len(SUMS) :]

    def _block(self, op: Op, number: int) -> Op:
        """A closing op on one block."""
        start, rows = self.blocks[number]
        rename = {name: Ref(self.parts[storage][number].name) for name, storage in self.same.items()}
        args = tuple(map_refs(arg, rename) for arg in op.args)
        target, out_target, out = op.target, op.out_target, op.out
        if op.target == HEAD_GRADIENT:
            target, args, out_target, out = "mebp.head_rows_gradient.default", (*args[:8], args[9], start), "", ()
        elif op.target == LOOK_UP_GRADIENT:
            target, args, out_target, out = "mebp.embedding_rows_gradient.default", (*args[:2], start, rows, args[3]), "", ()
        elif op.target.split(".")[1] == "zeros_like":
            out_target, out = "", ()
        outputs = tuple(rename[name].name if name in rename else name for name in op.outputs)
        kwargs = tuple((key, map_refs(arg, rename)) for key, arg in op.kwargs)
        creates, reads, writes = (tuple(self._part(s, number) for s in found) for found in (op.creates, op.reads, op.writes))
        name = self.namer.unique(f"{op.name}_{start}")
        return replace(
            op, name=name, target=target, args=args, kwargs=kwargs, outputs=outputs, creates=creates, reads=reads, writes=writes,
            out_target=out_target, out=out,
        )  # fmt: skip

    def _part(self, storage: int, number: int) -> int:
        return self.parts[storage][number].storage if storage in self.parts else storage


def without_storages(graph: Graph, gone: set[int]) -> Graph:
    """The graph without some storages, which no op touches, and their values and views; the others are numbered anew."""
    number = {old: new for new, old in enumerate(index for index in range(len(graph.storages)) if index not in gone)}

    def moved(found: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(number[storage] for storage in found)

    def renumbered(op: Op) -> Op:
        menu = tuple(replace(choice, reads=moved(choice.reads)) for choice in op.menu)
        return replace(op, creates=moved(op.creates), reads=moved(op.reads), writes=moved(op.writes), menu=menu)

    return replace(
        graph,
        storages=tuple(storage for index, storage in enumerate(graph.storages) if index not in gone),
        values=tuple(replace(value, storage=number[value.storage]) for value in graph.values if value.storage not in gone),
        ops=tuple(map(renumbered, graph.ops)),
        views=tuple(op for op in graph.views if not any(graph.storage_of(name) in gone for name in op.outputs if name)),
    )
