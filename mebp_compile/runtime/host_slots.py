"""Slots in pinned host memory, for what an accelerator's memory does not hold: activations, parameters and optimizer state, packed weights.

All of it is one block that is reserved before the first step and counts in `Budget(host=...)`. A transfer is a copy on a stream of its own
(`measure.accelerator`), and `wait` orders the compute stream after it without blocking the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mebp_compile.measure.accelerator import READ, WRITE, Accelerator, Copy
from mebp_compile.measure.memory import flat_bytes
from mebp_compile.runtime.slots import Slot, SlotStore

if TYPE_CHECKING:
    import torch

ALIGN = 512  # bytes: what a copy engine likes to begin at


class HostSlots(SlotStore):
    """Pinned memory of `capacity_bytes` with a place for each slot. Raises DiskError for a slot beyond it, OutOfMemory where it can't be had."""

    def __init__(self, capacity_bytes: int, slots: Mapping[str, Slot], accelerator: Accelerator) -> None:
        super().__init__(capacity_bytes, slots)
        self._accelerator = accelerator
        self._memory = accelerator.pinned(capacity_bytes)
        self.open = True

    def begin_write(self, slot: Slot, tensor: torch.Tensor) -> Copy:  # type: ignore[override]
        return self._accelerator.copy(WRITE, self._place(slot), flat_bytes(tensor))

    def begin_read(self, slot: Slot, tensor: torch.Tensor) -> Copy:  # type: ignore[override]
        return self._accelerator.copy(READ, flat_bytes(tensor), self._place(slot))

    def size_of(self, tensor: torch.Tensor) -> int:  # type: ignore[override]
        return flat_bytes(tensor).numel()

    def fill(self, name: str) -> torch.Tensor:
        """The memory of a slot, to be filled by the host between steps; it holds something from now on."""
        self._accelerator.finish()
        self._valid.add(name)
        return self._place(self.slots[name])

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Copy bytes of a slot, from byte `offset` of it on; what the compute stream is given next finds them."""
        slot = self.has_part(name, offset, buffer.nbytes)
        part = Slot(slot.offset + offset, buffer.nbytes)
        self._accelerator.copy(READ, flat_bytes(buffer), self._place(part)).wait()

    def release(self) -> None:
        """No op of torch in it: a forgotten store may be let go of in the midst of a capture, which would record it."""
        self._accelerator.finish()
        del self._memory

    def _place(self, slot: Slot) -> torch.Tensor:
        return self._memory[slot.offset : slot.offset + slot.size_bytes]
