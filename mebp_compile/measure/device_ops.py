"""Time and memory of ops on an accelerator, and the speed of the link to its host's memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from mebp_compile.measure.accelerator import READ, WRITE, Accelerator

WARM_CALLS = 3
AT_ONCE_US = 20_000.0  # calls that are timed together take about as long
MOST_CALLS, SAMPLES = 200, 5
LINK_BYTES, SMALL_BYTES = 64 << 20, 4096


def memory_of_call(accelerator: Accelerator, call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that the device's allocator gave at the peak of one call, and holds after it, beyond those before it; and what the call gave."""
    before_bytes = accelerator.reset_peak()
    result = call()
    accelerator.finish()
    return accelerator.peak_bytes() - before_bytes, accelerator.allocated_bytes() - before_bytes, result


def time_of_call(accelerator: Accelerator, call: Callable[[], Any]) -> tuple[float, int]:
    """Microseconds of one call where many are issued one after the other, as in a step: what the host needs to issue it, or the device to run it,
    whichever is more. Median of SAMPLES; and the number of calls."""
    for _ in range(WARM_CALLS):
        call()
    once_us = _together_us(accelerator, call, 1)
    calls = max(1, min(MOST_CALLS, int(AT_ONCE_US / max(once_us, 1.0))))
    return statistics.median(_together_us(accelerator, call, calls) for _ in range(SAMPLES)), calls * SAMPLES


def _together_us(accelerator: Accelerator, call: Callable[[], Any], calls: int) -> float:
    accelerator.finish()
    start_ns = time.perf_counter_ns()
    for _ in range(calls):
        call()
    accelerator.finish()
    return (time.perf_counter_ns() - start_ns) / 1000 / calls


def measure_link(accelerator: Accelerator) -> dict[str, float]:
    """Bytes a microsecond from pinned host memory ("read") and to it ("write"), and the "latency" of a copy in microseconds. Copy engines work beside
    the compute units, so a copy delays no compute ("interference" 0)."""
    host, device = accelerator.pinned(LINK_BYTES), accelerator.empty(LINK_BYTES)

    def copying(kind: str, size_bytes: int) -> Callable[[], Any]:
        to, source = (device, host) if kind == READ else (host, device)
        return lambda: accelerator.copy(kind, to[:size_bytes], source[:size_bytes]).wait()

    speeds = {kind: LINK_BYTES / time_of_call(accelerator, copying(kind, LINK_BYTES))[0] for kind in (READ, WRITE)}
    return {**speeds, "latency": time_of_call(accelerator, copying(READ, SMALL_BYTES))[0], "interference": 0.0}
