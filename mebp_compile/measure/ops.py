"""Time and workspace of single ops, and bit-equality, measured in a child interpreter.

`measure_ops` runs here; `measure` runs in the child. Arguments travel as JSON (see `requests`).
"""

from __future__ import annotations

import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mebp_compile.errors import MeasureError
from mebp_compile.measure.accelerator import Accelerator, accelerator_of
from mebp_compile.measure.child import ChildDied, run_child
from mebp_compile.measure.device_ops import memory_of_call, time_of_call
from mebp_compile.measure.equality import COMPARISONS
from mebp_compile.measure.malloc_meter import MallocMeter, library_path
from mebp_compile.measure.process import set_malloc_thresholds
from mebp_compile.measure.requests import decode, find_op

TIME_PER_OP_US = 20_000.0
RUNS_AGAIN = 3
MOST_RUNS = 50
PATIENCE, AGREEMENT = 4, 1.1
LARGE_OP_US = 50_000.0

Json = dict[str, Any]


def measure_ops(
    requests: Sequence[Mapping[str, Any]],
    threads: int | None = None,
    timeout_s: float = 600.0,
    fresh_pages: bool = False,
    imports: Sequence[str] = (),
) -> dict[str, Json]:
    """One result per request's "key", measured in one child with `threads` (default: this process's
    torch.get_num_threads()).

    A request is {"key", "target": "aten.mm.default", "args": [...], "kwargs": {...}}; with "out": [tensors] and
    "out_names": [names] the op gets those as keyword arguments and its workspace is all that malloc gives during the
    call. Its result: {"time_us", "runs", "workspace_bytes", "retained_bytes", "once_bytes", "outputs": [{"shape",
    "stride", "dtype", "new_bytes"}]} where workspace_bytes is malloc's peak in the op beyond its retained_bytes (new
    storages; malloc's rounding of up to a page each is in it), once_bytes is what the first call left behind; both
    are None where the malloc meter is not built. "between_bytes": n touches so much other memory before each call. A
    request {"key", "kind": "equal", "inputs": {name: value}, "first": source, "second": source} compares two function
    bodies over `torch` and `inputs` in raw bytes: {"equal": bool, "difference": text}; the kinds "equal_blocks" and
    "equal_product" compare an op on all rows with it in blocks (see `equality`). A request that fails, or kills the
    child, gives {"error": text}. `fresh_pages` makes malloc return memory at once, so that time_us includes the page
    faults of every output. `imports` names modules that register ops. "device": "cuda:0" in a request is where the op runs; its tensors say
    where they are ("tensor": {..., "device": "cuda:0"}). Raises MeasureError when the child can't run at all or takes more than `timeout_s`.
    """
    keys = [str(request["key"]) for request in requests]
    if len(set(keys)) != len(keys):
        raise MeasureError("two requests have the same key", "give each request a key of its own")
    common = {"threads": threads or torch.get_num_threads(), "fresh_pages": fresh_pages, "imports": list(imports)}
    return _measure_surely(list(requests), common, timeout_s)


def _measure_surely(requests: list[Mapping[str, Any]], common: Json, timeout_s: float) -> dict[str, Json]:
    """A child that dies takes its answers along: measure the halves apart until the request that kills it stands
    alone.
    """
    if not requests:
        return {}
    try:
        answer = run_child(
            __name__,
            "measure",
            {**common, "requests": requests},
            preload_malloc=library_path() is not None,
            timeout_s=timeout_s,
            threads=common["threads"],
        )
    except ChildDied as error:
        if len(requests) == 1:
            return {str(requests[0]["key"]): {"error": str(error)}}
        half = len(requests) // 2
        halves = (requests[:half], requests[half:])
        return {key: value for part in halves for key, value in _measure_surely(part, common, timeout_s).items()}
    results: dict[str, Json] = answer["results"]
    return results


def measure(request: Json) -> Json:
    """In the child: {"requests": [...], "threads", "fresh_pages", "imports"} -> {"results": {key: result}}."""
    torch.set_num_threads(request["threads"])
    if request["fresh_pages"]:
        set_malloc_thresholds()
    for name in request["imports"]:
        importlib.import_module(name)
    gc.disable()
    gc.freeze()  # a collection after each op looks at what that op left, not at all of torch
    with torch.no_grad():
        results = {str(each["key"]): _measure_one(each) for each in request["requests"]}
        for each in request["requests"]:
            _measure_again(each, results[str(each["key"])])
        return {"results": results}


def _measure_again(request: Json, result: Json) -> None:
    """A few calls of an op at another time: what disturbed the first ones, all of them alike, is over by then."""
    if 0 < result.get("time_us", 0) <= LARGE_OP_US and not request.get("device"):
        call, _ = _decoded(request)
        call()
        before = _other_work(request.get("between_bytes", 0))
        result["time_us"] = min(result["time_us"], statistics.median(_sample(call, before) for _ in range(RUNS_AGAIN)))
        result["runs"] += RUNS_AGAIN


def _measure_one(request: Json) -> Json:
    try:
        torch.manual_seed(0)
        return COMPARISONS.get(request.get("kind", ""), _measure_op)(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


# ---- ops ----


def _measure_op(request: Json) -> Json:
    call, given = _decoded(request)
    accelerator = accelerator_of(request.get("device", ""))
    memory_of = _malloc_of if accelerator is None else functools.partial(_memory_on, accelerator)
    once_bytes, _ = memory_of(call, given, warm=False)
    workspace_bytes, outputs = memory_of(call, given, warm=True)
    retained_bytes = sum(storage.nbytes() for storage in _new_storages(outputs, given))
    described = [_describe(tensor, given) for tensor in tree_leaves(outputs) if isinstance(tensor, torch.Tensor)]
    del outputs
    if accelerator is None:
        time_us, runs = _time_and_runs(call, _other_work(request.get("between_bytes", 0)))
    else:
        time_us, runs = time_of_call(accelerator, call)
    return {
        "time_us": time_us,
        "runs": runs,
        "workspace_bytes": workspace_bytes,
        "retained_bytes": retained_bytes,
        "once_bytes": once_bytes,
        "outputs": described,
    }


def _memory_on(accelerator: Accelerator, call: Callable[[], Any], given: set[int], warm: bool) -> tuple[int | None, Any]:
    """What `_malloc_of` says, of an accelerator's allocator."""
    peak_bytes, after_bytes, outputs = memory_of_call(accelerator, call)
    beyond_bytes = peak_bytes if warm else after_bytes
    return max(0, beyond_bytes - sum(storage.nbytes() for storage in _new_storages(outputs, given))), outputs


def _decoded(request: Json) -> tuple[Callable[[], Any], set[int]]:
    """The call that a request describes, and the storages that it is given."""
    op = find_op(request["target"])
    args = decode(request.get("args", []))
    kwargs = {name: decode(value) for name, value in request.get("kwargs", {}).items()}
    out = decode(request.get("out", []))
    kwargs |= dict(zip(request.get("out_names", ["out"] * bool(out)), out, strict=True))
    return lambda: op(*args, **kwargs), {storage._cdata for storage in _storages((args, kwargs))}


def _malloc_of(call: Callable[[], Any], given: set[int], warm: bool) -> tuple[int | None, Any]:
    """Bytes malloced by one call beyond its outputs: at the peak if `warm`, else what stays afterwards. None without
    the meter.
    """
    if not MallocMeter.available():
        return None, call()
    meter = MallocMeter()
    before_bytes = meter.reset_peak()
    outputs = call()
    peak_bytes, after_bytes = meter.peak_bytes, meter.live_bytes
    beyond_bytes = (peak_bytes if warm else after_bytes) - before_bytes
    return max(0, beyond_bytes - sum(storage.nbytes() for storage in _new_storages(outputs, given))), outputs


def _time_and_runs(call: Callable[[], Any], before: Callable[[], object]) -> tuple[float, int]:
    """The time of one call including the freeing of its outputs, and the number of calls; `before` each of them is not timed.

    The first quartile: what else the machine does only adds time, on shared cores up to a thousandfold (two OpenMP threads that wait for one
    core), and says nothing about the op; but a step meets the ordinary call, not the luckiest, and predictions from the shortest times were a
    tenth too low. A minimum that no second call comes near is not believed yet: where others work on the machine, calls go on until two agree,
    or for PATIENCE times as long.
    """
    began_ns = time.perf_counter_ns()
    samples = [_sample(call, before)]
    each_us = (time.perf_counter_ns() - began_ns) / 1000  # with what comes before it
    runs = 2 if samples[0] > LARGE_OP_US else max(5, min(MOST_RUNS, int(TIME_PER_OP_US / max(each_us, 1.0))))
    samples += [_sample(call, before) for _ in range(runs - 1)]
    patient_until_ns = began_ns + (1 + PATIENCE) * max(int(TIME_PER_OP_US * 1000), time.perf_counter_ns() - began_ns)
    while not _agree(samples) and time.perf_counter_ns() < patient_until_ns:
        samples.append(_sample(call, before))
    return sorted(samples)[len(samples) // 4], len(samples)


def _sample(call: Callable[[], Any], before: Callable[[], object]) -> float:
    before()
    return _time_us(call)


def _other_work(size_bytes: int) -> Callable[[], object]:
    """What comes before each call: other memory goes through the caches, as it does in a step."""
    memory = _other_memory(size_bytes)
    return lambda: memory.add_(1)


@functools.lru_cache(maxsize=1)
def _other_memory(size_bytes: int) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)


def _agree(samples: list[float]) -> bool:
    """Whether two calls were about as fast as the fastest."""
    least, second = sorted(samples)[:2]
    return second <= least * AGREEMENT + 1.0


def _time_us(call: Callable[[], Any]) -> float:
    start_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start_ns) / 1000


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


def _new_storages(outputs: Any, given: set[int]) -> list[torch.UntypedStorage]:
    return list({s._cdata: s for s in _storages(outputs) if s._cdata not in given}.values())


def _describe(tensor: torch.Tensor, given: set[int]) -> Json:
    storage = tensor.untyped_storage()
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "new_bytes": 0 if storage._cdata in given else storage.nbytes(),
    }
