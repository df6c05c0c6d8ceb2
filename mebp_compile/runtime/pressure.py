"""An engine for a process whose whole memory has a budget: where malloc's free blocks would take it above, it gives them back.

malloc keeps what is freed below its mapping threshold, and the holes between blocks that live longer were 80 MB of RSS after one step of a plan
of 64 MB, and 230 MB of address space. (Tensors are aligned to 64 bytes, and glibc before 2.38 never serves an aligned block from a hole of
exactly its size.) So blocks from 1 MiB on are mapped, and near the budget the rest is given back: malloc_trim takes 0.1 to 0.5 ms, and the
page faults that follow. The program's verbs ask the system every few calls what the process holds.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch

from mebp_compile.measure.process import anon_bytes, malloc_trim
from mebp_compile.runtime.engine import Engine

PROCESS_MAPPED_BYTES = 1 << 20
CALLS_BETWEEN = 4
REGROWTH_BYTES = 1 << 20  # a trim gives nothing before that much is there again
SLACK_BYTES = 4 << 20  # for what is allocated between two looks, beyond the largest single op


class Pressure:
    """Trims malloc when the process holds more than `limit_bytes`, or would with a tile of a Loop. `trims` counts how often."""

    def __init__(self, limit_bytes: int, tile_bytes: int) -> None:
        self.limit_bytes, self.tile_bytes = limit_bytes, tile_bytes
        self.trims = 0
        self._calls = 0
        self._after_bytes = 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._statm)

    def look(self) -> None:
        """Every few calls: trim where it may help."""
        self._calls += 1
        if self._calls % CALLS_BETWEEN == 0:
            self.relieve()

    def before_tile(self) -> None:
        """Make room for a tile."""
        self.relieve(self.tile_bytes)

    def relieve(self, coming_bytes: int = 0) -> None:
        """Trim, if the process is above the limit or will be, and has grown since the last time."""
        now_bytes = anon_bytes(self._statm)
        self._after_bytes = min(self._after_bytes, now_bytes)
        if now_bytes + coming_bytes > self.limit_bytes and now_bytes > self._after_bytes + REGROWTH_BYTES:
            malloc_trim()
            self.trims += 1
            self._after_bytes = anon_bytes(self._statm)


class PressedEngine(Engine):
    """An engine that looks at the process's memory as its program goes on."""

    pressure: Pressure | None = None

    def at(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        self._look()
        return super().at(offset, shape, dtype, stride)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        self._look()
        return super().new(shape, dtype, stride)

    def wait(self, name: str) -> torch.Tensor | None:
        self._look()
        return super().wait(name)

    def dequantise(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._look()
        return super().dequantise(*args, **kwargs)

    def rows(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pressure is not None:
            self.pressure.before_tile()
        return super().rows(*args, **kwargs)

    def columns(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pressure is not None:
            self.pressure.before_tile()
        return super().columns(*args, **kwargs)

    def product(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pressure is not None:
            self.pressure.before_tile()
        return super().product(*args, **kwargs)

    def _look(self) -> None:
        if self.pressure is not None:
            self.pressure.look()
