"""Where a step was planned: what its graph and plan ask of the runtime, as a Binding, and the engine for the user's own objects."""

from __future__ import annotations

import solvers
from mebp_compile.capture import State
from mebp_compile.capture.contract import Contract
from mebp_compile.config import Options
from mebp_compile.graph import PERSISTENT, Graph
from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.measure.heap_holes import close_holes
from mebp_compile.overhead import mapped_bytes
from mebp_compile.place import leaving, lives
from mebp_compile.planning import Plan, is_tight
from mebp_compile.runtime.assemble import assemble
from mebp_compile.runtime.bind import Streamed
from mebp_compile.runtime.binding import Binding
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.home_store import SLOT_ALIGN
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.host_slots import ALIGN
from mebp_compile.runtime.slots import slots_of
from mebp_compile.runtime.state import LiveState

TILE_VERBS = ("run.rows", "run.columns")


def make_engine(
    graph: Graph,
    plan: Plan,
    state: State,
    contract: Contract,
    options: Options,
    streamed: Streamed | None = None,
    homes: Homes | None = None,
    accelerator: Accelerator | None = None,
) -> Engine:
    """An engine with everything that the program's verbs need, and nothing more."""
    binding = binding_of(graph, plan, options.offloads, options.host_bytes is not None)
    live = LiveState(state, contract.constants)
    store, names = (streamed.store, streamed.names) if streamed is not None else (None, None)
    close_holes()  # that planning left
    return assemble(binding, live, options.offload_dir, store, names, homes, accelerator=accelerator)


def binding_of(graph: Graph, plan: Plan, offload: bool, host: bool = False) -> Binding:
    """The binding of a planned program. `offload`: it has a folder on a disk, or with `host` an accelerator's host memory, where what steps write
    has one copy: a failed step can't be undone there."""
    sources = {
        storage.name: storage.source for storage in graph.storages if storage.source and storage.role not in ("batch", "hyper", "weight")
    }
    written = {storage for op in graph.ops for storage in op.writes if graph.storages[storage].role in PERSISTENT}
    away, resident, rooms = _homes(graph, plan, set() if host else written) if offload else ({}, {}, {})
    weights, records = _weights(graph)
    slots, scratch_bytes = _slots(graph, plan, ALIGN if host else SLOT_ALIGN) if offload else ({}, 0)
    kept = sorted(graph.storages[index].name for index in plan.schedule.resident if graph.storages[index].role == "weight")
    read = {graph.storages[step.storage].name for step in plan.schedule.steps if isinstance(step, solvers.Prefetch)}
    restorable = not host and all(graph.storages[index].name in away for index in written)
    tight = not graph.device and is_tight(plan.problem, plan.placement)
    changed = (graph.storages[index].source for index in sorted(written))
    return Binding(
        sources, batch_sources(graph), result_paths(graph), plan.placement.arena_bytes, plan.peak_bytes, plan.problem.budget_bytes,
        away, resident, rooms, restorable, weights, records, tuple(kept), _record_places(graph, plan),
        tuple(sorted(read & records.keys())), slots, scratch_bytes, tuple(changed),
        any(op.rng for op in graph.ops), tight, mapped_bytes(plan.problem.budget_bytes), *_spikes(graph, plan),
    )  # fmt: skip


def _record_places(graph: Graph, plan: Plan) -> dict[str, int]:
    """Where in the arena those records lie when a step begins that leave it in mid-step."""
    return {graph.storages[index].name: offset for (start, index), offset in sorted(plan.placement.offsets.items()) if start < 0}


def batch_sources(graph: Graph) -> tuple[str, ...]:
    """The source of each argument of the generated function."""
    storages = (graph.storages[graph.storage_of(name)] for name in graph.inputs)
    return tuple(storage.source for storage in storages if storage.role == "batch")


def result_paths(graph: Graph) -> tuple[str, ...]:
    """What becomes of each result of the generated function."""
    return tuple(path for path, _ in graph.results)


def _spikes(graph: Graph, plan: Plan) -> tuple[int, int]:
    """The most bytes that one step of the schedule takes from the allocator, as what it makes outside of the arena and as workspace: of all
    steps but Loops over a streamed weight, and of those, whose verbs announce each tile."""
    taken = [0] * len(plan.schedule.steps)
    loops: set[int] = set()
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, solvers.Run):
            taken[number] = plan.problem.ops[step.op].choices[step.choice].workspace_bytes
            body = graph.ops[step.op].body
            if step.choice > 0 and body is not None and any(op.target in TILE_VERBS for op in body.ops):
                loops.add(number)
    for life in lives(graph, plan.problem, plan.schedule):
        if life.start >= 0 and (life.start, life.storage) not in plan.placement.offsets:
            taken[life.start] += life.charged_bytes
    plain = (size_bytes for number, size_bytes in enumerate(taken) if number not in loops)
    return max(plain, default=0), max((taken[number] for number in loops), default=0)


def _homes(graph: Graph, plan: Plan, twice: set[int]) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[int, int]]]:
    """What the plan keeps on disk, what it moves in mid-step or has in blocks, and room on disk: two copies of what is in `twice`."""
    away, resident, rooms = {}, {}, {}
    moving = leaving(plan.schedule)
    for index, storage in enumerate(graph.storages):
        if storage.role not in ("parameter", "optimizer") or not plan.problem.storages[index].movable:
            continue
        if index not in plan.schedule.resident:
            away[storage.name] = storage.source
            rooms[storage.source] = (storage.size_bytes, 2 if index in twice else 1)
        elif index in moving or "#" in storage.source:
            resident[storage.name] = storage.source
    return away, resident, rooms


def _weights(graph: Graph) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Streamed weights (source and dtype by name), and the weight of each packed record."""
    weights, records = {}, {}
    for storage in graph.storages:
        if storage.role == "weight":
            name = storage.name.removesuffix("_packed")
            weights[name] = (storage.source.replace("weight:", "parameter:", 1), graph.value[name].dtype)
            records[storage.name] = name
    return weights, records


def _slots(graph: Graph, plan: Plan, align: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Of each storage that the schedule offloads to slots of the step's own: (offset, bytes); and the bytes of all."""
    resident = plan.schedule.resident
    offloaded = dict.fromkeys(step.storage for step in plan.schedule.steps if isinstance(step, solvers.Offload))
    sizes = {}
    for index in offloaded:
        storage = graph.storages[index]
        if storage.role in PERSISTENT and index not in resident:
            continue
        sizes[storage.name] = storage.size_bytes
    slots, all_bytes = slots_of(sizes, align)
    return {name: (slot.offset, slot.size_bytes) for name, slot in slots.items()}, all_bytes
