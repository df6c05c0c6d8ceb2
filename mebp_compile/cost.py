"""Costs: microseconds and workspace of every op of a graph, and the speed of the disk, on this machine.

Each distinct call (op, shapes, strides, dtypes, constants) is measured once in a spawned child and kept in the cache folder, in a file
named after everything that a time depends on. The same child checks which tilings of a matmul are bit-equal at the very shapes used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mebp_compile import kernels, quant
from mebp_compile.chunk_check import block_checks, proven
from mebp_compile.chunk_cost import Requests, chunk_requests, price_chunks, touched_bytes
from mebp_compile.config import Options, cache_dir
from mebp_compile.errors import CacheError
from mebp_compile.graph import CHUNKS, Arg, Const, Graph, LoopChoice, Op, Ref, inputs_of
from mebp_compile.loop_cost import TileRequests, dequantise_request, loop_requests, price_loop
from mebp_compile.lower.stream import Record
from mebp_compile.measure import cached_read
from mebp_compile.measure.accelerator import accelerator_of
from mebp_compile.measure.device_ops import measure_link
from mebp_compile.measure.disk import measure_disk
from mebp_compile.measure.interference import measure_interference
from mebp_compile.measure.ops import measure_ops
from mebp_compile.planning import Costs, OpCost
from mebp_compile.torch_private import multiplies_bfloat16
from mebp_compile.whole_file import write_whole

BETWEEN_BYTES = 24 << 20  # what else goes through the caches between an op and the one that made its inputs, about: see decision 12
CACHES_BYTES = 96 << 20  # more than the caches of a core hold: the codes come from disk, and the weight is as large as a cache
CALL_US = 2  # what Python needs to make any call
ROW_US = 10  # one row of a table, read from disk and dequantised
SORT_BYTES = 96  # for each id: its sorted copy, permutation, inverse and their scratch
LOOK_UP_BYTES = 65536
LOOP_BYTES_PER_US = 1000.0  # what a Loop reads from a store where no folder of the step's own says how fast its disk is
AT_ONCE = 128  # requests that one child measures: what is known by then is kept
Json = dict[str, Any]
Progress = Callable[[str], None] | None
FILLED_LIKE = {"bool": "mask", "uint8": "index:16", "int64": "index:2", "int32": "index:2"}


def measure_costs(
    graph: Graph, options: Options, records: dict[str, Record] | None = None, progress: Progress = None
) -> tuple[Costs, Graph]:
    """Measured costs by op name, and the graph with each Loop's menu priced and reduced to the tilings proven bit-equal here; on an accelerator,
    where none is proven, without menus."""
    table = CostTable(graph.device)
    if graph.device:
        graph = replace(graph, ops=tuple(replace(op, menu=(), body=None) if op.menu else op for op in graph.ops))
    wanted = {op.name: _request(graph, op, records or {}) for op in graph.ops if op.target != CHUNKS}
    loops = {op.name: loop_requests(graph, op, records or {}) for op in graph.ops if op.menu and op.target != CHUNKS}
    ask = _asking(graph, records or {})
    regions = {op.name: chunk_requests(op, ask) for op in graph.ops if op.target == CHUNKS}
    exact = options.numerics == "exact"
    checks = {op.name: block_checks(op, ask) for op in graph.ops if op.target == CHUNKS and exact}
    asked = [each for tiles in loops.values() for tile in tiles.values() for each in (tile.work, tile.make, tile.check)]
    blocks = [request for requests in regions.values() for block in requests.values() for request in block.values()]
    compared = [check for each in checks.values() for check in each.values()]
    results = table.lookup([*wanted.values(), *asked, *blocks, *compared], progress)
    costs = {op.name: _op_cost(graph, op, results, wanted[op.name], records or {}) for op in graph.ops if op.name in wanted}
    for op in (op for op in graph.ops if op.name in regions):
        whole = _priced_blocks(op, LoopChoice(1, op.reads), regions[op.name], results)
        costs[op.name] = OpCost(whole.time_us, whole.workspace_bytes)
    disk = table.disk(options.offload_dir) if options.offload_dir is not None else table.link() if options.host_bytes is not None else None
    read_speed = disk["read"] if disk else LOOP_BYTES_PER_US
    ops = tuple(replace(op, menu=_priced(graph, op, loops[op.name], results, read_speed)) if op.name in loops else op for op in graph.ops)
    ops = tuple(
        replace(op, menu=_priced_choices(op, regions[op.name], checks.get(op.name, {}), results)) if op.name in regions else op
        for op in ops
    )
    speeds = {} if disk is None else {
        "read_bytes_per_us": disk["read"],
        "write_bytes_per_us": disk["write"],
        "latency_us": int(disk["latency"]),
        "interference": disk["interference"],
    }
    menus = [[[tile.work] for tile in tiles.values()] for tiles in loops.values()]
    menus += [[list(block.values()) for block in requests.values()] for requests in regions.values()]
    kernels = _kernel_bytes(results, wanted.values(), menus)
    return Costs(costs, measured=True, kernel_bytes=kernels, **speeds), replace(graph, ops=ops)


def _kernel_bytes(results: Mapping[str, Json], requests: Iterable[Json | None], menus: Iterable[list[list[Json]]]) -> int:
    """What the ops leave behind in a process for good at their first call: the code that oneDNN compiles for each distinct matmul, mostly.
    Of a Loop, given as the requests of each of its choices, the choice that leaves most counts."""

    def once_bytes(request: Json) -> int:
        return int(results.get(_key(request), {}).get("once_bytes") or 0)

    largest = [max(choices, key=lambda tile: sum(map(once_bytes, tile))) for choices in menus if choices]
    looped = [request for tile in largest for request in tile]
    distinct = {_key(request): once_bytes(request) for request in (*requests, *looped) if request is not None}
    return sum(distinct.values())


# --- what is asked of the child ---


def _request(graph: Graph, op: Op, records: dict[str, Record]) -> Json | None:
    """The measurement of one op, or None for what costs no more than its call."""
    if op.target.startswith("py.") or op.target == "aten._local_scalar_dense.default":
        return None
    if op.target == "run.dequantise":
        return _placed(_dequantise_request(graph, op, records), graph.device)
    if op.target in ("run.embedding", "run.table_rows"):
        return None
    request: Json = {
        "target": op.target,
        "args": [_encode(graph, arg) for arg in op.args],
        "kwargs": {key: _encode(graph, arg) for key, arg in op.kwargs},
        "between_bytes": BETWEEN_BYTES,
    }
    if op.out and op.out_target.startswith(("aten.", "mebp.")):
        request |= {"target": op.out_target, "out": [_tensor(graph, name or "") for name in op.outputs], "out_names": list(op.out)}
    return _placed(request, graph.device)


def _placed(request: Json, device: str) -> Json:
    """The request with its tensors on the step's device, but for those that say where they are."""

    def placed(part: Any) -> Any:
        if isinstance(part, list):
            return [placed(each) for each in part]
        if isinstance(part, dict) and "tensor" in part:
            return {"tensor": {"device": device, **part["tensor"]}}
        return {key: placed(each) for key, each in part.items()} if isinstance(part, dict) else part

    return {**placed(request), "device": device} if device else request


def _asking(graph: Graph, records: dict[str, Record]) -> Callable[[Graph, Op], Json | None]:
    """The measurement of an op of a region's body; the weights that it makes are the graph's."""
    return lambda body, op: _request(graph if op.target == "run.dequantise" else body, op, records)


def _dequantise_request(graph: Graph, op: Op, records: dict[str, Record]) -> Json:
    value = graph.value[op.outputs[0] or ""]
    record = records[graph.storages[graph.storage_of(op.args[1].name)].source.replace("weight:", "parameter:", 1)]
    return {**dequantise_request(record, record.codes_shape[0], value), "between_bytes": CACHES_BYTES}


def _encode(graph: Graph, arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return 0.5 if graph.value[arg.name].dtype == "number" else _tensor(graph, arg.name)
    if isinstance(arg, Const):
        return {arg.kind: arg.name}
    if isinstance(arg, tuple):
        return [_encode(graph, part) for part in arg]
    return arg


def _tensor(graph: Graph, name: str) -> Json:
    value = graph.value[name]
    spec = {"shape": list(value.shape), "stride": list(value.stride), "dtype": value.dtype}
    where = {"device": "cpu"} if graph.storages and graph.storages[value.storage].on_host else {}
    return {"tensor": {**spec, "fill": FILLED_LIKE.get(value.dtype, "normal"), **where}}


# --- what comes back ---


def _op_cost(graph: Graph, op: Op, results: dict[str, Json], request: Json | None, records: dict[str, Record]) -> OpCost:
    """Of one op as measured; by its own rule for a lookup on disk; and where the op alone could not be measured, with room for all
    that it touches."""
    if op.target in ("run.embedding", "run.table_rows"):
        return _look_up_cost(graph, op, records)
    if request is None or "error" not in results.get(_key(request), {}):
        return _cost(results, request)
    touched = {graph.storage_of(name) for name in (*inputs_of(op), *(name for name in op.outputs if name))}
    return OpCost(CALL_US, sum(graph.storages[storage].size_bytes for storage in touched))


def _look_up_cost(graph: Graph, op: Op, records: dict[str, Record]) -> OpCost:
    """Rows of a table on disk: the dense and, where they are, the packed rows, and what sorting the ids for `torch.unique` takes; each row is
    a small read."""
    count = math.prod(graph.value[op.args[1].name].shape)
    dense_bytes, packed_bytes = graph.storages[op.creates[0]].size_bytes, 0
    if op.target == "run.embedding":
        packed = next(storage for storage in graph.storages if storage.role == "weight" and storage.name == f"{op.args[0]}_packed")
        record = records[packed.source.replace("weight:", "parameter:", 1)]
        packed_bytes = -(-record.size_bytes // record.codes_shape[0]) * count
    return OpCost(CALL_US + ROW_US * count, dense_bytes + packed_bytes + SORT_BYTES * count + LOOK_UP_BYTES)


def _cost(results: dict[str, Json], request: Json | None) -> OpCost:
    answer = results.get(_key(request), {}) if request else {}
    return OpCost(CALL_US + int(answer.get("time_us") or 0), int(answer.get("workspace_bytes") or 0))


def _priced(
    graph: Graph, op: Op, requests: dict[int, TileRequests], results: dict[str, Json], read_bytes_per_us: float
) -> tuple[LoopChoice, ...]:
    """The choices of an op's menu that were measured, and are bit-equal here where they must be, each with its workspace and time."""
    priced = []
    for choice in op.menu:
        tile = requests[choice.trips]
        if "error" in results[_key(tile.work)] or (tile.check and not results[_key(tile.check)].get("equal")):
            continue
        one, make = _cost(results, tile.work), _cost(results, tile.make)
        priced.append(price_loop(graph, op, choice, one.time_us / tile.tiles, make.time_us, one.workspace_bytes, read_bytes_per_us))
    return tuple(priced)


def _priced_choices(
    op: Op, requests: dict[int, Requests], checks: dict[str, Json | None], results: dict[str, Json]
) -> tuple[LoopChoice, ...]:
    """The choices of a region's menu, priced: those whose ops were all found to leave the bits of the whole, as far as `checks` asks."""
    equal = {name: results[_key(check)].get("equal", []) if check else [] for name, check in checks.items()}
    taken = [choice for choice in op.menu if proven(op, choice, equal)]
    return tuple(_priced_blocks(op, choice, requests, results) for choice in taken)


def _priced_blocks(op: Op, choice: LoopChoice, requests: dict[int, Requests], results: dict[str, Json]) -> LoopChoice:
    """A region's choice with its workspace and time; an op of a block that could not be measured takes room for all that the op touches."""
    costs = {}
    for name, request in requests[choice.trips].items():
        one = _cost(results, request)
        failed = "error" in results[_key(request)]
        costs[name] = (one.time_us, touched_bytes(op, choice.trips, name) if failed else one.workspace_bytes)
    return price_chunks(op, choice, costs)


def product_us(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """What a matrix product takes here where it is called again and again, nothing in between."""
    sizes = ((rows, inner), (inner, columns))
    args = [{"tensor": {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "fill": "normal"}} for shape in sizes]
    request = {"target": "aten.mm.default", "args": args, "kwargs": {}}
    return float(CostTable().lookup([request])[_key(request)]["time_us"])


# --- the cache ---


def fingerprint(device: str = "") -> Json:
    """All that a measured time depends on. device: the accelerator; nothing for the CPU."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    own = {
        "cpu": model,
        "bfloat16": multiplies_bfloat16(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", ""),
        "kernels": _kernels(),
        "format": 9,
    }
    accelerator = accelerator_of(device)
    return own if accelerator is None else own | {"device": accelerator.name}


def _kernels() -> list[str]:
    """Digests of the C libraries, empty for one that is not built: with another one its ops take another time."""
    built = [owner.library() for owner in (quant.native, kernels.native, kernels.fused, kernels.attention)]
    return ["" if library is None else _digest(library._name) for library in built]


@functools.cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _key(request: Json | None) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]


def _measured(requests: dict[str, Any]) -> dict[str, Json]:
    return measure_ops([{"key": key, **request} for key, request in requests.items()], imports=["mebp_compile.quant", "mebp_compile.kernels"])


def _with_zeros(request: Any) -> Any:
    """The request with integers zero: an index that is valid wherever any is."""
    if isinstance(request, dict):
        return {key: "zeros" if key == "fill" and str(value).startswith("index:") else _with_zeros(value) for key, value in request.items()}
    return [_with_zeros(item) for item in request] if isinstance(request, list) else request


def _disk_speeds(folder: Path) -> Json:
    """Of the disk itself ("cold"), and where its files are in the page cache ("cached")."""
    speed, (share, copied_per_us) = measure_disk(folder), measure_interference(folder)
    copying = min(1.0, speed.read_bytes_per_us / max(copied_per_us, 1.0))
    return {
        "cold": {
            "read": speed.read_bytes_per_us,
            "write": speed.write_bytes_per_us,
            "latency": speed.latency_us,
            "interference": share * copying,
        },
        "cached": {
            "read": speed.cached_read_bytes_per_us,
            "write": speed.cached_write_bytes_per_us,
            "latency": speed.cached_latency_us,
            "interference": share if cached_read.library() is None else 1.0,
        },
    }


class CostTable:
    """Measured results by request, kept in one JSON file a machine, and one for each kind of accelerator."""

    def __init__(self, device: str = "") -> None:
        self.device = device
        name = hashlib.sha256(json.dumps(fingerprint(device), sort_keys=True).encode()).hexdigest()[:12]
        self.path = cache_dir() / f"costs-{name}.json"
        self.known: dict[str, Json] = self._load()

    def _load(self) -> dict[str, Json]:
        try:
            return dict(json.loads(self.path.read_text())["results"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError) as error:
            message = f"the cost table {self.path} can't be read: {error}"
            raise CacheError(message, "delete it, or set MEBP_CACHE to another folder") from error

    def lookup(self, requests: Iterable[Json | None], progress: Progress = None) -> dict[str, Json]:
        """Results by key, measuring what is not known yet; what another process has measured meanwhile is known."""
        wanted = {_key(request): request for request in requests if request}
        if progress and (missing := wanted.keys() - self.known.keys()):
            progress(f"measuring {len(missing)} ops")
        while some := self._missing(wanted):
            answers = _measured(some)
            again = {key: _with_zeros(some[key]) for key, answer in answers.items() if "error" in answer}
            self.known.update(answers | (_measured(again) if again else {}))
            self._save()
        return self.known

    def _missing(self, wanted: dict[str, Json]) -> dict[str, Json]:
        """As many of the requests that are not known, by key, as one child measures."""
        if wanted.keys() - self.known.keys():
            self.known = self._load() | self.known
        return dict([item for item in wanted.items() if item[0] not in self.known][:AT_ONCE])

    def disk(self, folder: Path) -> Json:
        """What transfers to and from `folder` take: bytes a microsecond for "read" and "write", "latency" in microseconds, and the share
        "interference" of their time by which they delay compute.

        Where the system has memory to spare, files of a step stay in its page cache, and transfers are copies by the threads that would compute
        meanwhile. A transfer that waits for the disk copies no more bytes than one that does not, over a longer time.
        """
        speeds = self.remember(f"disk:{os.stat(folder).st_dev}" if folder.exists() else f"disk:{folder}", lambda: _disk_speeds(folder))
        return speeds["cached" if cached_read.files_stay_cached() else "cold"]  # type: ignore[no-any-return]

    def link(self) -> Json:
        """The same of copies between an accelerator and its host's memory."""
        accelerator = accelerator_of(self.device)
        assert accelerator is not None
        return self.remember("link", lambda: measure_link(accelerator))

    def remember(self, key: str, measure: Callable[[], Json]) -> Json:
        """What `measure` gave when it was first asked for on this machine."""
        if key not in self.known:
            self.known[key] = measure()
            self._save()
        return self.known[key]

    def _save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.known = self._load() | self.known
            write_whole(self.path, json.dumps({"machine": fingerprint(self.device), "results": self.known}))
        except OSError as error:
            message = f"the cost table {self.path} can't be written: {error}"
            raise CacheError(message, "set MEBP_CACHE to a folder that can be written") from error
