"""Make the engine of a program: its arena, its live state, its scratch file."""

from __future__ import annotations

import solvers
from mebp_compile.capture import State, Traced
from mebp_compile.config import Options
from mebp_compile.graph import Graph
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.plan import Plan
from mebp_compile.runtime.activations import ActivationStore, Slot
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.state import LiveState

SLOT_ALIGN = 4096


def make_engine(graph: Graph, plan: Plan, state: State, traced: Traced, options: Options) -> Engine:
    """An engine with everything that the program's verbs need, and nothing more."""
    constants = {str(node.target): getattr(traced.module, str(node.target)) for node in traced.module.graph.nodes if node.op == "get_attr"}
    live = LiveState(state, constants)
    sources = {storage.name: storage.source for storage in graph.storages if storage.source and storage.role not in ("batch", "hyper", "weight")}
    return Engine(live, sources, plan.placement.arena_bytes, _activations(graph, plan, options))


def _activations(graph: Graph, plan: Plan, options: Options) -> ActivationStore | None:
    """The scratch file with a slot for each storage that the schedule offloads, or None where it offloads nothing."""
    moved = dict.fromkeys(step.storage for step in plan.schedule.steps if isinstance(step, solvers.Offload))
    if not moved or options.offload_dir is None:
        return None
    slots, offset = {}, 0
    for storage in moved:
        slots[graph.storages[storage].name] = Slot(offset, graph.storages[storage].size_bytes)
        offset += -(-graph.storages[storage].size_bytes // SLOT_ALIGN) * SLOT_ALIGN
    return ActivationStore(options.offload_dir, offset, slots, DiskThread())
