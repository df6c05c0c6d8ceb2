"""A schedule: what happens in which order. Five kinds of step, one step a line.

Recompute is a second `Run`, never a new kind of step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from solvers.problem import Problem


@dataclass(frozen=True, slots=True)
class Run:
    """Run op `op` in the way of its choice number `choice`."""

    op: int
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Free:
    """Drop the storage from memory."""

    storage: int


@dataclass(frozen=True, slots=True)
class Offload:
    """Start writing the storage to disk; it stays live. `Wait` completes the write."""

    storage: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Allocate the storage and start reading it from disk; `Wait` completes the read."""

    storage: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the storage's pending transfer is complete."""

    storage: int


Step = Run | Free | Offload | Prefetch | Wait
_KINDS: dict[str, type[Free] | type[Offload] | type[Prefetch] | type[Wait]] = {
    "free": Free,
    "offload": Offload,
    "prefetch": Prefetch,
    "wait": Wait,
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps in order, and the persistent movable storages whose home is memory.

    Persistent storages that don't move are resident without being named.
    """

    steps: tuple[Step, ...]
    resident: frozenset[int] = frozenset()

    def at_start(self, problem: Problem) -> list[int]:
        """The storages that are in memory as the step begins."""
        return [s for s, info in enumerate(problem.storages) if info.persistent and (s in self.resident or not info.movable)]

    def to_json(self) -> str:
        """The schedule as JSON text: ["run", op, choice] or [kind, storage] for each step."""
        steps: list[list[str | int]] = [
            ["run", step.op, step.choice] if isinstance(step, Run) else [type(step).__name__.lower(), step.storage]
            for step in self.steps
        ]
        return json.dumps({"resident": sorted(self.resident), "steps": steps}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Schedule:
        """Parse `to_json`'s text. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
            return Schedule(tuple(_step(*item) for item in data["steps"]), frozenset(data["resident"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a schedule in JSON: {error!r}") from error


def _step(kind: str, *numbers: int) -> Step:
    """One step from its JSON list."""
    return Run(*numbers) if kind == "run" else _KINDS[kind](*numbers)


def format(schedule: Schedule, problem: Problem) -> str:
    """The schedule as text, one step a line, with names; the first line lists the resident storages."""
    resident = ", ".join(problem.storages[index].name for index in sorted(schedule.resident))
    return "\n".join([f"resident: {resident or '-'}", *(format_step(step, problem) for step in schedule.steps)])


def format_step(step: Step, problem: Problem) -> str:
    """One line for one step."""
    if isinstance(step, Run):
        op = problem.ops[step.op]
        return f"run      {op.name}" + (f" (choice {step.choice})" if len(op.choices) > 1 else "")
    storage = problem.storages[step.storage]
    return f"{type(step).__name__.lower():8} {storage.name}  # {format_bytes(storage.size_bytes)}"


def format_bytes(size_bytes: float) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
