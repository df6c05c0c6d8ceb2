"""Blocks that live for a while, into an arena of given height: offsets, or the proof that there are none.

The search is in pack.c, which says how it prunes. It takes the blocks in an order of preference, and which one is good differs from problem to
problem by a factor of a thousand: three orders that mostly are good come first, then random ones, each with a little more work than those before.
Without the library (no C compiler at install) nothing is found.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
MOST_BLOCKS = 4000  # the search takes eight bytes for each pair of them
FIRST_WORK = 1 << 24  # of one order; a unit is a section of time of one block, looked at once: a nanosecond at most
FIRST_ORDERS = (("load", "length", "area"), ("load", "area", "length"), ("length", "area", "load"))
NOISES = (0.0, 0.05, 0.3)


@dataclass(frozen=True)
class Packing:
    """offsets: of each block, or None. proven: then there are none."""

    offsets: Ints | None
    proven: bool


def pack(starts: Ints, ends: Ints, sizes: Ints, height: int, work: int, seed: int = 0) -> Packing:
    """Blocks of `sizes` during [starts, ends), none empty, below `height`. Deterministic: it ends after so much `work`, whatever the machine."""
    library = _library()
    if library is None or len(sizes) > MOST_BLOCKS:
        return Packing(None, False)
    by_start = np.argsort(starts, kind="stable")
    starts, ends, sizes = (np.ascontiguousarray(column[by_start]) for column in (starts, ends, sizes))
    times = np.unique(np.concatenate([starts, ends]))
    first, last = (np.searchsorted(times, column).astype(np.int32) for column in (starts, ends))
    found = np.zeros(len(sizes), np.int64)
    for order, by_load, share in _orders(starts, ends, sizes, first, last, seed):
        if work <= 0:
            break
        rank = np.empty(len(sizes), np.int32)
        rank[order] = np.arange(len(sizes))
        columns = [column.ctypes.data for column in (first, last, sizes, rank)]
        answer = library.mebp_pack(len(sizes), len(times), *columns, by_load, height, min(share, work), found.ctypes.data)
        if answer >= 0:
            offsets = np.empty_like(found)
            offsets[by_start] = found
            return Packing(offsets if answer else None, not answer)
        work -= share
    return Packing(None, False)


def _orders(
    starts: Ints, ends: Ints, sizes: Ints, first: NDArray[np.int32], last: NDArray[np.int32], seed: int
) -> Iterator[tuple[NDArray[np.intp], bool, int]]:
    """Orders of preference, whether each goes by the load first (which changes during the search), and how much work it may do: the good ones and
    some random ones, then all with twice as much."""
    draw = np.random.default_rng(seed)
    load = np.zeros(int(last.max(initial=0)), np.int64)
    for begin, end, size in zip(first, last, sizes, strict=True):
        load[begin:end] += size
    keys = {
        "load": np.array([load[begin:end].max() for begin, end in zip(first, last, strict=True)], np.float64),
        "length": (ends - starts).astype(np.float64), "area": (ends - starts).astype(np.float64) * sizes, "size": sizes.astype(np.float64),
        "steps": (last - first).astype(np.float64), "early": -first.astype(np.float64), "late": last.astype(np.float64),
    }  # fmt: skip
    share = FIRST_WORK
    while True:
        for names in FIRST_ORDERS:
            yield np.lexsort([-keys[name] for name in reversed(names)]), names[0] == "load", share
        for _ in range(4 * len(FIRST_ORDERS)):
            drawn, noise = draw.permutation(list(keys)), draw.choice(NOISES)
            yield np.lexsort([-keys[name] * np.exp(noise * draw.standard_normal(len(sizes))) for name in drawn]), draw.random() < 0.5, share
        share *= 2


@cache
def _library() -> Any:
    stem = Path(__file__).with_name("_pack")
    for path in filter(Path.exists, (stem.with_name(stem.name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)):
        library = ctypes.CDLL(str(path))
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        library.mebp_pack.argtypes = [integer, integer, *[pointer] * 4, integer, long, long, pointer]
        return library
    return None
