"""Costs of Loops: what is measured for one tile, how a tiling is checked against the whole, and what the loop then takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mebp_compile.graph import Graph, LoopChoice, Op, Ref
from mebp_compile.lower.loss_loop import TILED_LOSS
from mebp_compile.lower.stream import MATMULS, tile_size
from mebp_compile.lower.tables import itemsize

COPY_BYTES_PER_US = 8000
TRIP_US = 20  # what Python needs for one trip
PACKED_SLACK_BYTES = 4096
Json = dict[str, Any]


def loop_requests(graph: Graph, op: Op) -> dict[int, tuple[Json, Json | None]]:
    """By number of trips: the measurement of one tile, and the comparison with the whole (None for an op of tier "reassociate")."""
    if op.target == TILED_LOSS:
        return {choice.trips: (_loss_tile(graph, op, choice.trips), None) for choice in op.menu}
    return {choice.trips: (_matmul_tile(graph, op, choice.trips), _check(graph, op, choice.trips)) for choice in op.menu}


def price_loop(graph: Graph, op: Op, choice: LoopChoice, tile_us: int, tile_workspace_bytes: int, read_bytes_per_us: float) -> LoopChoice:
    """The choice with the workspace and the time of the whole loop, which waits for what it reads from disk."""
    inner, width, itemsize = _weight(graph, op)
    size = tile_size(width, choice.trips)
    dense = size * inner * itemsize
    packed = 0 if not choice.disk_bytes else -(-choice.disk_bytes * size // width) + PACKED_SLACK_BYTES
    workspace = dense + packed + max(tile_workspace_bytes, 4096)
    copied = dense
    if op.target != TILED_LOSS:  # its tile's result is a new tensor, copied into its columns of the whole
        result = graph.value[op.outputs[0] or ""].shape[0] * size * itemsize
        workspace, copied = workspace + result, copied + result
    time_us = choice.trips * (tile_us + copied // COPY_BYTES_PER_US + TRIP_US) + int(choice.disk_bytes / read_bytes_per_us)
    return replace(choice, workspace_bytes=workspace, time_us=time_us)


def _weight(graph: Graph, op: Op) -> tuple[int, int, int]:
    """(inner size, number of columns or rows that are cut into tiles, bytes of an element) of the weight of a Loop."""
    if op.target == TILED_LOSS:
        width, inner = graph.value[op.args[1].name].shape
        return inner, width, itemsize(graph.value[op.args[1].name].dtype)
    _, inner, width = _matmul_shape(graph, op)
    return inner, width, itemsize(graph.value[op.outputs[0] or ""].dtype)


def _loss_tile(graph: Graph, op: Op, trips: int) -> Json:
    """The whole op on a head of one tile's rows; x and the targets are its real ones."""
    x, weight = graph.value[op.args[0].name], graph.value[op.args[1].name]
    size = tile_size(weight.shape[0], trips)
    head = {"shape": [size, weight.shape[1]], "dtype": weight.dtype}
    target = {"shape": [x.shape[0]], "dtype": "int64", "fill": "index:2"}
    form = [0.5 if isinstance(arg, Ref) else arg for arg in op.args[3:-1]]  # a live number: any will do
    args = [{"tensor": {"shape": list(x.shape), "dtype": x.dtype}}, {"tensor": head}, {"tensor": target}, *form, size]
    return {"target": op.target, "args": args, "kwargs": {}}


def _matmul_tile(graph: Graph, op: Op, trips: int) -> Json:
    """The matmul of one tile."""
    rows, inner, width = _matmul_shape(graph, op)
    size = tile_size(width, trips)
    dtype = graph.value[op.outputs[0] or ""].dtype
    first = {"tensor": {"shape": [rows, inner], "dtype": dtype, "fill": "normal"}}
    transposed = op.body is not None and op.body.ops[0].target == "run.rows"
    second = {"shape": [inner, size], "stride": [1, inner] if transposed else [size, 1], "dtype": dtype, "fill": "normal"}
    return {"target": "aten.mm.default", "args": [first, {"tensor": second}], "kwargs": {}}


def _check(graph: Graph, op: Op, trips: int) -> Json:
    """Whole matmul against the same matmul in tiles of output columns, compared in raw bytes by the child."""
    rows, inner, width = _matmul_shape(graph, op)
    size = tile_size(width, trips)
    transposed = op.body is not None and op.body.ops[0].target == "run.rows"
    dtype = graph.value[op.outputs[0] or ""].dtype
    inputs = {
        "x": {"tensor": {"shape": [rows, inner], "dtype": dtype}},
        "w": {"tensor": {"shape": [width, inner] if transposed else [inner, width], "dtype": dtype}},
    }
    bias = op.target == "aten.addmm.default"
    if bias:
        inputs["b"] = {"tensor": {"shape": [width], "dtype": dtype}}
    tile = "w[i : i + {0}].contiguous().t()" if transposed else "w[:, i : i + {0}].contiguous()"
    call = "torch.addmm(b[{1}], x, {0})" if bias else "torch.mm(x, {0})"
    whole = call.format("w.t()" if transposed else "w", ":")
    part = call.format(tile.format(size), f"i : i + {size}")
    unpack = "x, w" + (", b" if bias else "") + " = " + ", ".join(f"inputs[{name!r}]" for name in inputs)
    tiled = f"y = x.new_empty({rows}, {width})\nfor i in range(0, {width}, {size}):\n    y[:, i : i + {size}] = {part}\nreturn y"
    return {"kind": "equal", "inputs": inputs, "first": f"{unpack}\nreturn {whole}", "second": f"{unpack}\n{tiled}"}


def _matmul_shape(graph: Graph, op: Op) -> tuple[int, int, int]:
    first = graph.value[op.args[MATMULS[op.target] - 1].name]
    result = graph.value[op.outputs[0] or ""]
    return first.shape[0], first.shape[1], result.shape[1]
