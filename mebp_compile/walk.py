"""What happens at each step of a plan's schedule: lives, clocks, transfers, bytes by kind. What `explain` and `viz` show.

Everything here is derived from the graph and the plan alone, and compared with the plan's own replay: a plan that does not add up
(an edited file) is refused with a GraphError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mebp_compile.errors import GraphError
from mebp_compile.graph import Graph, Op
from mebp_compile.overhead import allocated_bytes
from mebp_compile.place import Life, arena_profile, lives, workspace_profile
from mebp_compile.planning import Plan
from solvers import Offload, Prefetch, Problem, Run, Schedule, Step, Wait

GROUPS = ("parameters", "optimizer", "weights", "activations", "gradients", "workspace")
_OF_ROLE = {"optimizer": "optimizer", "weight": "weights", "gradient": "gradients"}
_LINE = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block|layer)\.\d+)(?:\.|$)")
_NUMBERED = re.compile(r"_\d+$")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One write to or read from disk: issued by schedule step `issued`, completed by the Wait at step `waited`."""

    storage: int
    write: bool
    issued: int
    waited: int
    start_us: int
    end_us: int


@dataclass(frozen=True)
class Clocks:
    """When each step starts and ends on the compute stream (microseconds), and the transfers on the disk stream."""

    start_us: tuple[int, ...]
    end_us: tuple[int, ...]
    transfers: tuple[Transfer, ...]


@dataclass
class _Streams:
    """The two clocks of the replay: compute, and one first-in-first-out disk."""

    problem: Problem
    clock: int = 0
    disk: int = 0
    pending: dict[int, Transfer] = field(default_factory=dict)
    done: list[Transfer] = field(default_factory=list)

    def issue(self, step: Offload | Prefetch, number: int) -> None:
        write = isinstance(step, Offload)
        speed = self.problem.write_bytes_per_us if write else self.problem.read_bytes_per_us
        start = max(self.clock, self.disk)
        size_bytes = self.problem.storages[step.storage].size_bytes
        duration = self.problem.latency_us + math.ceil(size_bytes / speed)
        self.disk = start + duration
        self.clock += math.floor(self.problem.interference * duration)
        self.pending[step.storage] = Transfer(step.storage, write, number, -1, start, self.disk)

    def wait(self, storage: int, number: int) -> None:
        item = self.pending.pop(storage)
        self.clock = max(self.clock, item.end_us)
        self.done.append(Transfer(storage, item.write, item.issued, number, item.start_us, item.end_us))


def clocks(problem: Problem, schedule: Schedule) -> Clocks:
    """The clocks of every step, by the rules of `solvers.check`: a Run takes its choice's time, the
    start of a transfer what it costs compute, a Wait what is left of its transfer."""
    streams, start, end = _Streams(problem), [], []
    for number, step in enumerate(schedule.steps):
        start.append(streams.clock)
        if isinstance(step, Run):
            streams.clock += problem.ops[step.op].choices[step.choice].time_us
        elif isinstance(step, (Offload, Prefetch)):
            streams.issue(step, number)
        elif isinstance(step, Wait):
            streams.wait(step.storage, number)
        end.append(streams.clock)
    return Clocks(tuple(start), tuple(end), tuple(sorted(streams.done, key=lambda item: item.issued)))


@dataclass(frozen=True)
class Walk:
    """The schedule, step by step.

    again: whether a step runs an op that ran before (a recompute). live: bytes of each group of GROUPS at each step (constant bytes count
    as parameters), whose sum is the plan's timeline. footprint: the same with what the arena takes instead of the storages in it.
    """

    clocks: Clocks
    lives: tuple[Life, ...]
    again: tuple[bool, ...]
    live: dict[str, tuple[int, ...]]
    footprint: tuple[int, ...]

    def living(self, step: int) -> list[Life]:
        """What is in memory at a step, largest first."""
        return sorted((life for life in self.lives if life.start <= step < life.end), key=lambda life: -life.size_bytes)


def walk(graph: Graph, plan: Plan) -> Walk:
    """Everything that the pictures and explanations need. Raises GraphError where the plan contradicts its own replay."""
    every = tuple(lives(graph, plan.problem, plan.schedule))
    times = clocks(plan.problem, plan.schedule)
    steps, again, spare = plan.schedule.steps, _again(plan.schedule), workspace_profile(plan.problem, plan.schedule).tolist()
    groups = [group_of(graph, index) for index in range(len(graph.storages))]
    live = {
        name: _profile([life for life in every if groups[life.storage] == name], len(steps)) for name in GROUPS[:-1]
    }
    live["parameters"] = [size + plan.problem.constant_bytes for size in live["parameters"]]
    live["workspace"] = [work + over for work, over in zip(spare, _overhead(every, len(steps)), strict=True)]
    total = [sum(column) for column in zip(*live.values(), strict=True)]
    if total != list(plan.report.timeline) or (times.end_us or (0,))[-1] != plan.report.time_us:
        raise GraphError("the plan's timeline or time is not what its schedule gives", "run `mebp check` on the folder, or plan again")
    placed = [life for life in every if (life.start, life.storage) in plan.placement.offsets]
    inside = _profile([replace(life, size_bytes=allocated_bytes(life.size_bytes)) for life in placed], len(steps))
    arena = arena_profile(placed, plan.placement, len(steps)).tolist()
    footprint = tuple(all_ - part + own for all_, part, own in zip(total, inside, arena, strict=True))
    return Walk(times, every, again, {name: tuple(row) for name, row in live.items()}, footprint)


def _again(schedule: Schedule) -> tuple[bool, ...]:
    ran: set[int] = set()
    result = []
    for step in schedule.steps:
        result.append(isinstance(step, Run) and step.op in ran)
        if isinstance(step, Run):
            ran.add(step.op)
    return tuple(result)


def _overhead(every: Sequence[Life], steps: int) -> list[int]:
    """Charged bytes beyond the tensors' own, at every step."""
    return _profile([replace(life, size_bytes=life.charged_bytes - life.size_bytes) for life in every], steps)


def _profile(some: Sequence[Life], steps: int) -> list[int]:
    """Bytes of the given lives at every step."""
    change = [0] * (steps + 1)
    for life in some:
        change[max(0, life.start)] += life.size_bytes
        change[life.end] -= life.size_bytes
    total, result = 0, []
    for size in change[:steps]:
        total += size
        result.append(total)
    return result


def group_of(graph: Graph, storage: int) -> str:
    """Which of GROUPS a storage belongs to. Made in the forward: activations (a dequantised weight: weights); made later: gradients."""
    role = graph.storages[storage].role
    if role != "activation":
        return _OF_ROLE.get(role, "parameters")
    made = graph.producer.get(storage)
    op = graph.ops[made] if made is not None else None
    if op is not None and "dequantise" in op.target:
        return "weights"
    return "activations" if op is None or op.phase == "forward" else "gradients"


def step_label(graph: Graph, step: Step, again: bool = False) -> str:
    """`run layers_0_mlp_mm`, `recompute ...`, `free ...`, `prefetch ...`."""
    if isinstance(step, Run):
        return f"{'recompute' if again else 'run'} {graph.ops[step.op].name}"
    return f"{type(step).__name__.lower()} {graph.storages[step.storage].name}"


def layer_of(module: str) -> str:
    """The module path up to its layer number; paths outside of layers stay as they are."""
    match = _LAYER.match(module)
    return match[1] if match else module


def common_prefix(graph: Graph) -> str:
    """The leading path components that all layers share ("model.model."), for shorter labels."""
    paths = [op.module.split(".") for op in graph.ops if _LAYER.match(op.module)]
    first = layer_of(".".join(paths[0])).split(".")[:-2] if paths else []
    return ".".join(first) + "." if first and all(path[: len(first)] == first for path in paths) else ""


def source_line(op: Op, lines: Mapping[str, str]) -> str:
    """`modeling_qwen2.py:46 in forward`: the user's line that made the op; for a backward op the line of the forward op it serves.

    `lines` comes from `forward_lines`, once for a graph.
    """
    if _short(op.source) or op.phase != "backward":
        return _short(op.source)
    kind = _NUMBERED.sub("", op.forward_op)
    found = lines.get(op.forward_op) or lines.get(f"{op.module}:{kind}") or lines.get(f"{op.module}:")
    return f"{_short(found)} (its forward)" if found else ""


def forward_lines(graph: Graph) -> dict[str, str]:
    """Source lines by op name, by "module:kind of op" and by "module:", the first op of each counting."""
    lines: dict[str, str] = {}
    for op in graph.ops:
        if _short(op.source) and op.phase == "forward":
            kind = op.target.split(".")[1] if "." in op.target else op.target
            for key in (op.name, f"{op.module}:{kind.strip('_')}", f"{op.module}:"):
                lines.setdefault(key, op.source)
    return lines


def _short(source: str) -> str:
    """`model.py:10 in forward`, or "" where the source is not a line of a file."""
    match = _LINE.match(source)
    if match is None:
        return ""
    file = re.split(r"[\\/]", match["file"])[-1]
    return f"{file}:{match['line']}" + (f" in {match['function']}" if match["function"] else "")
