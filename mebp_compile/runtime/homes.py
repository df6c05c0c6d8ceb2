"""Homes on disk: parameters and optimizer state that lie in a scratch file between steps, or in pinned host memory where the step runs on an
accelerator, while the user's objects keep their identity.

    Homes          the user's objects: what lies on disk is a meta tensor in them, with shape, hooks and identity as they were
    ProgramHomes   the names and wishes of one program; its `arrange` moves what another program keeps elsewhere

A failed step is abandoned: the generation that was current before it stays readable. The files have no name and vanish with the process:
this is memory, not a checkpoint. Call `materialise` before the compiled step goes, or what lies on disk goes with it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mebp_compile import torch_private
from mebp_compile.capture import State
from mebp_compile.errors import DiskError, MebpError
from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.measure.cached_read import moves_at_once
from mebp_compile.measure.heap_holes import close_holes
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.runtime.arena import with_own_pages
from mebp_compile.runtime.home_store import HomeStore, HostHomeStore
from mebp_compile.runtime.memory import memory_errors
from mebp_compile.runtime.tables import Table, by_parent, parent_of

PLACE_FIX = "call materialise() on the compiled step before you replace or reinitialise parameters and optimizer state"


@dataclass(frozen=True)
class _Parked:
    """A tensor of the user's that is meta now, the shell that keeps its inner self (hooks, autograd) without memory, and where its memory was."""

    owner: torch.Tensor
    shell: torch.Tensor
    device: torch.device


class Homes:
    """Which tensors of the user's modules and optimizers lie on disk. One for all programs of a compiled step."""

    def __init__(self, state: State, place: Path | Accelerator) -> None:
        """place: a folder on a disk, or the accelerator whose host memory it is."""
        self.state = state
        self.thread = DiskThread(at_once=moves_at_once())
        self.store = HostHomeStore(place, self.thread) if isinstance(place, Accelerator) else HomeStore(place, self.thread)
        self._parked: dict[str, _Parked] = {}  # on disk, or in blocks, by source
        self._tables: dict[str, Table] = {}  # in blocks, by source
        self._moving: dict[str, torch.Tensor] = {}  # at home in memory, to leave it in mid-step
        self._out: dict[str, _Parked] = {}  # at home in memory, but out of it for a part of the running step
        self._out_blocks: dict[str, torch.Tensor] = {}  # the same for blocks: meta tensors of their geometry

    @property
    def away(self) -> frozenset[str]:
        """Sources of what lies on disk now."""
        return frozenset(self._parked)

    def arrange(self, away: frozenset[str], moving: frozenset[str] = frozenset()) -> None:
        """Put exactly the sources `away` on disk and everything else in memory; what leaves goes first. Runs between steps.

        `moving`: what is in memory and leaves it in mid-step, and blocks of tables that are in memory, beside those in `away` that are not.
        Raises MebpError, with everything either here or there, where a tensor can't leave.
        """
        with memory_errors("moving state between memory and disk"):
            self.abandon()  # what a failed step left, if its own end was cut short
            self._arrange(away, moving)

    def _arrange(self, away: frozenset[str], moving: frozenset[str]) -> None:
        found = _tensors(self.state)
        held = frozenset(source for source in moving if "#" in source)
        tables = by_parent(away | held)
        away = frozenset(source for source in away if "#" not in source) | tables.keys()
        for source, parked in list(self._parked.items()):
            if found.get(source) is not parked.owner or parked.owner.device.type != "meta":
                self._forget(source)  # the user put another tensor there, which counts
        for source, table in list(self._tables.items()):
            if tables.get(source) != table.blocks or table.held.keys() != held & set(table.blocks):
                self._return(source)
        leaving = sorted(away - self._parked.keys())
        for source in leaving:
            self._leave(source, found.get(source), tables.get(source), held)
        for source in sorted(self._parked.keys() - away):
            self._return(source)
        self._moving = {source: _with_own_pages(source, found.get(source)) for source in sorted(moving - held)}
        if leaving:
            close_holes()

    def materialise(self, force: bool = False) -> None:
        """Bring everything back into memory. `force`: what can't be read any more gets zeros, so that a checkpoint can be loaded over it."""
        try:
            self.arrange(frozenset())
        except DiskError:
            if not force:
                raise
            with memory_errors("bringing state back from disk"):
                self._fill()

    def _fill(self) -> None:
        """Bring back what can be read, and zeros for the rest."""
        for source, parked in tuple(self._parked.items()):
            try:
                self._return(source)
            except DiskError:
                _unpark(parked, _zeros_like(parked))
                self._forget(source)

    def load(self, source: str) -> torch.Tensor:
        """A copy of what lies on disk: the last committed generation."""
        buffer = _empty_like(self._parked[source])
        if source in self._tables:
            self._tables[source].gather(buffer)
            return buffer
        self.store.read(source, buffer)
        self.store.wait(source)
        return buffer

    def look_up(self, source: str, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of a table in blocks, as they were before this step: shape [*ids.shape, columns]."""
        owner = self._parked[source].owner
        result = torch.empty((*ids.shape, owner.shape[1]), dtype=owner.dtype) if out is None else out
        return self._tables[source].look_up(ids, result)

    def block(self, source: str) -> torch.Tensor:
        """A block that is in memory."""
        return self._tables[parent_of(source)].held[source]

    def loaders(self) -> dict[int, Callable[[], torch.Tensor]]:
        """For every object whose value lies on disk, by id: what reads a copy of it."""
        return {id(parked.owner): functools.partial(self.load, source) for source, parked in self._parked.items()}

    # --- one tensor ---

    def _leave(self, source: str, tensor: torch.Tensor | None, blocks: tuple[str, ...] | None, held: frozenset[str]) -> None:
        """Write a tensor to disk, whole or in blocks of which some are held in memory, then give up its own memory."""
        _check_can_leave(source, tensor)
        assert tensor is not None
        table = Table(self.store, blocks or ())
        try:
            if blocks is None:
                self.store.write(source, tensor.detach())
                self.store.wait(source)
            else:
                table.fill(tensor.detach(), held & set(blocks))
        except BaseException:
            self.store.abandon()
            raise
        self.store.commit()
        self._parked[source] = _park(tensor)
        if blocks is not None:
            self._tables[source] = table

    def _return(self, source: str) -> None:
        """Read a tensor back into memory."""
        _unpark(self._parked[source], self.load(source))
        self._forget(source)

    def _forget(self, source: str) -> None:
        """It is in memory now."""
        del self._parked[source]
        self._tables.pop(source, None)

    def release(self, source: str) -> None:
        """In a step: a tensor at home in memory leaves it for a while (its bytes are in the step's own scratch file)."""
        if "#" in source:
            self._out_blocks[source] = self._tables[parent_of(source)].held.pop(source).to("meta")
            return
        self._out[source] = _park(self._moving[source])

    def adopt(self, source: str, buffer: torch.Tensor) -> None:
        """In a step: the tensor is back, in `buffer`, which becomes its memory."""
        if "#" in source:
            self._tables[parent_of(source)].held[source] = buffer
            del self._out_blocks[source]
            return
        _unpark(self._out[source], buffer)
        del self._out[source]

    def abandon(self) -> None:
        """After a failed step. What was out of memory has lost its value: it gets zeros, so that a checkpoint can be loaded over it."""
        self.store.abandon()
        for source in tuple(self._out):
            self.adopt(source, _zeros_like(self._out[source]))
        for source, block in tuple(self._out_blocks.items()):
            self.adopt(source, torch.zeros_like(block, device="cpu"))


class StateHomes(Protocol):
    """What a program asks of the homes of its state: `Homes` for the user's objects, `DataHomes` for plain data."""

    store: HomeStore
    thread: DiskThread

    def arrange(self, away: frozenset[str], moving: frozenset[str] = frozenset()) -> None: ...

    def materialise(self) -> None: ...

    def block(self, source: str) -> torch.Tensor: ...

    def look_up(self, source: str, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor: ...

    def release(self, source: str) -> None: ...

    def adopt(self, source: str, buffer: torch.Tensor) -> None: ...

    def abandon(self) -> None: ...


@dataclass(frozen=True)
class ProgramHomes:
    """The homes of one program: storage name in the program -> source.

    away: at home on disk. resident: at home in memory, and leaves it in mid-step or is a block of a table. restorable: the program writes nothing
    else that outlives it, so that a failed step has changed nothing once it is abandoned.
    """

    homes: StateHomes
    away: Mapping[str, str]
    resident: Mapping[str, str]
    restorable: bool

    def __contains__(self, name: str) -> bool:
        return name in self.away

    def arrange(self) -> None:
        """Before a step."""
        self.homes.arrange(frozenset(self.away.values()), frozenset(self.resident.values()))

    def offload(self, name: str, tensor: torch.Tensor) -> None:
        self.homes.store.write(self.away[name], tensor)

    def prefetch(self, name: str, buffer: torch.Tensor) -> None:
        self.homes.store.read(self.away[name], buffer)

    def wait(self, name: str) -> None:
        self.homes.store.wait(self.away[name])

    def release(self, name: str) -> None:
        """A resident tensor leaves memory in mid-step; the memory of one whose home is the disk is the program's own."""
        if name in self.resident:
            self.homes.release(self.resident[name])

    def adopt(self, name: str, buffer: torch.Tensor) -> None:
        """What was read becomes the user's tensor again, if its home is memory."""
        if name in self.resident:
            self.homes.adopt(self.resident[name], buffer)


def _tensors(state: State) -> dict[str, torch.Tensor]:
    """Every parameter and entry of optimizer state by its source, as the user's objects hold them now."""
    named = {f"{root}:{path}": parameter for root, path, parameter in state.parameters()}
    found: dict[str, torch.Tensor] = {f"parameter:{name}": parameter for name, parameter in named.items()}
    names = {id(parameter): name for name, parameter in named.items()}
    for root, optimizer in state.optimizers.items():
        found.update(_entries(root, optimizer, names))
    return found


def _entries(root: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and id(parameter) in names:
                yield f"optimizer:{root}:{names[id(parameter)]}:{key}", value


def _check_can_leave(source: str, tensor: torch.Tensor | None) -> None:
    """Raise MebpError where giving up the tensor's memory would lose something."""
    where = source.replace(":", " ", 1)
    if tensor is None:
        raise MebpError(f"{where} is gone", PLACE_FIX)
    if tensor.device.type == "meta":
        raise MebpError(f"{where} is on meta and its value is nowhere", PLACE_FIX)
    if tensor.grad is not None or not tensor.is_leaf:
        raise MebpError(f"{where} has a gradient, which keeps it in memory", "set its .grad to None before the step")
    if torch_private.memory_is_shared(tensor):
        gc.collect()  # it may be a view in the frames of a step that failed
        if torch_private.memory_is_shared(tensor):
            raise MebpError(
                f"{where} can't leave memory: another tensor shares it", "drop views such as parameter.data[...], or leave `offload` out"
            )


def _park(tensor: torch.Tensor) -> _Parked:
    """The object becomes meta and gives up its memory; the shell keeps the rest of it."""
    shell, nothing = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad), tensor.new_empty(0)
    device = tensor.device
    torch_private.exchange(tensor, shell)  # from here on nothing needs memory, so nothing fails
    shell.data = nothing
    return _Parked(tensor, shell, device)


def _with_own_pages(source: str, tensor: torch.Tensor | None) -> torch.Tensor:
    """The user's tensor, which has pages of its own now if it is large. Raises MebpError where it can't leave memory."""
    _check_can_leave(source, tensor)
    assert tensor is not None
    buffer = with_own_pages(tensor.detach())
    if buffer.data_ptr() != tensor.data_ptr():
        _unpark(_park(tensor), buffer)
    return tensor


def _empty_like(parked: _Parked) -> torch.Tensor:
    """Memory of the geometry of a parked tensor, where it was."""
    owner = parked.owner
    return torch.empty_strided(owner.shape, owner.stride(), dtype=owner.dtype, device=parked.device)


def _zeros_like(parked: _Parked) -> torch.Tensor:
    return _empty_like(parked).zero_()


def _unpark(parked: _Parked, buffer: torch.Tensor) -> None:
    """The object is itself again, its memory being that of `buffer`."""
    parked.shell.data = buffer
    parked.shell.requires_grad_(parked.owner.requires_grad)
    torch_private.exchange(parked.owner, parked.shell)
