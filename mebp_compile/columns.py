"""Columns: an arena for budgets so tight that it must be full whenever memory is.

An arena is there all the time, so at a step where the allocator alone would fill the budget every byte of the arena must be in use.
First fit can't promise that. A column is a strip of the arena as wide as one tensor, used by one life after another: a chain of lives of
nearly its width whose gaps lie where there is memory to spare. Each column is the chain that serves most bytes, found by dynamic
programming over time; columns are added from the widest on, and each takes the memory that it wastes from what is to spare for the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NARROWEST = 0.6  # a life in a column takes at least this share of its width
NOTHING = -(1 << 60)


@dataclass(frozen=True)
class Lives:
    """Of each life: its steps [start, end), its bytes, and the bytes that it costs besides when the allocator serves it."""

    start: Ints
    end: Ints
    size: Ints
    credit: Ints


@dataclass(frozen=True)
class Column:
    """A strip of the arena and the lives (indices) that use it, in order."""

    offset: int
    width: int
    members: tuple[int, ...]


def columns(lives: Lives, spare: Ints, align: int, work: int) -> list[Column]:
    """Columns of growing offset. `spare[t]`: bytes left at step t when the allocator serves every life; it is used up in place.

    `work` bounds the lives looked at in all, whatever the machine.
    """
    free = np.ones(len(lives.size), bool)
    result: list[Column] = []
    offset = 0
    for width in sorted({-(-int(size) // align) * align for size in lives.size}, reverse=True):
        while True:
            members = np.flatnonzero(free & (lives.size <= width) & (lives.size > NARROWEST * width))
            work -= len(members) + 1
            chain = best_chain(lives, members[np.argsort(lives.start[members], kind="stable")], width, spare) if work > 0 else []
            if len(chain) < 2:
                break
            result.append(Column(offset, width, tuple(chain)))
            free[chain] = False
            offset += width
            spare -= width
            for index in chain:
                spare[lives.start[index] : lives.end[index]] += lives.size[index] + lives.credit[index]
    return result


def best_chain(lives: Lives, members: Ints, width: int, spare: Ints) -> list[int]:
    """Of `members` (by start), the chain of lives with most bytes such that the column's waste is to spare at every step; [] if there is
    none.

    most(j) = size(j) + max over i of most(i), where i ends before j starts with no full step between them; a step is full where less than
    the column's width is to spare. A life narrower than the column must find the difference to spare at its own steps.
    """
    steps = len(spare)
    full = np.flatnonzero(spare < width)
    last_full = np.searchsorted(full, np.arange(steps + 1))  # number of full steps before each step
    most_at: Ints = np.full(steps + 1, NOTHING, np.int64)  # by end: the most bytes of a chain that ends there
    ends_at: Ints = np.full(steps + 1, -1, np.int64)
    before: dict[int, int] = {}
    for j in members.tolist():
        start, end = int(lives.start[j]), int(lives.end[j])
        if width - lives.size[j] - lives.credit[j] > spare[start:end].min(initial=1 << 60):
            continue
        blocked = int(last_full[start])
        first = int(full[blocked - 1]) + 1 if blocked else 0
        window = most_at[first : start + 1]
        at = first + int(window.argmax())
        most = int(most_at[at])
        if most < 0 and blocked:
            continue
        total = int(lives.size[j]) + max(most, 0)
        if total > most_at[end]:
            most_at[end], ends_at[end] = total, j
            before[j] = int(ends_at[at]) if most > 0 else -1
    last = int(full[-1]) + 1 if len(full) else 0
    tail = most_at[last:]
    if not len(tail) or int(tail.max()) < 0:
        return []
    chain = [int(ends_at[last + int(tail.argmax())])]
    while before[chain[-1]] >= 0:
        chain.append(before[chain[-1]])
    return chain[::-1]
