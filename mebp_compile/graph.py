"""The Graph: one whole training step as frozen, torch-free data.

Decisions are made per *storage*: a `Value` is a tensor as an op sees it (dtype, shape, strides) and lies in one `Storage`; views are values
that share one. `Graph.ops` are the calls that compute, in their original order; `Graph.views` tells how a view is made from its base and
is placed where it is used. An op that writes in place bumps the version of a storage: who reads which version is derived here, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mebp_compile.errors import GraphError

if TYPE_CHECKING:
    import networkx

# Roles of a storage. All but "activation" exist before the step.
PERSISTENT = ("parameter", "buffer", "optimizer", "gradient", "weight", "constant", "batch", "hyper")
CHUNKS = "run.blocks"  # the target of a region that runs in blocks of tokens


@dataclass(frozen=True)
class Ref:
    """A value, by name, inside an op's arguments."""

    name: str


@dataclass(frozen=True)
class Const:
    """A torch constant inside an op's arguments: kind "dtype", "device", "layout" or "memory_format", and its name."""

    kind: str
    name: str


Arg = Any  # Ref | Const | None | bool | int | float | str | tuple[Arg, ...]


@dataclass(frozen=True)
class Storage:
    """One allocation. `source` is how the runtime finds a persistent one, e.g. "model.layers.0.mlp.up_proj.weight". on_host: in the memory of the
    CPU beside an accelerator that the step runs on, such as the number of an optimizer's steps."""

    name: str
    size_bytes: int
    role: str
    source: str = ""
    on_host: bool = False


@dataclass(frozen=True)
class Value:
    """A tensor (or Python number: dtype "number", no shape) that lies in storage number `storage`, `offset` elements in."""

    name: str
    storage: int
    dtype: str
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class LoopChoice:
    """One way to run a Loop: `trips` tiles; `reads` are the storages that must be in memory for it; disk bytes are read inside it."""

    trips: int
    reads: tuple[int, ...]
    workspace_bytes: int = 0
    time_us: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Op:
    """One call. `outputs` name its results (None: not used); `creates`, `reads`, `writes` are storage numbers.

    `out` names the out= arguments of the native kernel `out_target` that fills given buffers with the same bits (empty: none exists).
    `menu` is not empty for a Loop: a region that may run tile by tile; `body` is then what one tile does.
    `listed`: its one result comes in a list of one (unbind of a single row).
    """

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[str | None, ...] = ()
    creates: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    phase: str = "forward"
    module: str = ""
    source: str = ""
    forward_op: str = ""
    rng: bool = False
    out_target: str = ""
    out: tuple[str, ...] = ()
    menu: tuple[LoopChoice, ...] = ()
    body: Graph | None = None
    listed: bool = False


@dataclass(frozen=True)
class Guard:
    """A fact that the capture relied on; `expect` is compared with what `subject` gives at each call, by the rules of `kind`."""

    kind: str
    subject: str
    expect: Any


@dataclass(frozen=True)
class Graph:
    """A whole step. `results` says what becomes of the values that outlive it: (path, value name), e.g. ("return.0", "nll_loss_1").
    `device`: the accelerator that it runs on, e.g. "cuda:0"; nothing for the CPU."""

    name: str
    storages: tuple[Storage, ...]
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    views: tuple[Op, ...]
    inputs: tuple[str, ...]
    results: tuple[tuple[str, str], ...]
    device: str = ""

    @cached_property
    def value(self) -> dict[str, Value]:
        return {value.name: value for value in self.values}

    @cached_property
    def view(self) -> dict[str, Op]:
        """The view op that makes each view value."""
        return {name: op for op in self.views for name in op.outputs if name}

    @cached_property
    def producer(self) -> dict[int, int]:
        """The op that creates each storage."""
        return {storage: index for index, op in enumerate(self.ops) for storage in op.creates}

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(to_json(self).encode()).hexdigest()[:12]

    def storage_of(self, value: str) -> int:
        return self.value[value].storage

    def listing(self) -> str:
        """One op a line, with the shapes and storages of what it makes."""
        return "\n".join(_line(self, op) for op in self.ops)

    def to_networkx(self) -> networkx.DiGraph:
        """Ops as nodes (with phase, module, target), an edge for each storage that flows from its last writer to a reader."""
        import networkx

        picture = networkx.DiGraph(name=self.name)
        for op in self.ops:
            picture.add_node(op.name, target=op.target, phase=op.phase, module=op.module)
        for source, target, storage in dataflow(self):
            picture.add_edge(self.ops[source].name, self.ops[target].name, storage=self.storages[storage].name)
        return picture


def refs(arg: Arg) -> Iterator[str]:
    """Names of the values inside an argument."""
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for part in arg:
            yield from refs(part)


def inputs_of(op: Op) -> tuple[str, ...]:
    """Values that an op takes, in order, each once."""
    return tuple(dict.fromkeys([*refs(op.args), *refs(tuple(arg for _, arg in op.kwargs))]))


def map_refs(arg: Arg, rename: dict[str, Arg]) -> Arg:
    """The argument with values replaced: `rename` maps a value's name to a new argument."""
    if isinstance(arg, Ref):
        return rename.get(arg.name, arg)
    if isinstance(arg, tuple):
        return tuple(map_refs(part, rename) for part in arg)
    return arg


def block_ops(op: Op, choice: LoopChoice) -> tuple[Op, ...]:
    """What a region in blocks of tokens does under one of its choices: it makes its streamed weights itself where the choice does not read them
    dense."""
    assert op.body is not None
    left_out = ("weight", "packed") if set(op.reads) <= set(choice.reads) else ("dense",)
    return tuple(part for part in op.body.ops if part.phase not in left_out)


def versions(graph: Graph) -> tuple[list[dict[int, int]], list[int]]:
    """For every op the version of each storage that it reads or is about to write; and the final version of every storage.

    What exists before the step is at version 0, what an op creates at 1; each write in place adds one.
    """
    now = [0] * len(graph.storages)
    seen: list[dict[int, int]] = []
    for op in graph.ops:
        seen.append({storage: now[storage] for storage in (*op.reads, *op.writes)})
        for storage in op.writes:
            now[storage] += 1
        for storage in op.creates:
            now[storage] = 1
    return seen, now


def dataflow(graph: Graph) -> Iterator[tuple[int, int, int]]:
    """(writer, reader, storage) for every op that reads what an earlier op made or modified."""
    last: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        for storage in (*op.reads, *op.writes):
            if storage in last:
                yield last[storage], index, storage
        for storage in (*op.creates, *op.writes):
            last[storage] = index


def verify(graph: Graph) -> None:
    """Raise GraphError unless every value is made before it is used, exactly once, and reads and writes agree with the arguments."""
    persistent = {index for index, storage in enumerate(graph.storages) if storage.role in PERSISTENT}
    made = {value.storage for value in graph.values if value.storage in persistent}
    for op in graph.ops:
        used = {graph.storage_of(name) for name in inputs_of(op) if _known(graph, op, name)}
        if not used <= {*op.reads, *op.writes, *(s for c in op.menu for s in c.reads)}:
            raise GraphError(
                f"op {op.name} uses storages {sorted(used - {*op.reads, *op.writes})} that it does not declare as read or written"
            )
        for storage in (*op.reads, *op.writes):
            if storage not in made:
                raise GraphError(f"op {op.name} reads storage {graph.storages[storage].name} before anything makes it")
        for storage in op.creates:
            if storage in made:
                raise GraphError(f"op {op.name} creates storage {graph.storages[storage].name}, which exists already")
            made.add(storage)
    for path, name in graph.results:
        if name not in graph.value or graph.storage_of(name) not in made:
            raise GraphError(f"result {path} is value {name}, which nothing makes")


def _known(graph: Graph, op: Op, name: str) -> bool:
    if name not in graph.value:
        raise GraphError(f"op {op.name} takes value {name}, which the graph does not have")
    return True


def _line(graph: Graph, op: Op) -> str:
    made = ", ".join(describe(graph.value[name]) if name else "_" for name in op.outputs)
    takes = ", ".join([*(_show(arg) for arg in op.args), *(f"{key}={_show(arg)}" for key, arg in op.kwargs)])
    return f"{made or '-'} = {op.target}({takes})  # {op.phase} {op.module}"


def describe(value: Value) -> str:
    """`up: bfloat16[256, 4864]`."""
    return f"{value.name}: {value.dtype}{list(value.shape)}" if value.dtype != "number" else f"{value.name}: number"


def _show(arg: Arg) -> str:
    if isinstance(arg, (Ref, Const)):
        return arg.name
    if isinstance(arg, tuple):
        return "[" + ", ".join(map(_show, arg)) + "]"
    return repr(arg)


# --- JSON: tuples become lists, Ref and Const become tagged objects ---


def to_json(graph: Graph) -> str:
    """Stable text of a graph; `from_json` gives an equal graph."""
    return json.dumps(_encode(graph), separators=(",", ":"))


def from_json(text: str) -> Graph:
    """The graph that `to_json` wrote. Raises GraphError where the text is not one."""
    try:
        return _graph(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise GraphError(f"not a graph: {error}", "write it again with to_json") from error


def _encode(item: Any) -> Any:
    if isinstance(item, Ref):
        return {"ref": item.name}
    if isinstance(item, Const):
        return {"const": [item.kind, item.name]}
    if isinstance(item, float):
        return {"float": item.hex()}
    if isinstance(item, (Graph, Op, Storage, Value, LoopChoice)):
        return {key: _encode(getattr(item, key)) for key in item.__dataclass_fields__ if not _is_default(item, key)}
    if isinstance(item, (tuple, list)):
        return [_encode(part) for part in item]
    return item


def _is_default(item: Any, key: str) -> bool:
    value = getattr(item, key)
    return value in ("", (), None) or (key == "on_host" and not value)


def _decode(item: Any) -> Arg:
    if isinstance(item, dict):
        if "ref" in item:
            return Ref(item["ref"])
        if "const" in item:
            return Const(*item["const"])
        return float.fromhex(item["float"])
    if isinstance(item, list):
        return tuple(_decode(part) for part in item)
    return item


def _graph(data: dict[str, Any]) -> Graph:
    return Graph(
        name=data["name"],
        storages=tuple(Storage(**storage) for storage in data.get("storages", [])),
        values=tuple(Value(**{key: _decode(item) for key, item in value.items()}) for value in data.get("values", [])),
        ops=tuple(_op(op) for op in data.get("ops", [])),
        views=tuple(_op(op) for op in data.get("views", [])),
        inputs=tuple(data.get("inputs", [])),
        results=tuple((path, name) for path, name in data.get("results", [])),
        device=data.get("device", ""),
    )


def _op(data: dict[str, Any]) -> Op:
    fields = {key: _decode(item) for key, item in data.items() if key not in ("menu", "body")}
    menu = tuple(LoopChoice(**{key: _decode(item) for key, item in choice.items()}) for choice in data.get("menu", []))
    return Op(**{"args": (), **fields}, menu=menu, body=_graph(data["body"]) if "body" in data else None)


__all__ = [
    "CHUNKS", "PERSISTENT", "Arg", "Const", "Graph", "Guard", "LoopChoice", "Op", "Ref", "Storage", "Value", "asdict", "block_ops", "dataflow",
    "describe", "field", "from_json", "inputs_of", "map_refs", "refs", "replace", "to_json", "verify", "versions",
]  # fmt: skip
