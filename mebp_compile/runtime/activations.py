"""Activations on disk: one scratch file with a fixed slot for each offloaded storage.

The file is reserved whole before the first step, so that no step can find the disk full, and has no name, so that nothing is left behind after
a crash.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mebp_compile.measure.disk import open_scratch, refuse_memory_disk
from mebp_compile.measure.file_io import read_all
from mebp_compile.measure.memory import memory_of, place_of
from mebp_compile.measure.transfer import DiskThread, Ticket
from mebp_compile.runtime.slots import Slot, SlotStore

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationStore", "Slot"]


class ActivationStore(SlotStore):
    """Offloads storages to `directory` and brings them back, through `thread` (which the caller owns and closes after this).

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
        super().__init__(capacity_bytes, slots)
        self._thread = thread
        self._drop_cache = drop_cache
        if not allow_tmpfs:
            refuse_memory_disk(Path(directory))
        self._fd = open_scratch(Path(directory), capacity_bytes)
        self.open = True

    def begin_write(self, slot: Slot, tensor: torch.Tensor | torch.UntypedStorage) -> Ticket:
        return self._thread.submit_write(self._fd, slot.offset, place_of(tensor))

    def begin_read(self, slot: Slot, tensor: torch.Tensor | torch.UntypedStorage) -> Ticket:
        return self._thread.submit_read(self._fd, slot.offset, place_of(tensor))

    def size_of(self, tensor: torch.Tensor | torch.UntypedStorage) -> int:
        return place_of(tensor).nbytes

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Read bytes of a slot, from byte `offset` of it on, and wait for them; no write of it may be under way."""
        slot = self.has_part(name, offset, buffer.nbytes)
        read_all(self._fd, slot.offset + offset, memory_of(buffer))

    def wait(self, name: str) -> None:
        ticket, slot = self._pending.get(name), self.slots.get(name)
        super().wait(name)
        if self._drop_cache and ticket is not None and ticket.kind == "read" and slot is not None:
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(self._fd, slot.offset, slot.size_bytes, os.POSIX_FADV_DONTNEED)

    def release(self) -> None:
        os.close(self._fd)
