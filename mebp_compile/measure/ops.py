"""Time and workspace of single ops, and bit-equality of two programs, measured in a child interpreter.

`measure_ops` runs here; `measure` runs in the child. Arguments travel as JSON:
tensors {"tensor": {"shape": [2, 3], "stride": [3, 1], "dtype": "bfloat16", "fill": "normal"}}, with fill "normal",
"zeros", "ones", "index:<max>" (integers in [0, max)) or "mask" (bool, or 0 and -inf); {"dtype": "float32"},
{"device": "cpu"}, {"memory_format": "channels_last"}, {"layout": "strided"}; lists as lists; scalars and null plain.
Stride, dtype and fill may be left out (contiguous, float32, normal).
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mebp_compile.errors import MeasureError
from mebp_compile.measure.child import ChildDied, run_child
from mebp_compile.measure.malloc_meter import MallocMeter, library_path
from mebp_compile.measure.memory import memory_of
from mebp_compile.measure.process import set_malloc_thresholds

TIME_PER_OP_US = 20_000.0
RUNS_AGAIN = 3
MOST_RUNS = 50
PATIENCE, AGREEMENT = 4, 1.1
LARGE_OP_US = 50_000.0
PATTERN_ELEMENTS = 1 << 20
PART_BYTES = 16 << 20  # compared at a time
OP_FIX = "check the op's name and arguments against torch.ops"

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
    bodies over `torch` and `inputs` in raw bytes: {"equal": bool, "difference": text}. A request that fails, or kills
    the child, gives {"error": text}. `fresh_pages` makes malloc return memory at once, so that time_us includes the
    page faults of every output. `imports` names modules that register ops. Raises MeasureError when the child can't
    run at all or takes more than `timeout_s`.
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
    with torch.no_grad():
        results = {str(each["key"]): _measure_one(each) for each in request["requests"]}
        for each in request["requests"]:
            _measure_again(each, results[str(each["key"])])
        return {"results": results}


def _measure_again(request: Json, result: Json) -> None:
    """A few calls of an op at another time: what disturbed the first ones, all of them alike, is over by then."""
    if 0 < result.get("time_us", 0) <= LARGE_OP_US:
        call, _ = _decoded(request)
        call()
        before = _other_work(request.get("between_bytes", 0))
        result["time_us"] = min(result["time_us"], statistics.median(_sample(call, before) for _ in range(RUNS_AGAIN)))
        result["runs"] += RUNS_AGAIN


def _measure_one(request: Json) -> Json:
    try:
        torch.manual_seed(0)
        return _compare_programs(request) if request.get("kind") == "equal" else _measure_op(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


# ---- ops ----


def _measure_op(request: Json) -> Json:
    call, given = _decoded(request)
    once_bytes, _ = _malloc_of(call, given, warm=False)
    workspace_bytes, outputs = _malloc_of(call, given, warm=True)
    retained_bytes = sum(storage.nbytes() for storage in _new_storages(outputs, given))
    described = [_describe(tensor, given) for tensor in tree_leaves(outputs) if isinstance(tensor, torch.Tensor)]
    del outputs
    time_us, runs = _time_and_runs(call, _other_work(request.get("between_bytes", 0)))
    return {
        "time_us": time_us,
        "runs": runs,
        "workspace_bytes": workspace_bytes,
        "retained_bytes": retained_bytes,
        "once_bytes": once_bytes,
        "outputs": described,
    }


def _decoded(request: Json) -> tuple[Callable[[], Any], set[int]]:
    """The call that a request describes, and the storages that it is given."""
    op = _find_op(request["target"])
    args = decode(request.get("args", []))
    kwargs = {name: decode(value) for name, value in request.get("kwargs", {}).items()}
    out = decode(request.get("out", []))
    kwargs |= dict(zip(request.get("out_names", ["out"] * bool(out)), out, strict=True))
    return lambda: op(*args, **kwargs), {storage._cdata for storage in _storages((args, kwargs))}


def _find_op(target: str) -> Callable[..., Any]:
    """torch.ops.aten.mm.default from "aten.mm.default"."""
    found: Any = torch.ops
    for name in target.split("."):
        try:
            found = getattr(found, name)
        except (AttributeError, RuntimeError) as error:
            raise MeasureError(f"there is no op {target}", OP_FIX) from error
    if not isinstance(found, torch._ops.OpOverload):
        raise MeasureError(f"{target} is no overload", 'name one, such as "aten.mm.default"')
    return found


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
    patience_us = PATIENCE * max(TIME_PER_OP_US, sum(samples))
    while not _agree(samples) and sum(samples) < patience_us:
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


# ---- arguments ----


def tensor_spec(tensor: torch.Tensor, fill: str = "normal") -> Json:
    """The JSON form of a tensor's geometry (real, fake or meta) with a fill, as an argument of a request."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"tensor": {"shape": list(tensor.shape), "stride": list(tensor.stride()), "dtype": dtype, "fill": fill}}


def decode(value: Any) -> Any:
    """The argument for one JSON value; see the module's text for the forms. Raises MeasureError on an unknown form."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind == "tensor" and isinstance(inner, dict):
        return _make_tensor(**inner)
    if kind == "device" and isinstance(inner, str):
        return torch.device(inner)
    if kind in ("dtype", "memory_format", "layout") and isinstance(inner, str):
        return _torch_constant(inner)
    raise MeasureError(
        f"an argument {value!r} has no known form", 'use "tensor", "dtype", "device", "memory_format" or "layout"'
    )


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
        raise MeasureError(f"torch.{name} is no dtype, memory format or layout", 'use a name such as "bfloat16"')
    return found


def _make_tensor(
    shape: Sequence[int], stride: Sequence[int] | None = None, dtype: str = "float32", fill: str = "normal"
) -> torch.Tensor:
    """A tensor with exactly the storage its geometry needs, filled from a repeated pattern of a million elements at
    most.
    """
    if stride is None:
        stride = torch.empty(tuple(shape), device="meta").stride()
    elements = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    base = torch.empty(elements, dtype=_torch_constant(dtype))
    if elements:
        pattern = _pattern(min(elements, PATTERN_ELEMENTS), base.dtype, fill)
        for start in range(0, elements, PATTERN_ELEMENTS):
            part = base[start : start + PATTERN_ELEMENTS]
            part.copy_(pattern[: part.numel()])
    return base.as_strided(tuple(shape), tuple(stride))


def _pattern(elements: int, dtype: torch.dtype, fill: str) -> torch.Tensor:
    if fill == "zeros" or fill == "ones":
        return torch.full((elements,), float(fill == "ones")).to(dtype)
    if fill.startswith("index:"):
        return torch.randint(0, max(1, int(fill.removeprefix("index:"))), (elements,)).to(dtype)
    if fill == "mask":
        kept = torch.rand(elements) < 0.5
        return kept if dtype is torch.bool else torch.where(kept, 0.0, float("-inf")).to(dtype)
    if fill != "normal":
        raise MeasureError(f"fill {fill!r} is unknown", 'use "normal", "zeros", "ones", "index:<max>" or "mask"')
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(elements).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (elements,)).to(dtype)


# ---- two programs, compared ----


def _compare_programs(request: Json) -> Json:
    """Run both on the same inputs; outputs, and inputs they changed, must agree in every byte, shape and dtype.

    At the shapes of a real vocabulary the inputs are what takes memory, so only one set of them exists at a time: the second program
    gets new ones, drawn from the same seed, and of what the programs left of them only digests are compared.
    """
    (left, left_inputs), (right, right_inputs) = (_run_program(request[which], request["inputs"]) for which in ("first", "second"))
    if len(left) != len(right):
        return {"equal": False, "difference": f"{len(left)} against {len(right)} tensors"}
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if difference := _difference(a, b):
            return {"equal": False, "difference": f"tensor {index}: {difference}"}
    changed = [name for name, digest in left_inputs.items() if digest != right_inputs[name]]
    return {"equal": not changed, "difference": f"the programs leave {', '.join(changed)} differently" if changed else ""}


def _run_program(source: str, arguments: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict[str, str]]:
    """The tensors a function body returns, and a digest of each input tensor as it left it. The source is this package's own text."""
    scope: Json = {}
    exec(
        compile(f"def program(torch, inputs):\n{textwrap.indent(textwrap.dedent(source), '    ')}", "<equal>", "exec"),
        scope,
    )
    torch.manual_seed(0)
    inputs = {name: decode(value) for name, value in arguments.items()}
    result = scope["program"](torch, inputs)
    if result is None:
        raise MeasureError("a program returned nothing", "end its source with `return`")
    given = {tensor.untyped_storage()._cdata for tensor in inputs.values() if isinstance(tensor, torch.Tensor)}
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    outputs = [leaf.clone() if leaf.untyped_storage()._cdata in given else leaf for leaf in outputs]
    return outputs, {name: _digest(tensor) for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}


def _digest(tensor: torch.Tensor) -> str:
    """Of the raw bytes of a tensor's whole storage, without a copy."""
    return hashlib.blake2b(memory_of(tensor.untyped_storage())).hexdigest()


def _difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """ "" if equal in shape, dtype and raw bytes (NaN and -0.0 included), else what differs."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    parts = zip(a.split(PART_BYTES), b.split(PART_BYTES), strict=True)
    unequal = sum(int((x != y).sum()) for x, y in parts)
    return f"{unequal} of {a.numel()} bytes differ" if unequal else ""
