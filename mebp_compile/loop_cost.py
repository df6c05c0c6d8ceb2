"""Costs of Loops: what is measured for one tile, how a tiling is checked against the whole, and what the loop then takes.

A tile of the weight is made, used and overwritten by the next: while it is small it stays in the caches, which is what smaller tiles win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mebp_compile import openmp
from mebp_compile.graph import Graph, LoopChoice, Op, Ref, Value
from mebp_compile.lower.cuts import thread_tiles, tile_places, tile_size
from mebp_compile.lower.loss_loop import TILED_LOSS
from mebp_compile.lower.products import ADD_MULTIPLY, MATMULS, MULTIPLY, WIDENED, in_blocks
from mebp_compile.lower.stream import Record
from mebp_compile.lower.tables import itemsize
from mebp_compile.overhead import COPY_BYTES_PER_US, TRIP_US, fault_us

LOSS_ROWS = 8192  # of a head, measured at once: they fit the caches
PACKED_SLACK_BYTES = 4096
Json = dict[str, Any]


@dataclass(frozen=True)
class TileRequests:
    """What is measured of one tiling: the op on `tiles` tiles, making a tile's weight from its record (None: the record is unknown), and the
    comparison of tiles with the whole (None for an op of tier "reassociate")."""

    work: Json
    tiles: int
    make: Json | None
    check: Json | None


def loop_requests(graph: Graph, op: Op, records: Mapping[str, Record]) -> dict[int, TileRequests]:
    """What is measured, by number of trips."""
    return {choice.trips: _tile_requests(graph, op, choice.trips, records) for choice in op.menu}


def _tile_requests(graph: Graph, op: Op, trips: int, records: Mapping[str, Record]) -> TileRequests:
    inner, width, itemsize_bytes = _weight(graph, op)
    between = {"between_bytes": tile_size(width, trips) * inner * itemsize_bytes}
    loss = op.target == TILED_LOSS
    tiles = max(1, LOSS_ROWS // tile_size(width, trips)) if loss else 1
    work = _loss_tiles(graph, op, trips, tiles) if loss else _matmul_tile(graph, op, trips)
    make = _make_tile(graph, op, trips, records)
    check = None if loss or in_blocks(op.target) else _check(graph, op, trips)
    return TileRequests(work | between, tiles, make and make | between, check)


def _make_tile(graph: Graph, op: Op, trips: int, records: Mapping[str, Record]) -> Json | None:
    """As many whole rows of the weight as have the elements of a tile."""
    make = next((part for part in op.body.ops if part.name == "make"), None) if op.body is not None else None
    record = records.get(graph.storages[graph.storage_of(make.args[1].name)].source.replace("weight:", "parameter:", 1)) if make else None
    if make is None or record is None:
        return None
    inner, width, _ = _weight(graph, op)
    value = graph.value[make.args[0]]
    return dequantise_request(record, max(1, tile_size(width, trips) * inner // value.shape[1]), value)


def dequantise_request(record: Record, rows: int, value: Value) -> Json:
    """The measurement of dequantising so many rows of a record, of the dense weight `value`."""
    codes = {"tensor": {"shape": [rows, record.codes_shape[1]], "dtype": "uint8", "fill": "index:16"}}
    scales = {"tensor": {"shape": [rows, record.scales_shape[1]], "dtype": record.scales_dtype, "fill": "ones"}}
    shape = list(value.shape) if rows == record.codes_shape[0] else [rows, value.shape[-1]]
    args = [codes, scales, record.scheme, shape, {"dtype": value.dtype}]
    out = {"tensor": {"shape": shape, "dtype": value.dtype, "fill": "normal"}}
    return {"target": "mebp.dequantise.out", "args": args, "kwargs": {}, "out": [out], "out_names": ["out"]}


def price_loop(
    graph: Graph, op: Op, choice: LoopChoice, tile_us: float, make_us: int, tile_workspace_bytes: int, read_bytes_per_us: float
) -> LoopChoice:
    """The choice with the workspace and the time of the whole loop, which waits for what it reads from disk.

    tile_us: the op on a tile. make_us: its weight, dequantised. A large tile's memory is fresh in every loop, and its result's in every trip.
    """
    inner, width, itemsize = _weight(graph, op)
    size = tile_size(width, choice.trips)
    dense = size * inner * itemsize
    packed = 0 if not choice.disk_bytes else -(-choice.disk_bytes * size // width) + PACKED_SLACK_BYTES
    workspace, copied, fresh_us = dense + packed + max(tile_workspace_bytes, 4096), 0, fault_us(dense) + fault_us(packed)
    if op.target != TILED_LOSS:  # its tile's result is a new tensor, copied into its columns of the whole
        result = graph.value[op.outputs[0] or ""].shape[0] * size * itemsize
        workspace, copied, fresh_us = workspace + result, copied + result, fresh_us + choice.trips * fault_us(result)
    trip_us = tile_us + make_us + copied // COPY_BYTES_PER_US + TRIP_US
    time_us = int(choice.trips * trip_us + fresh_us + choice.disk_bytes / read_bytes_per_us)
    return replace(choice, workspace_bytes=workspace, time_us=time_us)


def _weight(graph: Graph, op: Op) -> tuple[int, int, int]:
    """(inner size, number of columns or rows that are cut into tiles, bytes of an element) of the weight of a Loop."""
    if op.target == TILED_LOSS:
        width, inner = graph.value[op.args[1].name].shape
        return inner, width, itemsize(graph.value[op.args[1].name].dtype)
    _, inner, width = _matmul_shape(graph, op)
    return inner, width, itemsize(graph.value[op.outputs[0] or ""].dtype)


def _loss_tiles(graph: Graph, op: Op, trips: int, tiles: int) -> Json:
    """The whole op on a head of so many tiles, since beginning and ending it is not what a tile takes; x and the targets are its real ones."""
    x, weight = graph.value[op.args[0].name], graph.value[op.args[1].name]
    size = tile_size(weight.shape[0], trips)
    head = {"shape": [size * tiles, weight.shape[1]], "dtype": weight.dtype}
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
    target = WIDENED if in_blocks(op.target) else MULTIPLY
    return {"target": target, "args": [first, {"tensor": second}], "kwargs": {}}


def _check(graph: Graph, op: Op, trips: int) -> Json:
    """Whole matmul against the same matmul in tiles of output columns, compared in raw bytes by the child."""
    rows, inner, width = _matmul_shape(graph, op)
    transposed = op.body is not None and op.body.ops[0].target == "run.rows"
    dtype = graph.value[op.outputs[0] or ""].dtype
    inputs = {
        "x": {"tensor": {"shape": [rows, inner], "dtype": dtype}},
        "w": {"tensor": {"shape": [width, inner] if transposed else [inner, width], "dtype": dtype}},
    }
    bias = op.target == ADD_MULTIPLY
    if bias:
        inputs["b"] = {"tensor": {"shape": [width], "dtype": dtype}}
    tile = "w[i:j].contiguous().t()" if transposed else "w[:, i:j].contiguous()"
    call = "torch.addmm(b[{1}], x, {0})" if bias else "torch.mm(x, {0})"
    whole = call.format("w.t()" if transposed else "w", ":")
    part = call.format(tile, "i:j")
    unpack = "x, w" + (", b" if bias else "") + " = " + ", ".join(f"inputs[{name!r}]" for name in inputs)
    places = tile_places(thread_tiles(width, trips, 1 if bias else openmp.threads()))
    tiled = f"y = x.new_empty({rows}, {width})\nfor i, j in {places['tiles']}:\n    y[:, i:j] = {part}\nreturn y"
    programs = {"first": f"{unpack}\nreturn {whole}", "second": f"{unpack}\n{tiled}"}
    return {"kind": "equal", "inputs": inputs, **programs, "alone": places["alone"]}


def _matmul_shape(graph: Graph, op: Op) -> tuple[int, int, int]:
    first = graph.value[op.args[MATMULS[op.target] - 1].name]
    result = graph.value[op.outputs[0] or ""]
    return first.shape[0], first.shape[1], result.shape[1]
