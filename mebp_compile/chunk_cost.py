"""Costs of regions in blocks of tokens: each op of a body is measured at the shapes of one block; a block's time is their sum, its workspace the
most that is alive at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mebp_compile.graph import Graph, LoopChoice, Op, block_ops, inputs_of
from mebp_compile.lower.chunks import block_rows
from mebp_compile.lower.tables import itemsize
from mebp_compile.overhead import VIEW_BYTES, allocated_bytes

COPY_BYTES_PER_US = 8000
LINE_US = 2  # what Python needs for a line of the body
Json = dict[str, Any]
Requests = dict[str, Json]  # by the name of the body's op
Cost = tuple[int, int]  # (time in microseconds, workspace in bytes) of one op


def chunk_requests(op: Op, ask: Callable[[Graph, Op], Json | None]) -> dict[int, Requests]:
    """By number of trips: what to measure for one block. `ask` gives the request of an op of a graph."""
    assert op.body is not None
    return {trips: _requests(_at(op.body, trips), ask) for trips in (1, *(choice.trips for choice in op.menu))}


def price_chunks(op: Op, choice: LoopChoice, costs: Mapping[str, Cost]) -> LoopChoice:
    """The choice with the workspace and the time of all its blocks."""
    assert op.body is not None
    body, tokens = _at(op.body, choice.trips), int(op.body.name)
    ops = block_ops(op, choice)
    once = sum(LINE_US + costs.get(each.name, (0, 0))[0] + _copy_us(body, each) for each in ops)
    blocks = tokens / block_rows(tokens, choice.trips)
    return replace(choice, time_us=int(once * blocks), workspace_bytes=_workspace(body, ops, costs))


def touched_bytes(op: Op, trips: int, name: str) -> int:
    """Bytes of all that one op of a block takes and makes."""
    assert op.body is not None
    body = _at(op.body, trips)
    part = next(each for each in body.ops if each.name == name)
    return sum(_bytes(body, each) for each in {*inputs_of(part), *filter(None, part.outputs)} if body.value[each].dtype != "number")


def _at(body: Graph, trips: int) -> Graph:
    """The body with the number of rows of one block in its shapes."""
    rows = block_rows(int(body.name), trips)
    values = tuple(replace(value, shape=tuple(rows if size == -1 else size for size in value.shape)) for value in body.values)
    return replace(body, values=values)


def _requests(body: Graph, ask: Callable[[Graph, Op], Json | None]) -> Requests:
    computed = (op for op in body.ops if op.target == "run.dequantise" or (op.phase == "tile" and op.target.startswith("aten.")))
    asked = {op.name: ask(body, op) for op in computed}
    return {name: request for name, request in asked.items() if request is not None}


def _copy_us(body: Graph, op: Op) -> int:
    """Of what is put into its place of the whole, or added to a sum."""
    if op.target not in ("rows.put", "run.gather"):
        return 0
    return _bytes(body, op.args[2 if op.target == "rows.put" else 1].name) // COPY_BYTES_PER_US


def _bytes(body: Graph, name: str) -> int:
    value = body.value[name]
    return math.prod(value.shape) * itemsize(value.dtype)


def _workspace(body: Graph, ops: tuple[Op, ...], costs: Mapping[str, Cost]) -> int:
    """The most bytes alive at once of what the body makes."""
    live = {name: allocated_bytes(_bytes(body, name)) for op in ops if op.phase == "before" for name in op.outputs if name}
    most = 0
    for op in ops:
        view = op.phase == "view" or (op.phase == "weight" and op.target != "run.dequantise")
        for name in filter(None, op.outputs):
            live[name] = VIEW_BYTES if view else allocated_bytes(_bytes(body, name))
        most = max(most, sum(live.values()) + costs.get(op.name, (0, 0))[1])
        if op.target == "tile.free":
            for arg in op.args:
                live.pop(arg.name)
    return most
