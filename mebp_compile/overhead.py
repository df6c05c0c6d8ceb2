"""What a tensor costs beyond its bytes: the one place that knows malloc's rounding and torch's objects. Torch-free.

The budget is about memory, and every tensor also takes malloc's header and rounding, a TensorImpl and a StorageImpl; every view one more
TensorImpl. None of it is much, but thousands of tensors are. The scheduling problem therefore holds *charged* bytes for what a step
allocates: the storage's own bytes and this overhead, as an upper bound. What exists before the step is charged as it is.

Measured with the malloc meter (torch 2.13, glibc 2.36, no_grad): a tensor of n bytes takes n + 312 to n + 355 from the heap;
where malloc maps it on its own (128 KiB and more, at first) its end is rounded up to a page; a view takes 497 bytes with up to 5
dimensions and 617 with more.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection

from mebp_compile.graph import PERSISTENT, Graph

TENSOR_BYTES = 384
VIEW_BYTES = 640
RNG_STATE_BYTES = 5504  # one saved state of the generator: 5,056 bytes and its tensor
STEP_BYTES = 16384  # of Python's own: frames, results, hyper-parameters
MAPPED_BYTES = 128 << 10
PAGE_BYTES = mmap.PAGESIZE
FRESH_BYTES = 4 << 20  # blocks from here on malloc maps and gives back at once where the budget is tight, see `mapped_bytes`
LEAST_FRESH_BYTES = 512 << 10
HOLES = 24  # a small budget of this many blocks that malloc keeps
SMALL_BUDGET_BYTES = 16_000_000  # above it that costs more page faults than steps of real models can bear
DEVICE_BLOCK_BYTES = 512  # an accelerator's allocator gives multiples of this
FAULT_US_PER_BYTE = 4e-4  # of a fresh page: 0.5 s of system time for 300,000 pages of 4 KiB
COPY_BYTES_PER_US = 8000  # of a tile's result into its place
TRIP_US = 40  # what Python needs for a tile of a product: 0.3 ms for the 7 of one of Qwen2.5-0.5B's MLP


def allocated_bytes(size_bytes: int, device: str = "") -> int:
    """What malloc takes for a tensor of `size_bytes`, at most, its objects included; on an accelerator, whose memory has no objects in it, what its
    allocator takes."""
    if device:
        return -(-size_bytes // DEVICE_BLOCK_BYTES) * DEVICE_BLOCK_BYTES
    if size_bytes < MAPPED_BYTES:
        return size_bytes + TENSOR_BYTES
    return -(-(size_bytes + 64) // PAGE_BYTES) * PAGE_BYTES + TENSOR_BYTES


def mapped_bytes(budget_bytes: int) -> int:
    """From which size on malloc maps blocks and gives them back at once, where the budget is tight: at a small budget the holes that smaller
    ones leave in its heap stay small beside it (decisions/0010)."""
    return FRESH_BYTES if budget_bytes >= SMALL_BUDGET_BYTES else max(LEAST_FRESH_BYTES, budget_bytes // HOLES)


def fault_us(size_bytes: int, fresh_bytes: int = FRESH_BYTES) -> float:
    """What the pages of a block take when they are first used, where malloc maps it anew each time: blocks of `fresh_bytes` on."""
    return FAULT_US_PER_BYTE * size_bytes if size_bytes >= fresh_bytes else 0.0


def charged_sizes(graph: Graph, moved: Collection[int]) -> tuple[int, ...]:
    """Bytes charged for each storage: with its overhead if a step allocates it, as it is if it exists before the step (unless it is in
    `moved`, so that a step may read it into memory of its own) or holds a plain number. Beside an accelerator numbers on the host are free."""
    if graph.device:
        sizes = (0 if storage.on_host else storage.size_bytes for storage in graph.storages)
        return tuple(allocated_bytes(size_bytes, graph.device) for size_bytes in sizes)
    views = [-1] * len(graph.storages)
    for value in graph.values:
        views[value.storage] += 1
    return tuple(
        storage.size_bytes
        if not storage.size_bytes or (storage.role in PERSISTENT and index not in moved)
        else allocated_bytes(storage.size_bytes) + VIEW_BYTES * max(0, count)
        for index, (storage, count) in enumerate(zip(graph.storages, views, strict=True))
    )


def constant_overhead(graph: Graph) -> int:
    """What a step needs throughout: a tensor object for each value of what exists before it, and saved generator states for draws that
    may run again. All of it is on the host."""
    if graph.device:
        return 0
    outside = sum(1 for value in graph.values if graph.storages[value.storage].role in PERSISTENT)
    return STEP_BYTES + VIEW_BYTES * outside + RNG_STATE_BYTES * sum(op.rng for op in graph.ops)
