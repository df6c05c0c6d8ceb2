"""Packed weights on their way into memory: reads whole records ahead on the disk thread, rows of tables when they are looked up. A step on an
accelerator has its records in host memory, from which they are copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch

from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.measure.transfer import DiskThread, Ticket, ending, settle
from mebp_compile.quant import Packed, dequantise_rows
from mebp_compile.quant.scheme import view_record
from mebp_compile.quant.schemes import scheme_named
from mebp_compile.runtime.host_slots import ALIGN, HostSlots
from mebp_compile.runtime.slots import slots_of
from mebp_compile.runtime.weights import WeightStore


class WeightStream:
    """Reads the weights of one program. `weights` maps the dense weight's name to its name in the store and its dtype;
    `records` maps the packed storage's name to the dense weight's name; `resident` records stay in memory between steps, those of
    `places` there; `fetched` ones are read whole in a step."""

    def __init__(
        self,
        store: WeightStore,
        weights: Mapping[str, tuple[str, torch.dtype]],
        records: Mapping[str, str],
        resident: frozenset[str],
        fetched: frozenset[str],
        thread: DiskThread,
        accelerator: Accelerator | None = None,
        places: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    ) -> None:
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        self.store, self.weights, self.records, self.thread = store, dict(weights), dict(records), thread
        self._pending: dict[str, Ticket] = {}
        self._tile: torch.Tensor | None = None
        self.at_home, self.places = resident, places or {}
        self.resident: dict[str, torch.Tensor] = {}
        self.host = self._in_host_memory(accelerator, fetched) if accelerator is not None else None
        self.arrange()

    def _in_host_memory(self, accelerator: Accelerator, fetched: frozenset[str]) -> HostSlots:
        """The records that a step on the accelerator reads, read once from disk."""
        sizes = {name: self.store.entry(self._entry(name)).length for name in sorted(fetched)}
        slots, capacity_bytes = slots_of(sizes, ALIGN)
        host = HostSlots(capacity_bytes, slots, accelerator)
        for name in sizes:
            self.store.read_into(self._entry(name), host.fill(name))
        return host

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def _entry(self, record: str) -> str:
        return self.weights[self.records[record]][0]

    def _load(self, name: str) -> torch.Tensor:
        if name in self.places:
            buffer = self.places[name]()
        else:
            buffer = torch.empty(self.store.entry(self._entry(name)).length, dtype=torch.uint8)
        self.store.read_into(self._entry(name), buffer)
        return buffer.to(self.device)

    def release(self, name: str) -> None:
        """The record leaves memory, perhaps for a while only."""
        self.resident.pop(name, None)

    def adopt(self, name: str, buffer: torch.Tensor) -> None:
        """A record whose home is memory is back."""
        if name in self.at_home:
            self.resident[name] = buffer

    def prefetch(self, name: str, buffer: torch.Tensor) -> None:
        """Start reading a record into a buffer of its size."""
        if self.host is not None:
            self.host.prefetch(name, buffer)
            return
        entry = self._entry(name)
        read = functools.partial(self.store.read_into, entry, buffer)
        self._pending[name] = self.thread.submit(read, buffer.nbytes, self.store.whole_read(entry, buffer))

    def wait(self, name: str) -> None:
        if self.host is not None:
            if name in self.host.pending:
                self.host.wait(name)
            return
        ticket = self._pending.get(name)
        if ticket is not None:
            with ending(self._pending, name):
                ticket.wait()

    def settle(self) -> None:
        """After a failed step: let pending reads end, whatever becomes of them, and let go of a Loop's memory."""
        if self.host is not None:
            self.host.settle()
        settle(self._pending, self.wait)
        self.end_tiles()

    def arrange(self) -> None:
        """Before a step: records whose home is memory are there, also those that a failed step had out of it."""
        for name in sorted(self.at_home - self.resident.keys()):
            self.resident[name] = self._load(name)

    def packed(self, name: str, buffer: torch.Tensor) -> Packed:
        """The codes and scales of weight `name` inside its record."""
        entry = self.store.entry(self.weights[name][0])
        return view_record(scheme_named(entry.scheme), entry.record, entry.shape, buffer)

    def dense(self, name: str) -> torch.Tensor:
        """An uninitialised dense weight."""
        entry, dtype = self.weights[name]
        return torch.empty(self.store.entry(entry).shape, dtype=dtype, device=self.device)

    def tile(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """Uninitialised dense rows or columns of a weight, in memory that the tiles of a Loop share: the next one overwrites it."""
        entry, dtype = self.weights[name]
        shape = list(self.store.entry(entry).shape)
        if rows is not None:
            shape[0] = rows.stop - rows.start
        if columns is not None:
            shape[1] = columns.stop - columns.start
        size_bytes = math.prod(shape) * dtype.itemsize
        if self._tile is None or self._tile.nbytes < size_bytes:
            self._tile = None  # before its successor is made
            self._tile = torch.empty(size_bytes, dtype=torch.uint8)
        return self._tile[:size_bytes].view(dtype).view(shape)

    def end_tiles(self) -> None:
        """A Loop is over: its memory goes."""
        self._tile = None

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Dense rows [first, last) straight from disk."""
        entry, _ = self.weights[name]
        rows = last - first
        buffer = torch.empty(self.store.rows_bytes(entry, rows), dtype=torch.uint8)
        self.store.read_rows_into(entry, first, last, buffer)
        return dequantise_rows(self.store.packed(entry, buffer, rows), 0, rows, self.tile(name, rows=slice(0, rows)))

    def look_up(self, name: str, ids: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Dense rows `ids` of a table: shape [*ids.shape, columns]."""
        entry, dtype = self.weights[name]
        columns = self.store.entry(entry).shape[-1]
        result = torch.empty((*ids.shape, columns), dtype=dtype, device=self.device) if out is None else out
        unique, back = torch.unique(ids.reshape(-1), return_inverse=True)
        count = math.prod(unique.shape)
        buffer = torch.empty(self.store.rows_bytes(entry, count), dtype=torch.uint8)
        self.store.read_selected_rows_into(entry, unique, buffer)
        rows = dequantise_rows(self.store.packed(entry, buffer, count), 0, count, torch.empty((count, columns), dtype=dtype))
        torch.index_select(rows.to(self.device), 0, back, out=result.view(-1, columns))
        return result
