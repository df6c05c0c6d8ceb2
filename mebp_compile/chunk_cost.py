"""Costs of regions in blocks of tokens: each op of a body is measured at the shapes of one block; a block's time is their sum, its workspace the
most that is alive at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mebp_compile.graph import Graph, LoopChoice, Op, block_ops, inputs_of
from mebp_compile.lower.chunk_body import overwritten
from mebp_compile.lower.cuts import block_rows, tile_size
from mebp_compile.lower.products import MULTIPLY, WIDENED
from mebp_compile.lower.tables import itemsize
from mebp_compile.overhead import COPY_BYTES_PER_US, TRIP_US, VIEW_BYTES, allocated_bytes, fault_us

LINE_US = 2  # what Python needs for a line of the body
Json = dict[str, Any]
Requests = dict[str, Json]  # by the name of the body's op
Cost = tuple[int, int]  # (time in microseconds, workspace in bytes) of one op


def chunk_requests(op: Op, ask: Callable[[Graph, Op], Json | None]) -> dict[int, Requests]:
    """By number of trips: what to measure for one block. `ask` gives the request of an op of a graph."""
    assert op.body is not None
    return {trips: _requests(at_blocks(op.body, trips), ask) for trips in (1, *(choice.trips for choice in op.menu))}


def price_chunks(op: Op, choice: LoopChoice, costs: Mapping[str, Cost]) -> LoopChoice:
    """The choice with the workspace and the time of all its blocks."""
    assert op.body is not None
    body, tokens = at_blocks(op.body, choice.trips), int(op.body.name)
    ops = block_ops(op, choice)
    once = sum(LINE_US + _time_us(body, each, costs) + _copy_us(body, each) + _fresh_us(body, each) for each in ops)
    blocks = tokens / block_rows(tokens, choice.trips)
    return replace(choice, time_us=int(once * blocks), workspace_bytes=_workspace(body, ops, costs))


def touched_bytes(op: Op, trips: int, name: str) -> int:
    """Bytes of all that one op of a block takes and makes."""
    assert op.body is not None
    body = at_blocks(op.body, trips)
    touched = {each for part in body.ops if part.name == name for each in (*inputs_of(part), *filter(None, part.outputs))}
    return sum(value_bytes(body, each) for each in touched if body.value[each].dtype != "number")


def at_blocks(body: Graph, trips: int) -> Graph:
    """The body with the number of rows of one block in its shapes."""
    rows = block_rows(int(body.name), trips)
    values = tuple(replace(value, shape=tuple(rows if size == -1 else size for size in value.shape)) for value in body.values)
    return replace(body, values=values)


def _requests(body: Graph, ask: Callable[[Graph, Op], Json | None]) -> Requests:
    asked: dict[str, Json | None] = {}
    for op in body.ops:
        if op.target == "run.product":
            asked[op.name] = _tile_request(body, op)
            name, packed = op.args[1:3]
            asked[f"{op.name}_dequantise"] = ask(body, Op("", "run.dequantise", (name, packed), outputs=(name,)))
        elif op.target == "run.dequantise" or (op.phase in ("tile", "dense") and op.target.startswith(("aten.", "mebp."))):
            asked[op.name] = ask(body, op)
    return {name: request for name, request in asked.items() if request is not None}


def _tile_request(body: Graph, op: Op) -> Json:
    """The matmul with one tile of a weight."""
    (rows, inner), size = body.value[op.args[0].name].shape, tile_columns(body, op)
    dtype, transposed = body.value[op.args[1]].dtype, op.args[3]
    first = {"shape": [rows, inner], "dtype": dtype, "fill": "normal"}
    second = {"shape": [inner, size], "stride": [1, inner] if transposed else [size, 1], "dtype": dtype, "fill": "normal"}
    target = WIDENED if op.kwargs else MULTIPLY
    return {"target": target, "args": [{"tensor": first}, {"tensor": second}], "kwargs": {}}


def tile_columns(body: Graph, op: Op) -> int:
    return tile_size(body.value[op.args[1]].shape[0 if op.args[3] else 1], op.args[4])


def _time_us(body: Graph, op: Op, costs: Mapping[str, Cost]) -> int:
    """Of an op; of a product, of all its tiles and what they are made from."""
    once_us = costs.get(op.name, (0, 0))[0]
    if op.target != "run.product":
        return once_us
    tiles = -(-body.value[op.args[1]].shape[0 if op.args[3] else 1] // tile_columns(body, op))
    copy_us = value_bytes(body, op.outputs[0] or "") // COPY_BYTES_PER_US
    return tiles * (once_us + TRIP_US) + costs.get(f"{op.name}_dequantise", (0, 0))[0] + copy_us


def _spare_bytes(body: Graph, op: Op, costs: Mapping[str, Cost]) -> int:
    """What an op needs while it runs, beside what it makes: of a product, a tile of the weight and of the result."""
    own = costs.get(op.name, (0, 0))[1]
    if op.target != "run.product":
        return own
    weight, result = _tile_bytes(body, op)
    return own + allocated_bytes(weight) + allocated_bytes(result) + 4 * VIEW_BYTES


def _tile_bytes(body: Graph, op: Op) -> tuple[int, int]:
    """Of a product: a tile of the weight and of the result."""
    (rows, inner), column = body.value[op.args[0].name].shape, tile_columns(body, op) * itemsize(body.value[op.args[1]].dtype)
    return inner * column, rows * column


def _fresh_us(body: Graph, op: Op) -> float:
    """What the pages of large blocks take, which malloc maps anew for every block of tokens: of what an op makes, and of a product's tile."""
    made = 0.0 if _makes_views(op) else sum(fault_us(value_bytes(body, name)) for name in op.outputs if name)
    return made + (fault_us(_tile_bytes(body, op)[0]) if op.target == "run.product" else 0.0)


def _makes_views(op: Op) -> bool:
    return op.phase == "view" or (op.phase == "weight" and op.target != "run.dequantise") or overwritten(op)


def _copy_us(body: Graph, op: Op) -> int:
    """Of what is put into its place of the whole, or added to a sum."""
    if op.target not in ("rows.put", "run.gather"):
        return 0
    return value_bytes(body, op.args[2 if op.target == "rows.put" else 1].name) // COPY_BYTES_PER_US


def value_bytes(body: Graph, name: str) -> int:
    value = body.value[name]
    return math.prod(value.shape) * itemsize(value.dtype)


def _workspace(body: Graph, ops: tuple[Op, ...], costs: Mapping[str, Cost]) -> int:
    """The most bytes alive at once of what the body makes."""
    live = {name: allocated_bytes(value_bytes(body, name)) for op in ops if op.phase == "before" for name in op.outputs if name}
    most = 0
    for op in ops:
        for name in filter(None, op.outputs):
            live[name] = VIEW_BYTES if _makes_views(op) else allocated_bytes(value_bytes(body, name))
        most = max(most, sum(live.values()) + _spare_bytes(body, op, costs))
        if op.target == "tile.free":
            for arg in op.args:
                live.pop(arg.name)
    return most
