"""Stream frozen weights: a parameter that lies packed in a weight store becomes a record on disk and a `dequantise` op.

No arithmetic changes: the user's own step on the dequantised weights is what "exact" means then. The record is an ordinary persistent storage
whose home may be the disk, and the dense weight an ordinary activation that can be freed and made again, so keeping, dropping and fetching
are the solver's usual decisions. A matmul with a streamed weight is also offered as a Loop over tiles of its output columns, for which no
dense weight exists whole; a lookup in a streamed table dequantises only its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mebp_compile.graph import CHUNKS, Graph, LoopChoice, Op, Ref, Storage, Value, inputs_of
from mebp_compile.lower.chunk_body import with_weights
from mebp_compile.lower.cuts import tile_counts
from mebp_compile.lower.loss_loop import TILED_LOSS, with_loss_menu
from mebp_compile.lower.loss_loop import TRIPS as LOSS_TRIPS
from mebp_compile.lower.naming import Namer
from mebp_compile.lower.products import ADD_MULTIPLY, ADD_WIDENED, MATMULS

TRIPS = (2, 4, 8, 16, 32)
SMALLEST_TILED_BYTES = 1 << 20  # below this, tiling saves less than it costs
RECORD_BYTES_IN_LOOP = 16 << 20  # larger records are also offered read from disk tile by tile


@dataclass(frozen=True)
class Record:
    """A packed weight on disk: its scheme, bytes, and the shapes of its two parts."""

    scheme: str
    size_bytes: int
    codes_shape: tuple[int, int]
    scales_shape: tuple[int, int]
    scales_dtype: str


def stream_weights(graph: Graph, records: Mapping[str, Record]) -> Graph:
    """The graph with every parameter whose source is in `records` read from disk and dequantised where it is needed."""
    streamed = {index: records[storage.source] for index, storage in enumerate(graph.storages) if storage.source in records}
    if not streamed:
        return graph
    return _Streaming(graph, streamed).graph()


class _Streaming:
    def __init__(self, graph: Graph, streamed: Mapping[int, Record]) -> None:
        self.old, self.streamed = graph, streamed
        self.namer = Namer()
        self.namer.taken |= {value.name for value in graph.values} | {op.name for op in graph.ops}
        self.storages = list(graph.storages)
        self.values = list(graph.values)
        self.dense = {value.storage: value for value in graph.values if value.storage in streamed and value.name in graph.inputs}
        self.packed: dict[int, Value] = {}
        self.inputs = [name for name in graph.inputs if graph.storage_of(name) not in streamed]
        for storage, record in streamed.items():
            self._add_record(storage, record)

    def _add_record(self, storage: int, record: Record) -> None:
        old = self.storages[storage]
        name = self.namer.unique(f"{old.name}_packed")
        self.storages[storage] = replace(old, role="activation", source="")
        self.storages.append(Storage(name, record.size_bytes, "weight", old.source.replace("parameter:", "weight:", 1)))
        self.packed[storage] = Value(name, len(self.storages) - 1, "uint8", (record.size_bytes,), (1,))
        self.values.append(self.packed[storage])
        self.inputs.append(name)

    def graph(self) -> Graph:
        ops: list[Op] = []
        made: set[int] = set()
        for op in self.old.ops:
            op = self._looked_up(op)
            for storage in op.reads:
                if storage in self.streamed and storage not in made:
                    made.add(storage)
                    ops.append(self._dequantise(storage, op))
            ops.append(self._with_menu(op))
        self._forget_unread(ops)
        return replace(self.old, storages=tuple(self.storages), values=tuple(self.values), ops=tuple(ops), inputs=tuple(self.inputs))

    def _forget_unread(self, ops: list[Op]) -> None:
        """A record that is only looked up in is never in memory: it takes no bytes there."""
        read = {storage for op in ops for storage in (*op.reads, *(s for choice in op.menu for s in choice.reads))}
        for packed in self.packed.values():
            if packed.storage not in read:
                self.storages[packed.storage] = replace(self.storages[packed.storage], size_bytes=0)

    def _dequantise(self, storage: int, user: Op) -> Op:
        value, packed = self.dense[storage], self.packed[storage]
        return Op(
            name=self.namer.unique(f"{value.name}_dequantise"),
            target="run.dequantise",
            args=(value.name, Ref(packed.name)),
            outputs=(value.name,),
            creates=(storage,),
            reads=(packed.storage,),
            phase=user.phase,
            module=user.module,
            out_target="run.dequantise",
            out=("out",),
        )

    def _looked_up(self, op: Op) -> Op:
        """An embedding lookup in a streamed table reads the rows that it needs and nothing else."""
        if op.target != "aten.embedding.default" or not isinstance(op.args[0], Ref):
            return op
        storage = self.old.storage_of(op.args[0].name)
        if storage not in self.streamed:
            return op
        table = self.dense[storage].name
        reads = tuple(read for read in op.reads if read != storage)
        return replace(op, target="run.embedding", args=(table, op.args[1]), reads=reads, out_target="run.embedding", out=("out",))

    def _with_menu(self, op: Op) -> Op:
        """The Loop of a matmul whose second matrix is a streamed weight, or its transpose; a region's blocks may make their weights themselves."""
        if op.target == CHUNKS:
            return self._made_in_blocks(op)
        if op.target == TILED_LOSS and isinstance(op.args[1], Ref) and self.old.storage_of(op.args[1].name) in self.streamed:
            storage = self.old.storage_of(op.args[1].name)
            value, packed, record = self.dense[storage], self.packed[storage], self.streamed[storage]
            return with_loss_menu(op, value, packed, record.size_bytes, tile_counts(value.shape[0], LOSS_TRIPS))
        weight = self._second_matrix(op)
        if weight is None:
            return op
        storage, transposed = weight
        value, packed, record = self.dense[storage], self.packed[storage], self.streamed[storage]
        if (
            self.storages[storage].size_bytes < SMALLEST_TILED_BYTES
            or len(value.shape) != 2
            or storage in _other_reads(self.old, op, value.name)
        ):
            return op
        width = value.shape[0] if transposed else value.shape[1]
        others = tuple(read for read in op.reads if read != storage)
        counts = tile_counts(width, TRIPS)
        in_memory = [LoopChoice(trips, (*others, packed.storage)) for trips in counts]
        large = transposed and record.size_bytes >= RECORD_BYTES_IN_LOOP
        from_disk = [LoopChoice(trips, others, disk_bytes=record.size_bytes) for trips in counts] if large else []
        return replace(op, menu=(*in_memory, *from_disk), body=loop_body(op, value, packed, transposed, width))

    def _made_in_blocks(self, op: Op) -> Op:
        """A region that reads streamed weights, with the choice that each block dequantises each weight just before it needs it."""
        used = [storage for storage in op.reads if storage in self.streamed]
        if not used or op.body is None:
            return op
        reads = (*(read for read in op.reads if read not in used), *(self.packed[storage].storage for storage in used))
        weights = {self.dense[storage].name: (self.dense[storage], self.packed[storage]) for storage in used}
        packed = tuple(LoopChoice(choice.trips, reads) for choice in (LoopChoice(1, ()), *op.menu))
        return replace(op, menu=(*op.menu, *packed), body=with_weights(op.body, self.old, weights))

    def _second_matrix(self, op: Op) -> tuple[int, bool] | None:
        """(storage, transposed) of the streamed weight that a matmul multiplies by; None for anything else."""
        if op.target not in MATMULS or not isinstance(op.args[MATMULS[op.target]], Ref):
            return None
        name = op.args[MATMULS[op.target]].name
        storage = self.old.storage_of(name)
        if storage not in self.streamed:
            return None
        if name == self.dense[storage].name:
            return storage, False
        view = self.old.view.get(name)
        is_transpose = view is not None and view.target == "aten.t.default" and view.args == (Ref(self.dense[storage].name),)
        return (storage, True) if is_transpose else None


def _other_reads(graph: Graph, op: Op, weight: str) -> set[int]:
    """Storages that the op reads through arguments other than its second matrix."""
    position = MATMULS[op.target]
    rest = replace(op, args=op.args[:position] + op.args[position + 1 :])
    return {graph.storage_of(name) for name in inputs_of(rest)}


def loop_body(op: Op, weight: Value, packed: Value, transposed: bool, width: int) -> Graph:
    """What one tile does: dequantise rows (or columns) of the weight, multiply, put the columns of the result in place."""
    result = op.outputs[0] or ""
    part, tile, matrix = f"{weight.name}_part", "tile", f"{weight.name}_tile"
    make = Op("make", "run.rows" if transposed else "run.columns", (weight.name, Ref(packed.name), Ref(tile)), outputs=(matrix,), phase="tile")
    flipped = Op("flip", "aten.t.default", (Ref(matrix),), outputs=(f"{matrix}_t",), phase="tile") if transposed else None
    second = Ref(f"{matrix}_t") if transposed else Ref(matrix)
    take: list[Op] = []
    first = op.args[: MATMULS[op.target]]
    if op.target in (ADD_MULTIPLY, ADD_WIDENED):
        take = [Op("take", "tile.take", (op.args[0], Ref(tile)), outputs=(f"{weight.name}_bias",), phase="tile")]
        first = (Ref(f"{weight.name}_bias"), op.args[1])
    multiply = Op("multiply", op.target, (*first, second), op.kwargs, outputs=(part,), phase="tile")
    put = Op("put", "tile.put", (Ref(result), Ref(tile), Ref(part)), phase="tile")
    ops = [make, *([flipped] if flipped else []), *take, multiply, put]
    return Graph(f"{width}", (), (), tuple(ops), (), inputs_of(op) + (packed.name,), ())
