"""Lower bounds that hold for every schedule, whatever its order, recomputation and transfers: of its time the roofline, of its budget the
working set. cut_bound.py has a tighter one of the time.
"""

from __future__ import annotations

from collections.abc import Collection

from solvers.problem import Choice, Op, Problem


def roofline_us(problem: Problem) -> int:
    """Every op that is not optional runs at least once: sum over them of the time of the fastest choice."""
    return sum(min(choice.time_us for choice in op.choices) for op in problem.ops if not op.optional)


def always_live(problem: Problem) -> frozenset[int]:
    """Storages that no schedule can take out of memory for good.

    Persistent ones that don't move; and, without writes to disk, persistent ones that the step writes: their final
    version can only be in memory, and so can every version before it.
    """
    written = {storage for op in problem.ops for storage in op.writes}
    return frozenset(
        index
        for index, storage in enumerate(problem.storages)
        if storage.persistent and (not storage.movable or (not problem.can_offload and index in written))
    )


def working_set(problem: Problem) -> tuple[int, str]:
    """The least budget that any schedule needs, and the name of the op that needs it.

    max over ops (but optional ones) of min over choices of (constant + always live + reads + writes + creates + workspace); at the
    end the outputs are live together.
    """
    pinned = always_live(problem)
    base = problem.constant_bytes + sum(problem.storages[s].size_bytes for s in pinned)
    outputs = {index for index, storage in enumerate(problem.storages) if storage.output}
    needs = [(base + bytes_of(problem, outputs - pinned), "end of the step")]
    for op in (op for op in problem.ops if not op.optional):
        needs.append((base + least_alone_bytes(problem, op, pinned), op.name))
    return max(needs, key=lambda need: need[0])


def alone_bytes(problem: Problem, op: Op, choice: Choice, pinned: frozenset[int]) -> int:
    """Bytes beyond `pinned` that the op needs in this way, whatever else is in memory."""
    return bytes_of(problem, {*choice.reads, *op.writes, *op.creates} - pinned) + choice.workspace_bytes


def least_alone_bytes(problem: Problem, op: Op, pinned: frozenset[int]) -> int:
    """The same in the way that needs least."""
    return min(alone_bytes(problem, op, choice, pinned) for choice in op.choices)


def bytes_of(problem: Problem, storages: Collection[int]) -> int:
    return sum(problem.storages[storage].size_bytes for storage in storages)
