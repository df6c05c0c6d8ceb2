"""The bytes of state that is not in memory between steps: two slots a storage on disk, of which a step writes the one that is not current, and
`commit` makes all of them current at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mebp_compile.errors import DiskError
from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.measure.transfer import DiskThread, ending, settle
from mebp_compile.runtime.activations import ActivationStore
from mebp_compile.runtime.host_slots import ALIGN, HostSlots
from mebp_compile.runtime.slots import SlotStore, slots_of

SLOT_ALIGN = 4096


@dataclass(frozen=True)
class Room:
    """What a storage needs on disk: its size, and two copies where steps write it (one where they only read it)."""

    size_bytes: int
    copies: int


@dataclass
class _Home:
    """The slots of a storage; `current` is the one that the last commit left, None before the first."""

    size_bytes: int
    slots: list[tuple[SlotStore, str]] = field(default_factory=list)
    current: int | None = None


class HomeStore:
    """Storages by name in nameless, preallocated files of `directory`. Not thread-safe; transfers go through `thread`."""

    def __init__(self, directory: Path, thread: DiskThread) -> None:
        self.directory, self.thread = directory, thread
        self._homes: dict[str, _Home] = {}
        self._fresh: dict[str, int] = {}  # storage -> slot that this step has written
        self._pending: dict[str, tuple[SlotStore, str]] = {}

    def reserve(self, rooms: Mapping[str, Room]) -> None:
        """Make room on disk, now, for what has none yet. Raises DiskError where the disk is full or is memory."""
        wanted: dict[str, int] = {}
        places: list[tuple[str, str]] = []
        for name, room in rooms.items():
            known = self._homes.get(name)
            have = len(known.slots) if known is not None and known.size_bytes == room.size_bytes else 0
            for copy in range(have, room.copies):
                wanted[f"{name}#{copy}"] = room.size_bytes
                places.append((name, f"{name}#{copy}"))
        if not wanted:
            return
        file = self.make_slots(wanted)
        for name, slot in places:
            if name not in self._homes or self._homes[name].size_bytes != rooms[name].size_bytes:
                self._homes[name] = _Home(rooms[name].size_bytes)
            self._homes[name].slots.append((file, slot))

    def make_slots(self, sizes: Mapping[str, int]) -> SlotStore:
        """A place of each size."""
        slots, capacity_bytes = slots_of(sizes, SLOT_ALIGN)
        return ActivationStore(self.directory, capacity_bytes, slots, self.thread)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Begin to write the next generation of a storage. The tensor must stay as it is until `wait`."""
        home = self._homes[name]
        after = 0 if home.current is None else (home.current + 1) % len(home.slots)
        target = self._fresh.get(name, after)
        if target == home.current:
            home.current = None  # a single slot: what it held is gone
        file, slot = home.slots[target]
        file.offload(slot, tensor)
        self._fresh[name] = target
        self._pending[name] = (file, slot)

    def read(self, name: str, buffer: torch.Tensor) -> None:
        """Begin to read what was last written in this step, else the committed generation."""
        home = self._homes.get(name)
        index = self._fresh.get(name, home.current) if home is not None else None
        if home is None or index is None:
            raise DiskError(f"{name} was never written to disk", "a bug in this package: report the step")
        file, slot = home.slots[index]
        file.prefetch(slot, buffer)
        self._pending[name] = (file, slot)

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Read bytes of the committed generation, from byte `offset` on, and wait for them."""
        home = self._homes[name]
        assert home.current is not None
        file, slot = home.slots[home.current]
        file.read_part(slot, offset, buffer)

    def wait(self, name: str) -> None:
        """Complete the transfer of a storage; raises DiskError if it failed."""
        file, slot = self._pending[name]
        with ending(self._pending, name):
            file.wait(slot)

    def commit(self) -> None:
        """Everything written since the last commit becomes current, at once. No transfer may be under way."""
        for name, index in self._fresh.items():
            self._homes[name].current = index
        self._fresh = {}

    def abandon(self) -> None:
        """Let transfers end and forget what was written since the last commit."""
        settle(self._pending, self.wait)
        self._fresh = {}


class HostHomeStore(HomeStore):
    """The same in pinned host memory, for a step on an accelerator."""

    def __init__(self, accelerator: Accelerator, thread: DiskThread) -> None:
        super().__init__(Path(), thread)
        self.accelerator = accelerator

    def make_slots(self, sizes: Mapping[str, int]) -> SlotStore:
        slots, capacity_bytes = slots_of(sizes, ALIGN)
        return HostSlots(capacity_bytes, slots, self.accelerator)
