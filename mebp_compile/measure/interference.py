"""How much a transfer delays the compute that it overlaps: its copy to or from the page cache takes a core, or memory bandwidth."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mebp_compile.measure.disk import scratch_file

BLOCK_BYTES, FILE_BYTES = 2 << 20, 128 << 20  # a packed weight, about; more than the caches of a core hold
TOKENS, FEATURES, WIDTH = 256, 896, 4864
SECONDS, PAIRS = 0.1, 5  # of matmuls, alone and beside the copies: 40 calls with AVX-512, one where bf16 is emulated


def measure_interference(folder: Path) -> tuple[float, float]:
    """The share of a transfer's time by which matmuls on all threads are delayed: 1 - t / s, where t is what they take alone and s beside a
    thread that copies without a pause from a file in `folder` that is in the page cache; and the bytes a microsecond that it copies. Medians of
    PAIRS; the share is from 0 to 1."""
    x, weight = torch.randn(TOKENS, FEATURES).bfloat16(), torch.randn(WIDTH, FEATURES).bfloat16()
    out = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)

    def multiply_s(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(x, weight.t(), out=out)
        return time.perf_counter() - start

    multiply_s(1)
    calls, shares, rates = math.ceil(SECONDS / multiply_s(1)), [], []
    with scratch_file(folder, FILE_BYTES) as fd:
        for _ in range(PAIRS):
            alone = multiply_s(calls)
            with _copying(fd) as copied:
                beside = multiply_s(calls)
                rates.append(len(copied) * BLOCK_BYTES / (beside * 1e6))
            shares.append(1 - alone / beside)
    return min(1.0, max(0.0, statistics.median(shares))), statistics.median(rates)


@contextlib.contextmanager
def _copying(fd: int) -> Iterator[list[int]]:
    """A thread that reads the file again and again; and where it was, block by block."""
    stop, buffer, copied = threading.Event(), bytearray(BLOCK_BYTES), list[int]()

    def copy() -> None:
        offset = 0
        while not stop.is_set():
            copied.append(offset)
            os.preadv(fd, [buffer], offset)
            offset = (offset + BLOCK_BYTES) % FILE_BYTES

    thread = threading.Thread(target=copy, name="mebp-copy", daemon=True)
    thread.start()
    try:
        yield copied
    finally:
        stop.set()
        thread.join()
