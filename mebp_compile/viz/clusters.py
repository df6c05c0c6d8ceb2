"""The graph made small enough to look at: an op a node, or, where there are many, a node per module and phase without cycles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mebp_compile.config import format_bytes
from mebp_compile.graph import Graph, Op, dataflow
from mebp_compile.planning import Plan
from mebp_compile.walk import common_prefix, layer_of
from solvers import Offload, Run

MOST_NODES = 150
LARGEST_CIRCLE = 6

Key = tuple[str, str, int]  # label, phase, and which visit to it


@dataclass
class Node:
    """A group of ops. `fate` is what the schedule does with what they make: kept, recomputed or offloaded."""

    label: str
    phase: str
    ops: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fate: str = "kept"


@dataclass(frozen=True)
class Picture:
    """Nodes in order of their first op, and (from node, to node, bytes that flow) for each pair that is connected. No cycles."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int, int], ...]


def picture(graph: Graph, plan: Plan) -> Picture:
    """The graph at the finest grain (op, module, part of a layer, layer, phase) that gives at most MOST_NODES nodes."""
    modules = _modules(graph)
    phases = [op.phase for op in graph.ops]
    grains: list[list[str]] = [
        [op.name for op in graph.ops], modules, [_part(module) for module in modules], [layer_of(module) for module in modules], [""] * len(phases),
    ]  # fmt: skip
    flows = list(dataflow(graph))
    for names in grains:
        keys = _without_large_circles([(name, phase, 0) for name, phase in zip(names, phases, strict=True)], flows)
        if len(set(keys)) <= MOST_NODES:
            break
    return _merged(graph, plan, keys, flows)


def _modules(graph: Graph) -> list[str]:
    """The module of each op, without what all share; an update belongs to the module of what it writes.

    Ops of no module, and sums of gradients that the root module makes between two layers, belong with the op before them in their phase.
    """
    prefix = common_prefix(graph)
    before: dict[str, str] = {}
    result = []
    for op in graph.ops:
        module = (op.module or _owner(graph, op)).removeprefix(prefix)
        if op.phase != "forward" and "." not in (op.module or module):
            module = before.get(op.phase, module)
        before[op.phase] = module
        result.append(module)
    return result


def _owner(graph: Graph, op: Op) -> str:
    """The module of the first parameter or optimizer state that the op writes; "" if it writes none."""
    for storage in op.writes:
        kind, *rest = graph.storages[storage].source.split(":")
        if kind in ("parameter", "optimizer"):
            root, path = rest[0:2] if kind == "parameter" else rest[1:3]
            return f"{root}.{path}".rpartition(".")[0]
    return ""


def _part(module: str) -> str:
    """layers.3.mlp.up_proj -> layers.3.mlp."""
    layer = layer_of(module)
    rest = module[len(layer) :].strip(".").split(".")[0]
    return f"{layer}.{rest}" if rest else layer


def _without_large_circles(keys: Sequence[Key], flows: Sequence[tuple[int, int, int]]) -> list[Key]:
    """Modules that need each other in a large circle (a loss and its embedding) are split where an op of another module comes between."""
    component = _component(keys, flows)
    size = Counter(component.values())
    visit: Counter[str] = Counter()
    before: dict[str, Key] = {}
    result = []
    for key in keys:
        label, phase, _ = key
        visit[phase] += before.get(phase) != key
        before[phase] = key
        result.append((label, phase, visit[phase] if size[component[key]] > LARGEST_CIRCLE else 0))
    return result


def _merged(graph: Graph, plan: Plan, keys: Sequence[Key], flows: Sequence[tuple[int, int, int]]) -> Picture:
    """Ops with one key become a node; groups that need each other in a circle become one."""
    component = _component(keys, flows)
    order = {number: rank for rank, number in enumerate(dict.fromkeys(component[key] for key in keys))}
    home = [order[component[key]] for key in keys]
    nodes = [_node(graph, [index for index in range(len(keys)) if home[index] == rank], keys) for rank in range(len(order))]
    _judge(graph, plan, nodes)
    weights: Counter[tuple[int, int]] = Counter()
    for writer, reader, storage in dict.fromkeys((home[w], home[r], s) for w, r, s in flows):
        if writer != reader:
            weights[writer, reader] += graph.storages[storage].size_bytes
    return Picture(tuple(nodes), tuple((a, b, size) for (a, b), size in weights.items()))


def _component(keys: Sequence[Key], flows: Sequence[tuple[int, int, int]]) -> dict[Key, int]:
    """The strongly connected component of each group of ops (networkx.condensation)."""
    import networkx

    groups = networkx.DiGraph()
    groups.add_nodes_from(dict.fromkeys(keys))
    groups.add_edges_from((keys[writer], keys[reader]) for writer, reader, _ in flows if keys[writer] != keys[reader])
    mapping: dict[Key, int] = networkx.condensation(groups).graph["mapping"]
    return mapping


def _node(graph: Graph, ops: list[int], keys: Sequence[Key]) -> Node:
    names = list(dict.fromkeys(keys[index][0] for index in ops))
    phases = Counter(graph.ops[index].phase for index in ops)
    shared = _shared([name for name in names if name])
    return Node(shared or ("step" if len(phases) > 1 else next(iter(phases))), phases.most_common(1)[0][0], ops)


def _shared(names: Sequence[str]) -> str:
    """The path components that all names begin with, or the first name and how many more there are."""
    if len(names) < 2:
        return names[0] if names else ""
    common = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or f"{names[0]} and {len(names) - 1} more"


def _judge(graph: Graph, plan: Plan, nodes: Sequence[Node]) -> None:
    """Notes and fate of every node: ops, bytes made, recomputes and offloads."""
    runs = Counter(step.op for step in plan.schedule.steps if isinstance(step, Run))
    moved = {step.storage for step in plan.schedule.steps if isinstance(step, Offload)}
    for node in nodes:
        made = [storage for index in node.ops for storage in graph.ops[index].creates]
        size = sum(graph.storages[storage].size_bytes for storage in made)
        again = [index for index in node.ops if runs[index] > 1]
        again_us = sum((runs[index] - 1) * plan.problem.ops[index].choices[0].time_us for index in again)
        off = sum(graph.storages[storage].size_bytes for storage in made if storage in moved)
        several = f"{len(node.ops)} ops, " if len(node.ops) > 1 else ""
        node.notes.append(f"{several}{format_bytes(size)}")
        if again:
            node.notes.append(f"recomputed: {len(again)} ops, {again_us} us")
        if off:
            node.notes.append(f"offloaded: {format_bytes(off)}")
        node.fate = "offloaded" if off and off >= sum(_made(graph, index) for index in again) else "recomputed" if again else "kept"


def _made(graph: Graph, index: int) -> int:
    return sum(graph.storages[storage].size_bytes for storage in graph.ops[index].creates)
