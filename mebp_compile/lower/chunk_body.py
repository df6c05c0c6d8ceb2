"""The body of a region in blocks of tokens: what is made before the blocks, what each block does, one op a line, and what comes after.

In a body's values, -1 is the number of rows of a block. Results that are rows are put into their place of the whole; sums over the tokens are
added up, in float32 whatever their dtype, since each addition in bfloat16 would round away what the small terms hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mebp_compile.graph import CHUNKS, Const, Graph, Op, Ref, Value, inputs_of, map_refs
from mebp_compile.lower.products import MULTIPLY, WIDENED
from mebp_compile.lower.rows import ROWS, SUM, Rows, Split, block_shape, element_by_element
from mebp_compile.lower.tables import itemsize

TILE = Ref("tile")
TILE_BYTES = 2 << 20  # of a weight that a product makes at a time


@dataclass
class Body:
    """Files the ops of a region in order. `outputs`: storages that others read."""

    rows: Rows
    outputs: set[int]
    ops: list[Op] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, None] = field(default_factory=dict)
    block: dict[str, str] = field(default_factory=dict)  # the block's name of a value of which it has rows
    made: dict[int, str] = field(default_factory=dict)  # storages made here, and the block's name of each
    results: list[str] = field(default_factory=list)

    def add(self, op: Op, split: Split) -> None:
        """File one op, with the blocks and views that it needs before it."""
        taken: dict[str, object] = {}
        for name in inputs_of(op):
            if name in split.blocks:
                taken[name] = Ref(self._block_of(name))
            else:
                self.inputs[name] = None
                self.values[name] = self.rows.graph.value[name]
        names = tuple(self._result(name, kind) if name and kind else None for name, kind in zip(op.outputs, split.results, strict=True))
        args = tuple(map_refs(arg, taken) for arg in op.args)
        kwargs = tuple((key, map_refs(arg, taken)) for key, arg in op.kwargs)
        self.ops.append(Op(op.name, op.target, args, kwargs, names, phase="tile", out_target=op.out_target, out=op.out))
        for name, made, kind in zip(op.outputs, names, split.results, strict=True):
            if name and made and self.rows.graph.storage_of(name) in self.outputs:
                self._put(name, made, kind or "")

    def region(self, name: str, like: Op) -> Op:
        """The op of the region, in the place and of the module of `like`."""
        graph = self.rows.graph
        outside = dict.fromkeys(graph.storage_of(value) for value in self.inputs)
        ops = _with_ends(_in_place(self.ops, self.values))
        body = Graph(f"{self.rows.tokens}", (), tuple(self.values.values()), tuple(ops), (), tuple(self.inputs), ())
        return Op(
            name, CHUNKS, (self.rows.tokens, *(Ref(value) for value in self.inputs)), outputs=tuple(self.results),
            creates=tuple(graph.storage_of(value) for value in self.results), reads=tuple(outside), phase=like.phase, module=like.module,
            source=like.source, forward_op=like.forward_op, out_target=CHUNKS, body=body,
        )  # fmt: skip

    # --- values ---

    def _block_of(self, name: str) -> str:
        """The block's name of a value's rows, filing what makes it."""
        if name not in self.block:
            graph = self.rows.graph
            view = graph.view.get(name)
            inside = graph.storage_of(name) in self.made
            if name in self.rows.leading and not (inside and view):
                self.inputs[name] = None
                self._file(name, f"{name}_rows", "rows.take", (Ref(name), self.rows.leading[name]))
            else:
                assert view is not None
                self._view(name, view)
        return self.block[name]

    def _view(self, name: str, view: Op) -> None:
        source = Ref(self._block_of(inputs_of(view)[0]))
        if name in self.rows.columns:
            self._file(name, name, "aten.t.default", (source,))
            return
        target = "aten.expand.default" if view.target == "aten.expand.default" else "aten.view.default"
        self._file(name, name, target, (source, self._shape(name)))

    def _file(self, name: str, made: str, target: str, args: tuple[object, ...]) -> None:
        self.block[name] = made
        self._value(name, made)
        self.ops.append(Op(made, target, args, outputs=(made,), phase="view"))

    def _shape(self, name: str) -> tuple[int, ...]:
        value = self.rows.graph.value[name]
        return (value.shape[0], -1) if name in self.rows.columns else block_shape(value, self.rows.leading[name])

    def _value(self, name: str, made: str) -> None:
        self.values[made] = replace(self.rows.graph.value[name], name=made, shape=self._shape(name))

    def _result(self, name: str, kind: str) -> str:
        """The name of what an op makes of a block."""
        storage = self.rows.graph.storage_of(name)
        if kind == SUM:
            self.values[f"{name}_part"] = replace(self.rows.graph.value[name], name=f"{name}_part")
            return f"{name}_part"
        self.made[storage] = self.block[name] = f"{name}_rows" if storage in self.outputs else name
        self._value(name, self.block[name])
        return self.block[name]

    def _put(self, name: str, made: str, kind: str) -> None:
        """Put a block of a result in its place, or add it to its sum."""
        value = self.rows.graph.value[name]
        self.results.append(name)
        if kind == ROWS:
            self.ops.append(Op(f"{name}_put", "rows.put", (Ref(name), self.rows.leading[name], Ref(made)), phase="tile"))
        elif value.dtype in ("float32", "float64"):
            self.ops.append(Op(f"{name}_add", "run.gather", (Ref(name), Ref(made), TILE), phase="tile"))
        else:
            total = f"{name}_sum"
            self.values[total] = replace(value, name=total, dtype="float32")
            self.ops.insert(0, Op(total, "run.new", (value.shape, Const("dtype", "float32")), outputs=(total,), phase="before"))
            self.ops.append(Op(f"{name}_add", "run.gather", (Ref(total), Ref(made), TILE), phase="tile"))
            self.ops.append(Op(f"{name}_copy", "aten.copy_.default", (Ref(name), Ref(total)), phase="after"))


def with_weights(body: Graph, graph: Graph, weights: Mapping[str, tuple[Value, Value]]) -> Graph:
    """The body with what a block does where the dense weights are not in memory: ops of phase "packed" and "weight", instead of those of phase
    "dense". A product with a weight makes it a tile at a time; any other use makes it whole before and lets go of it after. `weights`:
    (dense, packed) by the dense weight's name."""
    dense = {value.storage: value.name for value, _ in weights.values()}
    ops: list[Op] = []
    for op in body.ops:
        product = _product(op, graph, weights)
        if product is not None:
            ops += [replace(op, phase="dense"), product]
            continue
        made: dict[str, None] = {}
        for name in (name for name in inputs_of(op) if name in body.inputs and graph.storage_of(name) in dense):
            ops += _made_weight(name, graph, weights, made)
        ops.append(op)
        if made:
            ops.append(Op(f"{op.name}_weight_free", "tile.free", tuple(map(Ref, made)), phase="weight"))
    values = {value.name: value for value in (*body.values, *(value for pair in weights.values() for value in pair))}
    inputs = dict.fromkeys((*body.inputs, *(packed.name for _, packed in weights.values())))
    return replace(body, ops=tuple(ops), values=tuple(values.values()), inputs=tuple(inputs))


def _product(op: Op, graph: Graph, weights: Mapping[str, tuple[Value, Value]]) -> Op | None:
    """The matmul with a weight, or its transpose, that takes it packed; None for anything else."""
    if op.target not in (MULTIPLY, WIDENED):
        return None
    name = op.args[1].name
    view = graph.view.get(name)
    transposed = view is not None and view.target == "aten.t.default"
    source = view.args[0].name if view is not None and transposed else name
    if source not in weights or len(weights[source][0].shape) != 2:
        return None
    dense, packed = weights[source]
    width = dense.shape[0] if transposed else dense.shape[1]
    columns = max(1, TILE_BYTES // (itemsize(dense.dtype) * (dense.shape[1] if transposed else dense.shape[0])))
    args = (op.args[0], source, Ref(packed.name), transposed, -(-width // columns))
    kwargs = (("widened", True),) if op.target == WIDENED else ()
    return replace(op, name=f"{op.name}_product", target="run.product", args=args, kwargs=kwargs, phase="packed")


def _made_weight(name: str, graph: Graph, weights: Mapping[str, tuple[Value, Value]], made: dict[str, None]) -> list[Op]:
    """What makes a weight or a view of it, unless it is among `made`."""
    if name in made:
        return []
    if name in weights:
        made[name] = None
        return [Op(f"{name}_dequantise", "run.dequantise", (name, Ref(weights[name][1].name)), outputs=(name,), phase="weight")]
    view = graph.view[name]
    ops = [op for source in inputs_of(view) for op in _made_weight(source, graph, weights, made)]
    made[name] = None
    return [*ops, replace(view, phase="weight")]


def _in_place(ops: list[Op], values: Mapping[str, Value]) -> list[Op]:
    """The ops of a block, where one that goes element by element may write its result over an input that nothing uses after it."""
    root, last = _lifespans(ops)
    own = {name for op in ops if op.phase == "tile" for name in op.outputs}  # not a block of what lies outside
    made: list[Op] = []
    for index, op in enumerate(ops):
        ending = (name for name in inputs_of(op) if root.get(name) in own and last[root[name]] == index)
        over = next((name for name in ending if _may_hold(op, name, root, values)), None)
        plain = replace(op, out_target="", out=())
        made.append(plain if over is None else replace(plain, target=op.out_target, kwargs=(*op.kwargs, (op.out[0], Ref(over))), out=op.out))
    return made


def _may_hold(op: Op, name: str, root: Mapping[str, str], values: Mapping[str, Value]) -> bool:
    """Whether the op has a kernel that can put its result where the input lies, each element in the place of the one that it is made of."""
    if len(op.out) != 1 or len(op.outputs) != 1 or op.outputs[0] is None or not op.out_target.startswith("aten.") or op.phase != "tile":
        return False
    forms = {_form(values[each]) for each in (op.outputs[0], *inputs_of(op)) if each == op.outputs[0] or root.get(each) == root[name]}
    return len(forms) == 1 and element_by_element(op.target)


def _form(value: Value) -> tuple[object, ...]:
    return value.dtype, value.shape, value.stride, value.offset


def overwritten(op: Op) -> str | None:
    """The input of a body's op that its result is written over, which is given as the op's `out`."""
    over = dict(op.kwargs).get(op.out[0]) if op.out else None
    return over.name if isinstance(over, Ref) else None


def _lifespans(ops: list[Op]) -> tuple[dict[str, str], dict[str, int]]:
    """Of each name that a block makes the name of the tensor that it shows; and of each such tensor the last op that uses it."""
    root: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        used = [root[name] for name in inputs_of(op) if name in root]
        for name in filter(None, op.outputs):
            if op.phase != "before":
                shown = overwritten(op) or (inputs_of(op)[0] if op.phase == "view" and used else None)
                root[name] = root.get(shown, name) if shown else name
                last[root[name]] = index
        last.update(dict.fromkeys(used, index) if op.phase != "after" else {})
    return root, last


def _with_ends(ops: list[Op]) -> list[Op]:
    """The ops of a block, each followed by a `tile.free` of the names that nothing uses after it."""
    root, last = _lifespans(ops)
    result: list[Op] = []
    for index, op in enumerate(ops):
        result.append(op)
        over = [name for name in root if last[root[name]] == index]
        if over:
            result.append(Op(f"{op.name}_free", "tile.free", tuple(map(Ref, over)), phase="tile"))
    return result
