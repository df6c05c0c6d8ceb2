"""Where things lie in an arena while a step is walked: who takes the bytes of a storage next, and where one finds room for so long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Arena:
    """Bytes [low, low + size) during events [begin, end): of the instances of a trace, then of the copies that reruns make and discard. All are
    aligned alike, `height` too."""

    begin: NDArray[np.int32]
    end: NDArray[np.int32]
    low: NDArray[np.int64]
    size: NDArray[np.int64]
    height: int

    def taken(self, i: int, event: int) -> int:
        """The first event from this one on in which others lie on the bytes of i; 1 << 62: none."""
        low, high = self.low[i], self.low[i] + self.size[i]
        others = (self.low < high) & (self.low + self.size > low) & (self.end > event) & (self.size > 0)
        others[i] = False
        return max(event, int(self.begin[others].min())) if others.any() else 1 << 62

    def place_for(self, i: int, event: int) -> int:
        """An offset for i from this event on, its own or the lowest; -1: none."""
        size, others = int(self.size[i]), (self.begin < self.end[i]) & (self.end > event) & (self.size > 0)
        others[i] = False
        lows, highs = self.low[others], (self.low + self.size)[others]
        if not ((lows < self.low[i] + size) & (highs > self.low[i])).any():
            return int(self.low[i])
        order = np.argsort(lows, kind="stable")
        bottoms = np.maximum.accumulate(np.append(0, highs[order]))
        tops = np.append(lows[order], self.height)
        holes = np.flatnonzero(tops - bottoms >= size)
        return int(bottoms[holes[0]]) if len(holes) else -1

