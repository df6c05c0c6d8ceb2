"""The verbs that generated code may call. One engine serves one program.

Memory: `at` gives views of one arena, `decommit` gives pages of it back, `new` asks the allocator. Persistent tensors come through `state`.
Transfers go through one disk thread, or on an accelerator through its copy streams: `offload` and `prefetch` start one, `wait` completes it.
Random draws that run again are replayed from the generator's saved state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mebp_compile import openmp
from mebp_compile.errors import MebpError
from mebp_compile.kernels import cross_entropy
from mebp_compile.lower.cuts import block_rows, tile_size, tiles_of
from mebp_compile.measure.accelerator import Accelerator
from mebp_compile.quant import dequantise_columns, dequantise_into, dequantise_rows
from mebp_compile.runtime import packed_product
from mebp_compile.runtime.arena import PagedArena, has_own_pages, mapped
from mebp_compile.runtime.homes import ProgramHomes
from mebp_compile.runtime.slots import SlotStore
from mebp_compile.runtime.state import Getter, Live
from mebp_compile.runtime.streams import WeightStream
from mebp_compile.runtime.tables import parent_of

RandomState = tuple[torch.Tensor, torch.Tensor | None]


class Engine:
    """Executes the verbs of one program. Not thread-safe: one step at a time."""

    def __init__(
        self,
        live: Live,
        sources: Mapping[str, str],
        arena: PagedArena | int,
        activations: SlotStore | None = None,
        weights: WeightStream | None = None,
        homes: ProgramHomes | None = None,
        random: bool = False,
        accelerator: Accelerator | None = None,
    ) -> None:
        """arena: or its size. random: the program draws random numbers. accelerator: where it runs, if not on the CPU."""
        self.live = live
        blocks = {name: source for name, source in sources.items() if "#" in source}
        self.getters: dict[str, Getter] = {name: live.getter(source) for name, source in sources.items() if name not in blocks}
        if homes is not None:
            self.getters |= {name: functools.partial(homes.homes.block, source) for name, source in blocks.items()}
        self.tables = {name.rpartition("_rows_")[0]: parent_of(source) for name, source in blocks.items()}
        self.accelerator = accelerator
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        self.pages = arena if isinstance(arena, PagedArena) else PagedArena(arena) if accelerator is None else None
        self.arena = accelerator.empty(arena) if self.pages is None else self.pages.bytes
        self.activations = activations
        self.weights = weights
        self.homes = homes
        self.committed = False
        self._on_view: Callable[[torch.Tensor], None] | None = None
        self._on_decommit: Callable[[int, int], None] | None = None
        self._on_release: Callable[[torch.Tensor], None] | None = None
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self._reading: dict[str, torch.Tensor] = {}
        self._rng: dict[str, RandomState] = {}
        self._rng_now: RandomState | None = None
        self._random = random
        self._rng_before: RandomState | None = None
        self._left: dict[str, torch.Tensor] = {}  # at home in memory and out of it now: a meta tensor like it
        self._hypers: dict[str, Any] = {}

    def begin(self) -> None:
        """Before each step: forget what the last one left."""
        self.committed = False
        self._left.clear()
        self._rng_before = self._random_state() if self._random else None
        self._rng.clear()
        self._reading.clear()
        self._hypers.clear()

    def arrange(self) -> None:
        """Before a step: every persistent tensor is at home."""
        if self.weights is not None:
            self.weights.arrange()
        if self.homes is not None:
            self.homes.arrange()

    def commit(self) -> None:
        """After a step: what it wrote to homes on disk is what they hold from now on."""
        if self.homes is not None:
            self.homes.homes.store.commit()
        self.committed = True
        self._rng_before = None

    @property
    def restorable(self) -> bool:
        """Whether a failed step has changed nothing: all that the program updates lies on disk, where the old generation is intact, and
        what had left memory for a while is back, or comes back now."""
        if self.homes is None or not self.homes.restorable or self.committed:
            return False
        self._bring_back()
        return not self._left

    def abandon(self) -> None:
        """After a failed step: transfers end, homes on disk hold what they held before it, what was out of memory comes back from the scratch
        file (where that fails now, perhaps later), and the generator is where it was. Raises nothing: the error that ended the step is the one
        to show.
        """
        for carrier in (self.activations, self.weights):
            if carrier is not None:
                carrier.settle()
        self._reading.clear()
        if self.homes is not None:
            self.homes.homes.store.abandon()
        self._bring_back()
        if self._rng_before is not None:
            self._set_random_state(self._rng_before)

    def _bring_back(self) -> None:
        for name in tuple(self._left):
            with contextlib.suppress(MebpError, MemoryError, RuntimeError):
                self._read_back(name)

    def _read_back(self, name: str) -> None:
        """What left memory for the scratch file and is still there."""
        assert self.homes is not None
        assert self.activations is not None
        if self._is_out(name):
            like = self._left[name]
            buffer = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)
            self.activations.prefetch(name, buffer)
            self.activations.wait(name)
            self.homes.adopt(name, buffer)
        del self._left[name]

    def _is_out(self, name: str) -> bool:
        try:
            return self.state(name).device.type == "meta"
        except MebpError:
            return True

    # --- memory ---

    def at(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor of this geometry at byte `offset` of the arena. Its bytes are whatever was there before."""
        key = (offset, shape, dtype, stride)
        if self._on_view is not None:
            return self._seen(self._view(*key))
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._view(*key)
        return view

    def _seen(self, view: torch.Tensor) -> torch.Tensor:
        """A view of the arena, or a tensor with pages of its own: not kept here, so that the meter sees it die when the step lets go of it."""
        assert self._on_view is not None
        self._on_view(view)
        return view

    def _view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        if self.pages is not None:
            flat = self.pages.view(offset, count, dtype)
        else:
            flat = self.arena[offset : offset + count * dtype.itemsize].view(dtype)
        return flat.view(shape) if stride is None else flat.as_strided(shape, stride)

    def decommit(self, *ranges: tuple[int, int]) -> None:
        """Pages of the arena, which nothing lives on, go back to the system: bytes [low, high) of each range."""
        assert self.pages is not None
        for low, high in ranges:
            if self._on_decommit is not None:
                self._on_decommit(low, high)
            self.pages.decommit(low, high)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        """An uninitialised tensor from the allocator."""
        if stride is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.empty_strided(shape, stride, dtype=dtype, device=self.device)

    def mapped(self, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor with pages of its own: for what comes back to its home in memory, whose block malloc would keep as a hole when it leaves again."""
        tensor = mapped(shape, dtype, stride)
        return tensor if self._on_view is None else self._seen(tensor)

    @contextlib.contextmanager
    def observed(
        self,
        on_view: Callable[[torch.Tensor], None],
        on_decommit: Callable[[int, int], None] | None = None,
        on_release: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Inside, a meter is told of every view of the arena, which nobody but the step holds, and of bytes of it that go; and of tensors with pages
        of their own that come, and that are about to leave."""
        self._views.clear()
        self._on_view, self._on_decommit, self._on_release = on_view, on_decommit, on_release
        try:
            yield
        finally:
            self._on_view = self._on_decommit = self._on_release = None

    # --- what exists before the step ---

    def state(self, name: str) -> torch.Tensor:
        """A parameter, buffer, optimizer state, constant or resident packed weight, as it is now."""
        getter = self.getters.get(name)
        if getter is None:
            assert self.weights is not None
            return self.weights.resident[name]
        return getter()

    def hyper(self, expression: str) -> Any:
        """A number over the param groups, as it is now."""
        if expression not in self._hypers:
            self._hypers[expression] = self.live.hyper(expression)
        return self._hypers[expression]

    def release(self, name: str) -> None:
        """A persistent storage leaves memory, for good or until it is read again."""
        if self.homes is not None and name in self.homes.resident:
            tensor = self.state(name)
            if self._on_release is not None and has_own_pages(tensor):
                self._on_release(tensor)
            self._left[name] = torch.empty_like(tensor, device="meta")
            del tensor
        for keeper in (self.homes, self.weights):
            if keeper is not None:
                keeper.release(name)

    # --- transfers ---

    def offload(self, name: str, tensor: torch.Tensor) -> None:
        """Start writing a tensor's storage to its place on disk; it must stay as it is until `wait`."""
        self._writer(name).offload(name, tensor)

    def prefetch(self, name: str, buffer: torch.Tensor) -> None:
        """Start reading a storage from disk into a buffer, which is not to be touched until `wait`."""
        self._reading[name] = buffer
        self._carrier(name).prefetch(name, buffer)

    def wait(self, name: str) -> torch.Tensor | None:
        """Complete the transfer of a storage; gives the tensor that was read, if it was a read."""
        self._carrier(name).wait(name)
        tensor = self._reading.pop(name, None)
        for keeper in (self.homes, self.weights):
            if keeper is not None and tensor is not None:
                keeper.adopt(name, tensor)
        if tensor is not None:
            self._left.pop(name, None)
        return tensor

    def _carrier(self, name: str) -> ProgramHomes | WeightStream | SlotStore:
        """Who moves this storage: the weight store, or who may write it too."""
        return self.weights if self.weights is not None and name in self.weights else self._writer(name)

    def _writer(self, name: str) -> ProgramHomes | SlotStore:
        """Its home outside of memory, or the step's own slots."""
        if self.homes is not None and name in self.homes:
            return self.homes
        assert self.activations is not None, f"{name} has no place on disk"
        return self.activations

    # --- random numbers ---

    def rng_save(self, name: str) -> None:
        """Remember the generator's state before a draw that will be repeated."""
        self._rng[name] = self._random_state()

    def rng_replay(self, name: str) -> None:
        """Put the generator where it was before the first draw of this op."""
        self._rng_now = self._random_state()
        self._set_random_state(self._rng[name])

    def rng_return(self) -> None:
        """Put the generator back where it was before the repeated draw."""
        assert self._rng_now is not None
        self._set_random_state(self._rng_now)
        self._rng_now = None

    def _random_state(self) -> RandomState:
        """The state of the CPU's generator, and of the accelerator's."""
        return torch.get_rng_state(), None if self.accelerator is None else self.accelerator.random_state()

    def _set_random_state(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        if self.accelerator is not None and state[1] is not None:
            self.accelerator.set_random_state(state[1])

    # --- streamed weights ---

    def dequantise(self, name: str, packed: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight of a packed record that is in memory."""
        assert self.weights is not None
        record = self.weights.packed(name, packed)
        return dequantise_into(record, self.weights.dense(name) if out is None else out)

    def rows(self, name: str, packed: torch.Tensor | None, tile: slice) -> torch.Tensor:
        """Dense rows of a weight; without its record in memory they are read from disk."""
        assert self.weights is not None
        if packed is None:
            return self.weights.read_rows(name, tile.start, tile.stop)
        return dequantise_rows(self.weights.packed(name, packed), tile.start, tile.stop, self.weights.tile(name, rows=tile))

    def columns(self, name: str, packed: torch.Tensor, tile: slice) -> torch.Tensor:
        """Dense columns of a weight whose record is in memory."""
        assert self.weights is not None
        return dequantise_columns(self.weights.packed(name, packed), tile.start, tile.stop, self.weights.tile(name, columns=tile))

    def embedding(self, name: str, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The rows `ids` of a table on disk, dequantised: shape [*ids.shape, columns]. Reads no other row."""
        assert self.weights is not None
        return self.weights.look_up(name, ids, out)

    def table_rows(self, name: str, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The rows `ids` of a trained table in blocks, as they were before the step: shape [*ids.shape, columns]."""
        assert self.homes is not None
        return self.homes.homes.look_up(self.tables[name], ids, out)

    def product(
        self,
        x: torch.Tensor,
        name: str,
        packed: torch.Tensor,
        transposed: bool,
        trips: int,
        widened: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x times a weight whose record is in memory, or times its transpose, which is made in tiles; see packed_product.py."""
        assert self.weights is not None
        threads = openmp.threads() if self.accelerator is None else 1
        return packed_product.multiply(x, self.weights.packed(name, packed), transposed, trips, widened, out, threads)

    # --- the tiled loss ---

    cross_entropy_begin = staticmethod(cross_entropy.begin)
    cross_entropy_tile = staticmethod(cross_entropy.tile)
    cross_entropy_end = staticmethod(cross_entropy.end)

    def tiles(self, width: int, trips: int) -> Iterator[slice]:
        """The tiles of `width` columns in `trips` parts; the last one may be narrower."""
        try:
            yield from tiles_of(width, tile_size(width, trips))
        finally:
            if self.weights is not None:
                self.weights.end_tiles()

    # --- regions in blocks of tokens ---

    def blocks(self, tokens: int, trips: int) -> Iterator[slice]:
        """The blocks of `tokens` rows in `trips` parts; the last one may have fewer."""
        size = block_rows(tokens, trips)
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens))

    def gather(self, total: torch.Tensor, part: torch.Tensor, tile: slice) -> None:
        """Add a block's part of a sum over the tokens; the first block's is the sum so far."""
        if tile.start == 0:
            total.copy_(part)
        else:
            total.add_(part)
