"""Activations on disk: one scratch file with a fixed slot for each offloaded storage.

The file is reserved whole before the first step, so that no step can find the disk full, and has no name, so that
nothing is left behind after a crash. `offload` and `prefetch` only submit; the storage belongs to the transfer until
`wait`. Slots may share bytes when their contents are never needed at the same time (the plan places them so); reading
a slot that another has overwritten is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mebp_compile.errors import DiskError, MebpError
from mebp_compile.measure.disk import open_scratch, refuse_memory_disk
from mebp_compile.measure.file_io import read_all
from mebp_compile.measure.memory import memory_of
from mebp_compile.measure.transfer import DiskThread, Ticket, ending, settle

if TYPE_CHECKING:
    import torch

ORDER_FIX = "a step's order is wrong: check the schedule, or the edited program, with `mebp check`"


@dataclass(frozen=True)
class Slot:
    """A storage's place in the scratch file."""

    offset: int
    size_bytes: int


class ActivationStore:
    """Offloads storages to `directory` and brings them back, through `thread` (which the caller owns and closes after
    this).

    `drop_cache` asks the kernel to forget a slot's pages after it was read back: the page cache is not the process's
    memory, but a container may count it. Raises DiskError: tmpfs (unless `allow_tmpfs`), no space for
    `capacity_bytes`, no permission, a slot beyond it.
    """

    def __init__(
        self,
        directory: Path | str,
        capacity_bytes: int,
        slots: Mapping[str, Slot],
        thread: DiskThread,
        allow_tmpfs: bool = False,
        drop_cache: bool = False,
    ) -> None:
        self.slots = dict(slots)
        self._thread = thread
        self._drop_cache = drop_cache
        self._pending: dict[str, Ticket] = {}
        self._valid: set[str] = set()
        self._fd = -1
        _check_slots(self.slots, capacity_bytes)
        self._sharing = _sharing(self.slots)
        if not allow_tmpfs:
            refuse_memory_disk(Path(directory))
        self._fd = open_scratch(Path(directory), capacity_bytes)

    def offload(self, name: str, tensor: torch.Tensor | torch.UntypedStorage) -> None:
        """Begin to write the tensor's bytes to its slot. It must stay alive and unchanged until `wait(name)`."""
        slot, memory = self._begin(name, tensor)
        self._valid.difference_update(self._sharing.get(name, ()))
        self._valid.discard(name)
        self._pending[name] = self._thread.submit_write(self._fd, slot.offset, memory)
        self._valid.add(name)

    def prefetch(self, name: str, tensor_buffer: torch.Tensor | torch.UntypedStorage) -> None:
        """Begin to read the slot into the buffer. It must not be read or written until `wait(name)`."""
        slot, memory = self._begin(name, tensor_buffer)
        if name not in self._valid:
            raise DiskError(
                f"prefetch of {name}: its slot was never written, or another storage was written over it", ORDER_FIX
            )
        self._pending[name] = self._thread.submit_read(self._fd, slot.offset, memory)

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Read bytes of a slot, from byte `offset` of it on, and wait for them; no write of it may be under way."""
        slot, pending = self.slots[name], self._pending.get(name)
        written = name in self._valid and (pending is None or pending.kind == "read")
        if not written or offset + buffer.nbytes > slot.size_bytes:
            raise DiskError(f"{buffer.nbytes} bytes at {offset} of {name} can't be read now", ORDER_FIX)
        read_all(self._fd, slot.offset + offset, memory_of(buffer))

    def wait(self, name: str) -> None:
        """Block until the transfer of `name` is over; raises DiskError if it failed or if there is none."""
        ticket = self._pending.get(name)
        if ticket is None:
            raise DiskError(f"wait for {name}: no transfer of it is under way", ORDER_FIX)
        with ending(self._pending, name):
            try:
                ticket.wait()
            except MebpError:
                if ticket.kind == "write":
                    self._valid.discard(name)
                raise
        if self._drop_cache and ticket.kind == "read":
            slot = self.slots[name]
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(self._fd, slot.offset, slot.size_bytes, os.POSIX_FADV_DONTNEED)

    @property
    def pending(self) -> tuple[str, ...]:
        """The storages on their way, oldest first."""
        return tuple(self._pending)

    def settle(self) -> None:
        """Let pending transfers end, whatever becomes of them."""
        settle(self._pending, self.wait)

    def close(self) -> None:
        """Let pending transfers end, then give the file back. Raises the first of their errors. Closing twice is
        harmless.
        """
        first: MebpError | None = None
        for name in self.pending:
            try:
                self.wait(name)
            except MebpError as error:
                first = first or error
        self._close_file()
        if first is not None:
            raise first

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MebpError:
            if error is None:
                raise

    def __del__(self) -> None:
        """A forgotten store gives its disk space back, but only when no transfer uses the file any more."""
        if all(ticket.done for ticket in getattr(self, "_pending", {}).values()):
            self._close_file()

    def _close_file(self) -> None:
        """An error in closing a file without a name loses nothing."""
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _begin(self, name: str, tensor: torch.Tensor | torch.UntypedStorage) -> tuple[Slot, memoryview]:
        """The checks that both directions share."""
        if self._fd < 0:
            raise DiskError(f"{name}: the activation store is closed", "make a new compiled step")
        if name not in self.slots:
            raise DiskError(f"{name} has no slot in the scratch file", ORDER_FIX)
        if name in self._pending:
            raise DiskError(f"{name}: a {self._pending[name].kind} of its slot is still on its way", ORDER_FIX)
        memory, slot = memory_of(tensor), self.slots[name]
        if memory.nbytes != slot.size_bytes:
            raise DiskError(f"{name} has {memory.nbytes} bytes and its slot {slot.size_bytes}", ORDER_FIX)
        return slot, memory


def _check_slots(slots: Mapping[str, Slot], capacity_bytes: int) -> None:
    for name, slot in slots.items():
        if slot.offset < 0 or slot.size_bytes < 0 or slot.offset + slot.size_bytes > capacity_bytes:
            message = (
                f"slot {name} (offset {slot.offset}, {slot.size_bytes} bytes) is outside the file of {capacity_bytes}"
            )
            raise DiskError(message, "place the slots again, or give a larger capacity")


def _sharing(slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """For each slot that shares bytes with others: their names. A sweep over the slots by offset."""
    shared: dict[str, list[str]] = {}
    reach: list[tuple[int, str]] = []
    for name, slot in sorted(slots.items(), key=lambda item: item[1].offset):
        reach = [(end, other) for end, other in reach if end > slot.offset]
        for _, other in reach if slot.size_bytes else ():
            shared.setdefault(name, []).append(other)
            shared.setdefault(other, []).append(name)
        if slot.size_bytes:
            reach.append((slot.offset + slot.size_bytes, name))
    return shared
