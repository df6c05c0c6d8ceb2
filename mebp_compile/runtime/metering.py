"""One step of a program under a meter: what law 2 compares with the plan.

`meter_storages` counts tensors to the byte and is compared with `plan.tensor_bytes`; `meter_process` counts what malloc handed out
(workspaces and rounding included) and what the system charged, and is compared with `plan.peak_bytes`. Each runs one real training step:
the meters disturb one another (the storage meter's own notes come from malloc), so a step is under one or the other.

Both count as the budget does: what the program keeps in memory between steps (parameters, buffers, optimizer state, constants, the batch,
resident packed weights, the arena) plus what the step adds. Gradients of the last step that this one throws away are dropped before the
count. Of an arena that gives pages back in mid-step those count that its tensors have used and that were not given back since.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mebp_compile.graph import PERSISTENT
from mebp_compile.measure.meter import MallocMeter, PeakRss, StorageMeter
from mebp_compile.pages import Decommit, Spans, resident
from mebp_compile.runtime.arena import has_own_pages
from mebp_compile.runtime.guards import batch_tensors
from mebp_compile.runtime.program import Program


@dataclass(frozen=True)
class TensorReading:
    """peak_bytes: the most bytes of storages alive after any op, which is `peak_op`; a storage of the arena counts while a name holds it.
    kept_bytes: storages alive before the step. result: what the step returned."""

    peak_bytes: int
    peak_op: str
    kept_bytes: int
    result: Any


@dataclass(frozen=True)
class ProcessReading:
    """malloc_bytes (None where the malloc meter is not preloaded) and anon_bytes: malloc's peak and RssAnon's sampled peak in the step,
    both above the process without what the program keeps. resident_bytes: VmHWM, the whole process (None where it can't be reset). The step
    must not be the program's first, whose arena pages are still untouched."""

    malloc_bytes: int | None
    anon_bytes: int
    resident_bytes: int | None
    result: Any


def meter_storages(program: Program, leaves: list[Any]) -> TensorReading:
    """Run one step and count its storages."""
    program.arrange()
    with StorageMeter() as meter, program.engine.observed(lambda view: meter.watch(view)):
        meter.watch(*kept_tensors(program, leaves))
        kept_bytes = meter.reset_peak()
        result = program.run(leaves)
    return TensorReading(meter.peak_bytes, meter.peak_op, kept_bytes, result)


def meter_process(program: Program, leaves: list[Any]) -> ProcessReading:
    """Run one step and measure malloc's peak and RssAnon's."""
    program.arrange()
    engine, kept_bytes = program.engine, kept_storage_bytes(program, leaves)
    moving = engine.homes is not None and engine.homes.resident
    if engine.pages is None or not (program.plan.placement.decommits or moving):
        return meter_call(lambda: program.run(leaves), kept_bytes + engine.arena.nbytes)
    watch = _PageWatch(engine.arena)
    with engine.observed(watch.take, watch.give, watch.leave):
        reading = meter_call(lambda: program.run(leaves), kept_bytes)
    begin_bytes, grown_bytes = watch.peak()
    malloc_bytes = None if reading.malloc_bytes is None else kept_bytes + grown_bytes
    return replace(reading, malloc_bytes=malloc_bytes, anon_bytes=reading.anon_bytes + begin_bytes)


class _PageWatch:
    """What malloc has handed out, the arena's pages in memory, and what comes and goes in pages of its own, together at their most. A view's pages
    count from when an op takes it until they are given back; malloc counts at its peak since the look before."""

    def __init__(self, arena: torch.Tensor) -> None:
        self.arena = arena
        self.malloc = MallocMeter() if MallocMeter.available() else None
        self.before_bytes = self.malloc.reset_peak() if self.malloc else 0
        self.mapped_bytes = 0  # of tensors with pages of their own, more than at the begin
        self.grown = array("q")  # malloc's growth and theirs up to each event; packed, for RssAnon is sampled meanwhile
        self.taken = array("q")  # rows of Spans whose steps are events
        self.given: list[Decommit] = []

    def take(self, view: torch.Tensor) -> None:
        number, size_bytes = len(self.grown), view.untyped_storage().nbytes()
        if _inside(self.arena, view):
            low = view.data_ptr() - self.arena.data_ptr()
            self.taken.extend((number, number + 1, low, low + size_bytes))
            self._look()
        else:
            self._look()
            self.mapped_bytes += size_bytes if has_own_pages(view) else 0

    def leave(self, tensor: torch.Tensor) -> None:
        self._look()
        self.mapped_bytes -= tensor.untyped_storage().nbytes()

    def give(self, low: int, high: int) -> None:
        self.given.append(Decommit(len(self.grown), low, high))
        self._look()

    def _look(self) -> None:
        self.grown.append(self.mapped_bytes + (self.malloc.peak_bytes - self.before_bytes if self.malloc else 0))
        if self.malloc:
            self.malloc.reset_peak()

    def peak(self) -> tuple[int, int]:
        """(bytes of the pages that a step finds, the peak), where the step before it was the same."""
        self._look()
        spans = Spans(*np.array(self.taken, np.int64).reshape(-1, 4).T)
        after = resident(spans, self.given, len(self.grown))
        return int(after[-1]), int((np.array(self.grown) + np.roll(after, 1)).max())


def meter_call(call: Callable[[], Any], kept_bytes: int) -> ProcessReading:
    """Make one call, before which `kept_bytes` of what counts are in memory, and measure the same."""
    malloc = MallocMeter() if MallocMeter.available() else None
    with PeakRss() as peak:
        before_bytes = malloc.reset_peak() if malloc else 0
        result = call()
        grown_bytes = malloc.peak_bytes - before_bytes if malloc else 0
    anon_bytes = kept_bytes + peak.peak_anon_bytes - peak.before.anon_bytes
    return ProcessReading(kept_bytes + grown_bytes if malloc else None, anon_bytes, peak.peak_rss_bytes, result)


def kept_tensors(program: Program, leaves: list[Any]) -> Iterator[torch.Tensor]:
    """Every tensor that the program finds in memory when a step begins."""
    batch, plan = batch_tensors(leaves), program.plan
    for index, storage in enumerate(program.graph.storages):
        if storage.role not in PERSISTENT or not storage.size_bytes:
            continue
        leaves_memory = plan.problem.storages[index].movable or storage.role == "weight"  # a table that is only looked up stays on disk
        if leaves_memory and index not in plan.schedule.resident:
            continue
        yield batch[storage.source] if storage.role == "batch" else program.engine.state(storage.name)


def kept_storage_bytes(program: Program, leaves: list[Any]) -> int:
    """Bytes of the storages of `kept_tensors` that lie outside of the arena, each once."""
    arena = program.engine.arena
    return storage_bytes(tensor for tensor in kept_tensors(program, leaves) if not _inside(arena, tensor))


def _inside(arena: torch.Tensor, tensor: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - arena.data_ptr() < arena.nbytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())

