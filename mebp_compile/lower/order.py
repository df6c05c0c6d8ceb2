"""Order: drop what nothing needs, and move each update to right after the last gradient contribution that it needs."""

from __future__ import annotations

from dataclasses import replace

from mebp_compile.graph import PERSISTENT, Graph, inputs_of


def without_dead_ops(graph: Graph) -> Graph:
    """Without the ops whose results reach neither a result of the step nor anything that outlives it."""
    needed = {graph.storage_of(name) for _, name in graph.results}
    needed |= {index for index, storage in enumerate(graph.storages) if storage.role in PERSISTENT}
    kept = []
    for op in reversed(graph.ops):
        if needed.intersection(op.creates) or needed.intersection(op.writes):
            needed |= {*op.reads, *op.writes, *(s for choice in op.menu for s in choice.reads)}
            kept.append(op)
    return replace(graph, ops=tuple(reversed(kept)), views=_used_views(graph, kept))


def _used_views(graph: Graph, ops: list) -> tuple:  # type: ignore[type-arg]
    used = {name for op in ops for name in inputs_of(op)} | {name for _, name in graph.results}
    kept = []
    for op in reversed(graph.views):
        if used.intersection(name for name in op.outputs if name):
            used |= set(inputs_of(op))
            kept.append(op)
    return tuple(reversed(kept))


def predecessors(graph: Graph) -> list[set[int]]:
    """For each op the ops that must run before it: writers of what it reads, readers and writers of what it writes, earlier random draws.
    """
    before: list[set[int]] = []
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    last_draw = -1
    for index, op in enumerate(graph.ops):
        needs = {writer[storage] for storage in (*op.reads, *op.writes) if storage in writer}
        for storage in op.writes:
            needs.update(readers.get(storage, ()))
        if op.rng:
            needs |= {last_draw} - {-1}
            last_draw = index
        for storage in op.reads:
            readers.setdefault(storage, []).append(index)
        for storage in (*op.creates, *op.writes):
            writer[storage] = index
            readers[storage] = []
        before.append(needs)
    return before


def early_updates(graph: Graph) -> Graph:
    """The same ops, each update as early as its inputs allow (the schedule of LOMO, arXiv 2306.09782), and no earlier than it serves."""
    before = predecessors(graph)
    slot = list(range(len(graph.ops)))
    for index, op in enumerate(graph.ops):
        if op.phase == "update":
            slot[index] = max((slot[other] for other in before[index]), default=-1)
    after: list[list[int]] = [[] for _ in graph.ops]
    for index, others in enumerate(before):
        for other in others:
            after[other].append(index)
    for index in reversed(range(len(graph.ops))):
        if graph.ops[index].phase == "update" and after[index]:
            slot[index] = max(slot[index], min(slot[other] for other in after[index]))
    order = sorted(range(len(graph.ops)), key=lambda index: (slot[index], index))
    return replace(graph, ops=tuple(graph.ops[index] for index in order))
