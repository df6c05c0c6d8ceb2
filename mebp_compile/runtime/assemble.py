"""Make the engine of a program from its binding: arena, weights on disk, homes, scratch file. Knows neither graph nor solver."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.measure.cached_read import moves_at_once
from mebp_compile.measure.process import set_malloc_thresholds
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.runtime.activations import ActivationStore
from mebp_compile.runtime.arena import PagedArena
from mebp_compile.runtime.binding import Binding
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.home_store import Room
from mebp_compile.runtime.homes import ProgramHomes, StateHomes
from mebp_compile.runtime.host_slots import HostSlots
from mebp_compile.runtime.memory import memory_errors
from mebp_compile.runtime.pressure import PROCESS_MAPPED_BYTES, SLACK_BYTES, PressedEngine, Pressure
from mebp_compile.runtime.slots import Slot, SlotStore
from mebp_compile.runtime.state import Live
from mebp_compile.runtime.streams import WeightStream
from mebp_compile.runtime.weights import WeightStore


@memory_errors("making the step's arena and buffers")
def assemble(
    binding: Binding,
    live: Live,
    folder: Path | None = None,
    store: WeightStore | None = None,
    names: Mapping[str, str] | None = None,
    homes: StateHomes | None = None,
    process_bytes: int | None = None,
    accelerator: Accelerator | None = None,
) -> Engine:
    """An engine with everything that the program's verbs need, and nothing more.

    `folder` is on a disk, for the scratch file. `store` has the streamed weights, `names` their names in it by source. `homes` keep state on
    disk; room there is made now, so that no step finds the disk full. `process_bytes`: the budget of the whole process, if it has one.
    `accelerator`: where the step runs, if not on the CPU; what leaves its memory then goes to the host's.
    """
    if process_bytes is not None:
        set_malloc_thresholds(PROCESS_MAPPED_BYTES, binding.mapped_bytes)
    elif binding.tight:
        set_malloc_thresholds(binding.mapped_bytes, binding.mapped_bytes)
    thread = DiskThread(at_once=moves_at_once()) if homes is None else homes.thread
    pages = PagedArena(binding.arena_bytes) if accelerator is None else None
    if pages is not None and (binding.tight or process_bytes is not None):
        pages.keep_pages_small()
    weights = _weights(binding, store, names or {}, thread, accelerator, pages) if store is not None else None
    own = _homes(binding, homes) if homes is not None else None
    kind = Engine if process_bytes is None else PressedEngine
    slots = _slots(binding, accelerator or folder, thread)
    engine = kind(live, binding.sources, pages or binding.arena_bytes, slots, weights, own, binding.random, accelerator)
    if isinstance(engine, PressedEngine) and process_bytes is not None:
        engine.pressure = Pressure(process_bytes - binding.spike_bytes - SLACK_BYTES, binding.loop_bytes)
    return engine


def _homes(binding: Binding, homes: StateHomes) -> ProgramHomes:
    homes.store.reserve({source: Room(size_bytes, copies) for source, (size_bytes, copies) in binding.rooms.items()})
    return ProgramHomes(homes, binding.away, binding.resident, binding.restorable)


def _weights(
    binding: Binding,
    store: WeightStore,
    names: Mapping[str, str],
    thread: DiskThread,
    accelerator: Accelerator | None,
    pages: PagedArena | None,
) -> WeightStream:
    """The stream of every packed weight of the program, and of tables that are only looked up."""
    weights = {name: (names[source], getattr(torch, dtype)) for name, (source, dtype) in binding.weights.items()}
    kept, fetched = frozenset(binding.kept_records), frozenset(binding.fetched_records)
    places = {}
    for name, offset in binding.record_places.items() if pages is not None else ():
        length = store.entry(weights[binding.records[name]][0]).length
        places[name] = functools.partial(pages.view, offset, length, torch.uint8)
    return WeightStream(store, weights, binding.records, kept, fetched, thread, accelerator, places)


def _slots(binding: Binding, place: Path | Accelerator | None, thread: DiskThread) -> SlotStore | None:
    """A slot for each storage that the schedule offloads, in a scratch file or in host memory; None where it offloads nothing."""
    if not binding.slots or place is None:
        return None
    slots = {name: Slot(offset, size_bytes) for name, (offset, size_bytes) in binding.slots.items()}
    if isinstance(place, Accelerator):
        return HostSlots(binding.scratch_bytes, slots, place)
    return ActivationStore(place, binding.scratch_bytes, slots, thread)
