"""Blocks that live for a while, into an arena of given height: offsets for all or nearly all, by guided ejection (eject.c says how).

Unlike `pack` it proves nothing, and a small tight problem may defeat it; but thousands of blocks take it a second. Without the library (no C
compiler at install) nothing is found.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.library import load_library, pointer

Ints = NDArray[np.int64]


class Ejection:
    """One search that may go on, with other lifespans too. offsets: of each block, -1 where it has no place."""

    def __init__(self, starts: NDArray[Any], ends: NDArray[Any], sizes: Ints) -> None:
        self.starts, self.ends = (np.ascontiguousarray(column, np.int32) for column in (starts, ends))
        self.sizes = np.ascontiguousarray(sizes, np.int64)
        size, length = self.sizes / self.sizes.max(initial=1), np.maximum(1, self.ends - self.starts)
        self.order = np.lexsort((-size, -size * length)).astype(np.int32)
        self.light = size**0.7 * np.sqrt(length)
        self.weights = self.light.copy()
        self.offsets = np.full(len(self.sizes), -1, np.int64)

    def run(self, height: int, work: int, seed: int = 0) -> int:
        """How many have no place below the height, which is not less than before, when all have one or after so much work, in looks at a placed
        block (four nanoseconds each). Deterministic. Raises MemoryError."""
        library = load_library("eject")
        if library is None:
            return len(self.sizes)
        columns = [pointer(column) for column in (self.starts, self.ends, self.sizes, self.order)]
        left = library.mebp_eject(
            len(self.sizes), *columns, ctypes.c_int64(height), ctypes.c_int64(work), ctypes.c_uint64(seed), pointer(self.light),
            pointer(self.offsets), pointer(self.weights),
        )  # fmt: skip
        if left < 0:
            raise MemoryError(f"no memory to place {len(self.sizes)} blocks")
        return int(left)
