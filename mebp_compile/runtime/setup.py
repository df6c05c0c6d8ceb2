"""Make the engine of a program: its arena, its live state, its weights on disk, its scratch file."""

from __future__ import annotations

import torch

import solvers
from mebp_compile.capture import State
from mebp_compile.capture.contract import Contract
from mebp_compile.config import Options
from mebp_compile.graph import PERSISTENT, Graph
from mebp_compile.measure.process import set_malloc_thresholds
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.planning import MAPPED_BYTES, Plan
from mebp_compile.runtime.activations import ActivationStore, Slot
from mebp_compile.runtime.bind import Streamed
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.homes import Homes, ProgramHomes, Room
from mebp_compile.runtime.state import LiveState
from mebp_compile.runtime.streams import WeightStream

SLOT_ALIGN = 4096
ROOMY = 1.25


def make_engine(
    graph: Graph,
    plan: Plan,
    state: State,
    contract: Contract,
    options: Options,
    streamed: Streamed | None = None,
    homes: Homes | None = None,
) -> Engine:
    """An engine with everything that the program's verbs need, and nothing more."""
    _set_malloc(plan)
    live = LiveState(state, contract.constants)
    sources = {
        storage.name: storage.source for storage in graph.storages if storage.source and storage.role not in ("batch", "hyper", "weight")
    }
    thread = DiskThread() if homes is None else homes.thread
    weights = _weights(graph, plan, streamed, thread) if streamed is not None else None
    own = _homes(graph, plan, homes) if homes is not None else None
    return Engine(live, sources, plan.placement.arena_bytes, _activations(graph, plan, options, thread), weights, own)


def _set_malloc(plan: Plan) -> None:
    """Where the budget is tight: RSS that follows the bytes in use, for the whole process.

    Left to itself malloc keeps freed blocks, and RSS stood 13 to 20 % above what a step holds. Blocks from MAPPED_BYTES on are mapped and given
    back at once, at the price of their page faults; from 256 KiB on that was a fifth to a third of a step, from 4 MiB on next to nothing.
    """
    if plan.peak_bytes * ROOMY > plan.problem.budget_bytes:
        set_malloc_thresholds(MAPPED_BYTES, MAPPED_BYTES)


def _homes(graph: Graph, plan: Plan, homes: Homes) -> ProgramHomes:
    """What the plan keeps on disk and what it may move in mid-step; room on disk is made now, so that no step finds the disk full."""
    away, resident, rooms = {}, {}, {}
    written = {storage for op in graph.ops for storage in op.writes if graph.storages[storage].role in PERSISTENT}
    for index, storage in enumerate(graph.storages):
        if storage.role not in ("parameter", "optimizer") or not plan.problem.storages[index].movable:
            continue
        if index in plan.schedule.resident:
            resident[storage.name] = storage.source
        else:
            away[storage.name] = storage.source
            rooms[storage.source] = Room(storage.size_bytes, 2 if index in written else 1)
    homes.store.reserve(rooms)
    return ProgramHomes(homes, away, resident, all(graph.storages[index].name in away for index in written))


def _weights(graph: Graph, plan: Plan, streamed: Streamed, thread: DiskThread) -> WeightStream:
    """The stream of every packed weight of the graph, and of tables that are only looked up."""
    by_source = {
        storage.source.replace("weight:", "parameter:", 1): index
        for index, storage in enumerate(graph.storages)
        if storage.role == "weight"
    }
    dense = {value.name: value for value in graph.values}
    weights: dict[str, tuple[str, torch.dtype]] = {}
    records: dict[str, str] = {}
    for source, index in by_source.items():
        packed = graph.storages[index].name
        name = packed.removesuffix("_packed")
        weights[name] = (streamed.names[source], getattr(torch, dense[name].dtype))
        records[packed] = name
    resident = frozenset(graph.storages[index].name for index in plan.schedule.resident if graph.storages[index].role == "weight")
    return WeightStream(streamed.store, weights, records, resident, thread)


def _activations(graph: Graph, plan: Plan, options: Options, thread: DiskThread) -> ActivationStore | None:
    """The scratch file with a slot for each storage that the schedule offloads, or None where it offloads nothing."""
    resident = plan.schedule.resident
    offloaded = dict.fromkeys(step.storage for step in plan.schedule.steps if isinstance(step, solvers.Offload))
    roles = {index: graph.storages[index].role for index in offloaded}
    moved = [index for index, role in roles.items() if role not in PERSISTENT or (index in resident and role != "weight")]
    if not moved or options.offload_dir is None:
        return None
    slots, offset = {}, 0
    for storage in moved:
        slots[graph.storages[storage].name] = Slot(offset, graph.storages[storage].size_bytes)
        offset += -(-graph.storages[storage].size_bytes // SLOT_ALIGN) * SLOT_ALIGN
    return ActivationStore(options.offload_dir, offset, slots, thread)
