"""Functions that the tests of mebp_compile.measure run in child interpreters."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

from mebp_compile.errors import DiskError

Json = dict[str, Any]


def echo(request: Json) -> Json:
    print("noise on stdout", '{"answer": {}}')
    print("noise on stderr", file=sys.stderr)
    return {"request": request, "torch_loaded": "torch" in sys.modules}


def environment(request: Json) -> Json:
    return {name: os.environ.get(name) for name in request["names"]}


def raise_disk_error(request: Json) -> Json:
    raise DiskError("the disk is sad", "cheer it up")


def raise_plain(request: Json) -> Json:
    raise ZeroDivisionError("no such quotient")


def answer_text(request: Json) -> Any:
    return "not a dict"


def answer_no_json(request: Json) -> Json:
    return {"value": object()}


def kill_self(request: Json) -> Json:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def sleep(request: Json) -> Json:
    time.sleep(request["seconds"])
    return {}


def malloc_family(request: Json) -> Json:
    """Growth of the meter, in bytes, after each function of the family has given a block, and after all are freed."""
    from mebp_compile.measure.malloc_meter import MallocMeter

    libc, meter, size = ctypes.CDLL(None), MallocMeter(), request["size"]
    for name in ("malloc", "calloc", "realloc", "aligned_alloc", "memalign", "valloc", "pvalloc"):
        getattr(libc, name).restype = ctypes.c_void_p
    block = ctypes.c_void_p()
    allocate = {
        "malloc": lambda: libc.malloc(ctypes.c_size_t(size)),
        "calloc": lambda: libc.calloc(ctypes.c_size_t(size // 4), ctypes.c_size_t(4)),
        "realloc": lambda: libc.realloc(
            ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size // 8))), ctypes.c_size_t(size)
        ),
        "aligned_alloc": lambda: libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(size)),
        "memalign": lambda: libc.memalign(ctypes.c_size_t(4096), ctypes.c_size_t(size)),
        "valloc": lambda: libc.valloc(ctypes.c_size_t(size)),
        "pvalloc": lambda: libc.pvalloc(ctypes.c_size_t(size)),
        "posix_memalign": lambda: (
            libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(size)),
            block.value,
        )[1],
    }
    start, growth, blocks = meter.live_bytes, {}, []
    for name, function in allocate.items():
        before = meter.live_bytes
        blocks.append(function())
        growth[name] = meter.live_bytes - before
    for address in blocks:
        libc.free(ctypes.c_void_p(address))
    return {"growth": growth, "left": meter.live_bytes - start}


def malloc_tensors(request: Json) -> Json:
    """Live and peak growth around a tensor of known size, and what 4 threads of churn leave behind."""
    import torch

    from mebp_compile.measure.malloc_meter import MallocMeter

    meter = MallocMeter()
    before = meter.reset_peak()
    tensor = torch.empty(request["size"], dtype=torch.uint8)
    grown = meter.live_bytes - before
    del tensor
    answer = {"grown": grown, "freed": meter.live_bytes - before, "peak": meter.peak_bytes - before}

    def churn() -> None:
        for size in range(1, 2000):
            torch.empty(size * 64, dtype=torch.uint8)

    before = meter.live_bytes
    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        **answer,
        "churn_left": meter.live_bytes - before,
        "peak_after_reset": meter.reset_peak() - meter.peak_bytes,
    }


def training_step(request: Json) -> Json:
    """Peaks of one warm AdamW step, above what was live before it: by the storage meter and by the malloc meter."""
    import torch

    from mebp_compile.measure.malloc_meter import MallocMeter
    from mebp_compile.measure.meter import StorageMeter

    torch.manual_seed(0)
    width, batch = request["width"], request["batch"]
    layers = [torch.nn.Linear(width, width) if i % 2 == 0 else torch.nn.GELU() for i in range(8)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(batch, width)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    malloc = MallocMeter()
    before = malloc.reset_peak()
    step()
    malloc_peak = malloc.peak_bytes - before
    with StorageMeter() as storages:
        step()
    return {"malloc": malloc_peak, "storages": storages.peak_bytes, "op": storages.peak_op}


def thresholds(request: Json) -> Json:
    """RssAnon growth after every second of many blocks above the threshold is freed, so that the heap can't shrink."""
    from mebp_compile.measure.process import malloc_trim, rss, set_malloc_thresholds

    accepted = set_malloc_thresholds(65536, 65536) if request["set"] else True
    base = rss().anon_bytes
    blocks = [bytearray(b"x") * 100_000 for _ in range(400)]
    full = rss().anon_bytes - base
    del blocks[:-1:1]
    return {"accepted": accepted, "full": full, "left": rss().anon_bytes - base, "trim": malloc_trim()}


def holes(request: Json) -> Json:
    """Where blocks lie that a heap with holes is asked for, after those were trimmed or closed; and RssAnon before and after that."""
    import random

    from mebp_compile.measure.heap_holes import close_holes
    from mebp_compile.measure.process import malloc_trim, rss

    sizes = random.Random(0)
    blocks = [bytearray(b"x") * sizes.randrange(20_000, 100_000) for _ in range(2000)]
    full = rss().anon_bytes
    kept = blocks[::10]
    del blocks
    taken = [close_holes() for _ in range(request["closed"])]
    malloc_trim()
    trimmed = rss().anon_bytes
    end = max(map(_address, kept))
    new = [bytearray(b"y") * sizes.randrange(8_000, 100_000) for _ in range(400)]
    in_holes = sum(_address(block) < end for block in new)
    intact = all(b"x" * len(block) == block for block in kept) and all(b"y" * len(block) == block for block in new)
    return {"taken": taken, "full": full, "trimmed": trimmed, "in_holes": in_holes, "intact": intact}


def _address(block: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def limited(request: Json) -> Json:
    """What a large allocation does inside and after `limit_data`."""
    import resource

    import torch

    from mebp_compile.measure.process import limit_data, rss

    torch.ones(64, 64) @ torch.ones(64, 64)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    refused = ""
    with limit_data(rss().data_bytes + request["headroom"]):
        small = torch.ones(request["headroom"] // 4, dtype=torch.uint8).numel()
        try:
            torch.ones(4 * request["headroom"], dtype=torch.uint8)
        except RuntimeError as error:
            refused = str(error)
    after = torch.ones(4 * request["headroom"], dtype=torch.uint8).numel()
    restored = resource.getrlimit(resource.RLIMIT_DATA) == before
    return {"small": small, "refused": refused, "after": after, "restored": restored}
