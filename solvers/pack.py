"""Blocks that live for a while, into an arena of given height: offsets, or the proof that there are none.

The search is in pack.c, which says how it prunes. It takes the blocks in an order of preference, and which one is good differs from problem to
problem by a factor of a thousand: three orders that mostly are good come first, then random ones, each with a little more work than those before.
Without the library (no C compiler at install) nothing is found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.library import load_library, pointer

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
    library = load_library("pack")
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
        answer = library.mebp_pack(
            len(sizes), len(times), *(pointer(column) for column in (first, last, sizes, rank)), ctypes.c_int(by_load), ctypes.c_int64(height),
            ctypes.c_int64(min(share, work)), pointer(found),
        )  # fmt: skip
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
