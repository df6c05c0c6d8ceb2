"""solvers.arena: who is in the way, and where there is room, against looking at every byte."""

import numpy as np
import pytest

from solvers.arena import Arena

EVENTS, HEIGHT = 12, 40


def arena(seed: int) -> Arena:
    """What lies somewhere without overlap, and a few empty ones."""
    draw = np.random.default_rng(seed)
    rows, taken = [], np.zeros((EVENTS, HEIGHT), bool)
    for _ in range(60):
        begin, low, size = int(draw.integers(EVENTS)), int(draw.integers(HEIGHT)), int(draw.integers(0, 9))
        end = int(draw.integers(begin + 1, EVENTS + 1))
        if low + size <= HEIGHT and not taken[begin:end, low : low + size].any():
            taken[begin:end, low : low + size] = True
            rows.append((begin, end, low, size))
    begin, end, low, size = (np.array(column) for column in zip(*rows, strict=True))
    return Arena(begin.astype(np.int32), end.astype(np.int32), low.astype(np.int64), size.astype(np.int64), HEIGHT)


def cells(of: Arena, without: int) -> np.ndarray:
    """Which bytes are taken in which event."""
    taken = np.zeros((EVENTS, HEIGHT), bool)
    for k in range(len(of.low)):
        if k != without:
            taken[of.begin[k] : of.end[k], of.low[k] : of.low[k] + of.size[k]] = True
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_bytes_and_events_one_by_one(seed: int) -> None:
    found = arena(seed)
    for i in range(len(found.low)):
        taken, low, size = cells(found, i), int(found.low[i]), int(found.size[i])
        for event in range(EVENTS):
            busy = [e for e in range(event, EVENTS) if taken[e, low : low + size].any()]
            if size:
                assert found.taken(i, event) == (busy[0] if busy else 1 << 62)
            if size and event < found.end[i]:
                free = [at for at in range(HEIGHT - size + 1) if not taken[event : found.end[i], at : at + size].any()]
                assert found.place_for(i, event) == (low if low in free else min(free, default=-1))
