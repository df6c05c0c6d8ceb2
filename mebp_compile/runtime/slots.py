"""Named slots of bytes outside of a step's memory: which hold something, which are on their way. Where the bytes lie is a subclass's matter.

`offload` and `prefetch` only begin a transfer; the storage belongs to it until `wait`. Slots may share bytes when their contents are never
needed at the same time; reading a slot that another has overwritten is refused.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from mebp_compile.errors import DiskError, MebpError
from mebp_compile.measure.transfer import ending, settle

if TYPE_CHECKING:
    import torch

ORDER_FIX = "a step's order is wrong: check the schedule, or the edited program, with `mebp check`"


@dataclass(frozen=True)
class Slot:
    """A storage's place."""

    offset: int
    size_bytes: int


class Pending(Protocol):
    """A transfer under way: "read" brings a slot's bytes back."""

    @property
    def kind(self) -> str: ...

    @property
    def done(self) -> bool: ...

    def wait(self) -> None: ...


class SlotStore(ABC):
    """The order of transfers of slots, checked: a subclass says how one begins (`begin_write`, `begin_read`) and where it all ends
    (`release`). Raises DiskError for a slot beyond `capacity_bytes`."""

    def __init__(self, capacity_bytes: int, slots: Mapping[str, Slot]) -> None:
        self.slots = dict(slots)
        self._pending: dict[str, Pending] = {}
        self._valid: set[str] = set()
        self.open = False
        _check_slots(self.slots, capacity_bytes)
        self._sharing = _sharing(self.slots)

    @abstractmethod
    def begin_write(self, slot: Slot, tensor: torch.Tensor | torch.UntypedStorage) -> Pending:
        """Begin to move the tensor's bytes to the slot."""

    @abstractmethod
    def begin_read(self, slot: Slot, tensor: torch.Tensor | torch.UntypedStorage) -> Pending:
        """Begin to move the tensor's bytes from the slot."""

    @abstractmethod
    def size_of(self, tensor: torch.Tensor | torch.UntypedStorage) -> int:
        """Bytes of what is to be moved. Raises MeasureError for a tensor with gaps."""

    @abstractmethod
    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Fill the buffer with bytes of a slot, from byte `offset` of it on; no write of it may be under way."""

    @abstractmethod
    def release(self) -> None:
        """Give the memory or the file back. Loses nothing, raises nothing."""

    def offload(self, name: str, tensor: torch.Tensor | torch.UntypedStorage) -> None:
        """Begin to write the tensor's bytes to its slot. It must stay alive and unchanged until `wait(name)`."""
        slot = self._begin(name, tensor)
        self._valid.difference_update(self._sharing.get(name, ()))
        self._valid.discard(name)
        self._pending[name] = self.begin_write(slot, tensor)
        self._valid.add(name)

    def prefetch(self, name: str, tensor_buffer: torch.Tensor | torch.UntypedStorage) -> None:
        """Begin to read the slot into the buffer. It must not be read or written until `wait(name)`."""
        slot = self._begin(name, tensor_buffer)
        if name not in self._valid:
            raise DiskError(
                f"prefetch of {name}: its slot was never written, or another storage was written over it", ORDER_FIX
            )
        self._pending[name] = self.begin_read(slot, tensor_buffer)

    def has_part(self, name: str, offset: int, size_bytes: int) -> Slot:
        """The slot, where bytes [offset, offset + size_bytes) of it can be read now; raises DiskError otherwise."""
        slot, pending = self.slots[name], self._pending.get(name)
        written = name in self._valid and (pending is None or pending.kind == "read")
        if not written or offset + size_bytes > slot.size_bytes:
            raise DiskError(f"{size_bytes} bytes at {offset} of {name} can't be read now", ORDER_FIX)
        return slot

    def wait(self, name: str) -> None:
        """Complete the transfer of `name`; raises DiskError if it failed or if there is none."""
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

    @property
    def pending(self) -> tuple[str, ...]:
        """The storages on their way, oldest first."""
        return tuple(self._pending)

    def settle(self) -> None:
        """Let pending transfers end, whatever becomes of them."""
        settle(self._pending, self.wait)

    def close(self) -> None:
        """Let pending transfers end, then give everything back. Raises the first of their errors. Closing twice is harmless."""
        first: MebpError | None = None
        for name in self.pending:
            try:
                self.wait(name)
            except MebpError as error:
                first = first or error
        self._release()
        if first is not None:
            raise first

    def __enter__(self) -> SlotStore:
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
        """A forgotten store gives everything back, but only when no transfer uses it any more."""
        if all(ticket.done for ticket in getattr(self, "_pending", {}).values()):
            self._release()

    def _release(self) -> None:
        if getattr(self, "open", False):
            self.open = False
            with contextlib.suppress(OSError, RuntimeError):
                self.release()

    def _begin(self, name: str, tensor: torch.Tensor | torch.UntypedStorage) -> Slot:
        """The checks that both directions share."""
        if not self.open:
            raise DiskError(f"{name}: the activation store is closed", "make a new compiled step")
        if name not in self.slots:
            raise DiskError(f"{name} has no slot in the scratch file", ORDER_FIX)
        if name in self._pending:
            raise DiskError(f"{name}: a {self._pending[name].kind} of its slot is still on its way", ORDER_FIX)
        size_bytes, slot = self.size_of(tensor), self.slots[name]
        if size_bytes != slot.size_bytes:
            raise DiskError(f"{name} has {size_bytes} bytes and its slot {slot.size_bytes}", ORDER_FIX)
        return slot


def slots_of(sizes: Mapping[str, int], align: int) -> tuple[dict[str, Slot], int]:
    """A slot for each name, one after the other, and the bytes of all."""
    slots, offset = {}, 0
    for name, size_bytes in sizes.items():
        slots[name] = Slot(offset, size_bytes)
        offset += -(-size_bytes // align) * align
    return slots, offset


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
