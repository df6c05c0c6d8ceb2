"""What the engine of a program must know of its graph and plan, as plain data that goes through JSON: no solver, no graph, no user's object.

`runtime.setup` derives it where a step is planned; a lean process reads it from a saved step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Binding:
    """Names are the program's; sources say what they are ("parameter:model:layers.0.weight", "optimizer:...", "batch:0").

    sources: what `run.state` gives, by name. batch, results: sources of the function's arguments, and where its results belong, in order.
    away, resident: name -> source of what lies on disk between steps, or in memory but leaves it in mid-step or is a block of a table; rooms: by
    source, bytes on disk and copies of them. restorable: all that the step writes lies on disk.
    weights: streamed weight -> (source of the parameter, dtype); records: packed storage -> weight; kept_records: those at home in
    memory; record_places: where in the arena some of those lie; fetched_records: those that the schedule reads whole.
    slots: name -> (offset, bytes) in the step's scratch file of `scratch_bytes`. written: sources that the step changes. random: whether it
    draws random numbers. tight: whether malloc is to give memory back at once, blocks of `mapped_bytes` on. spike_bytes,
    loop_bytes: the most that one step of the schedule takes from the allocator, other than a Loop over rows or columns of a streamed weight;
    and such a Loop.
    """

    sources: dict[str, str]
    batch: tuple[str, ...]
    results: tuple[str, ...]
    arena_bytes: int
    peak_bytes: int
    budget_bytes: int
    away: dict[str, str]
    resident: dict[str, str]
    rooms: dict[str, tuple[int, int]]
    restorable: bool
    weights: dict[str, tuple[str, str]]
    records: dict[str, str]
    kept_records: tuple[str, ...]
    record_places: dict[str, int]
    fetched_records: tuple[str, ...]
    slots: dict[str, tuple[int, int]]
    scratch_bytes: int
    written: tuple[str, ...]
    random: bool
    tight: bool
    mapped_bytes: int
    spike_bytes: int
    loop_bytes: int

    def to_data(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_data(data: dict[str, Any]) -> Binding:
        """The binding that `to_data` gave, after JSON. Raises KeyError, TypeError or ValueError for anything else."""
        return Binding(**{field.name: _as_written(data[field.name]) for field in fields(Binding)})


def _as_written(value: Any) -> Any:
    """JSON's lists as the tuples that they were; dicts of lists as dicts of tuples."""
    if isinstance(value, dict):
        return {str(key): _as_written(item) for key, item in value.items()}
    return tuple(_as_written(item) for item in value) if isinstance(value, list) else value
