"""The weight store: packed weights in a folder, read by offset into buffers that the caller owns. Never mapped, never
pickled.

    store = WeightStore.from_checkpoint("Qwen2.5-0.5B", "qwen.int4", "int4")
    buffer = torch.empty(store.entry(name).length, dtype=torch.uint8)
    store.read_into(name, buffer)                     # one read: codes and scales
    weight = quant.dequantise(store.packed(name, buffer))

A folder holds `manifest.json` and safetensors files (quant/manifest.py and quant/layout.py describe the bytes).
Opening checks the manifest, the header and the size of every file; the digest of a layer is checked when it is first
touched in a process. Reads are thread-safe: they share nothing but file descriptors and take their offsets as
arguments.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from mebp_compile.errors import OptionError, StoreError
from mebp_compile.measure.cached_read import Span
from mebp_compile.measure.memory import place_of
from mebp_compile.quant.build import Progress, disk_error, disk_errors, write_store
from mebp_compile.quant.dequantise import dequantise
from mebp_compile.quant.layout import PLAIN, Record
from mebp_compile.quant.manifest import Entry, Layer, Manifest, new_digest
from mebp_compile.quant.scheme import Packed, view_record
from mebp_compile.quant.schemes import scheme_named
from mebp_compile.quant.sources import Select, checkpoint_sources, module_sources, random_sources
from mebp_compile.runtime.store_files import DAMAGED, VERIFY_CHUNK_BYTES, check_file, close_all, open_regular, read_manifest

Buffer = Tensor | memoryview | bytearray


class WeightStore:
    """An open store, from `open` or one of the `from_*` builders. Use it as a context manager, or `close` it."""

    def __init__(self, path: Path, manifest: Manifest, files: Mapping[str, int], drop_cache: bool) -> None:
        """Used by `open`. `files` maps file names to open descriptors, which the store now owns."""
        self.path = path
        self.manifest = manifest
        self._entries = {entry.name: entry for entry in manifest.entries()}
        self._layers = {layer.name: layer for layer in manifest.layers}
        self._files = dict(files)
        self._drop_cache = drop_cache
        self._locks = {name: threading.Lock() for name in self._layers}
        self._verified: set[str] = set()
        self._close = weakref.finalize(self, close_all, tuple(files.values()))

    # ---- open and build ----

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, drop_cache: bool = False) -> WeightStore:
        """Open a store and check its manifest, its headers and the sizes of its files. Raises StoreError for anything
        wrong.

        `drop_cache` tells the kernel after each read that the pages won't be needed again.
        """
        folder, files = Path(path), {}
        try:
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"no weight store at {folder}: {error.strerror}", fix="build it with WeightStore.from_checkpoint"
            ) from error
        try:
            manifest = Manifest.from_json(read_manifest(folder_fd))
            for file in manifest.files:
                files[file.name] = open_regular(folder_fd, file.name)
                check_file(files[file.name], file)
            return cls(folder, manifest, files, drop_cache)
        except BaseException:
            close_all(tuple(files.values()))
            raise
        finally:
            close_all((folder_fd,))

    @classmethod
    def from_module(
        cls, module: nn.Module, path: str | os.PathLike[str], scheme: str, select: Select | None = None, *,
        model_id: str = "", progress: Progress | None = None,
    ) -> WeightStore:  # fmt: skip
        """Store parameters of `module`: those for which `select(name, parameter)` holds, by default frozen ones of 2
        or more dimensions.

        Tied parameters are stored once, their further names become aliases. `scheme` "none" stores them unquantised.
        """
        sources, aliases = module_sources(module, select)
        write_store(Path(path), model_id or type(module).__name__, scheme, sources, aliases, progress)
        return cls.open(path)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        path: str | os.PathLike[str],
        scheme: str,
        *,
        progress: Progress | None = None,
    ) -> WeightStore:
        """Store every tensor of a Hugging Face safetensors folder (one file, or shards and index), under its name
        there.
        """
        with disk_errors(f"reading the checkpoint {folder}"), checkpoint_sources(Path(folder)) as sources:
            write_store(Path(path), Path(folder).name, scheme, sources, {}, progress)
        return cls.open(path)

    @classmethod
    def from_config(
        cls, model: nn.Module, path: str | os.PathLike[str], scheme: str, seed: int, *,
        select: Select | None = None, progress: Progress | None = None,
    ) -> WeightStore:  # fmt: skip
        """Store random weights for the parameters of `model`, which may be on meta: for trials without a checkpoint.

        Normal with standard deviation 0.02 (fewer than two dimensions: ones, biases zeros); decided by seed and name
        alone.
        """
        sources, aliases = random_sources(model, seed, select)
        write_store(Path(path), f"{type(model).__name__} (random, seed {seed})", scheme, sources, aliases, progress)
        return cls.open(path)

    def close(self) -> None:
        """Close the files. No read may be under way; a closed store can't be read."""
        self._close()
        self._files = {}

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what is stored ----

    @property
    def scheme(self) -> str:
        return self.manifest.scheme

    @property
    def names(self) -> tuple[str, ...]:
        """Stored tensors, in file order, without aliases."""
        return tuple(self._entries)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied tensors -> the stored name. Every method takes either."""
        return self.manifest.aliases

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self.aliases

    def entry(self, name: str) -> Entry:
        """Shape, dtype, scheme and place of a tensor. Raises OptionError for an unknown name."""
        target = self.aliases.get(name, name)
        if target not in self._entries:
            raise OptionError(f"the store {self.path} has no tensor {name!r}", fix="store.names lists what it has")
        return self._entries[target]

    def rows_bytes(self, name: str, rows: int) -> int:
        """Bytes that `rows` rows of a tensor take in a buffer: codes, padding to 64, scales."""
        return _with_rows(self.entry(name).record, rows).size_bytes

    # ---- read ----

    def read_into(self, name: str, buffer: Buffer) -> int:
        """Fill the start of `buffer` with the whole record, by one contiguous read; the bytes filled
        (`entry(name).length`).

        `buffer`: contiguous u8 CPU tensor, or writable bytes. Raises OptionError (too small), StoreError (damaged),
        DiskError.
        """
        entry = self.entry(name)
        self._touch(entry)
        self._read(entry.file, _writable(buffer, entry.length), entry.offset)
        return entry.length

    def whole_read(self, name: str, buffer: Tensor) -> Span | None:
        """`read_into` as a plain read, once the record's layer was checked; None where it is more than that."""
        entry = self.entry(name)
        if entry.layer not in self._verified or self._drop_cache or entry.file not in self._files:
            return None
        place = place_of(buffer)
        return None if place.nbytes < entry.length else Span(self._files[entry.file], entry.offset, entry.length, place.address)

    def read_rows_into(self, name: str, r0: int, r1: int, buffer: Buffer) -> int:
        """Fill `buffer` with a record of rows r0..r1 of the matrix view: one read of codes, one of scales; the bytes
        filled.

        `packed(name, buffer, rows=r1 - r0)` views it.
        """
        return self._read_runs(name, [(r0, r1)], buffer)

    def read_selected_rows_into(self, name: str, ids: Sequence[int] | Tensor, buffer: Buffer) -> int:
        """Fill `buffer` with a record of the rows `ids`, in that order (an embedding lookup); runs of consecutive ids
        are read at once.
        """
        return self._read_runs(name, _runs(ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids), buffer)

    def _read_runs(self, name: str, runs: Sequence[tuple[int, int]], buffer: Buffer) -> int:
        entry = self.entry(name)
        whole = entry.record
        if not all(0 <= r0 <= r1 <= whole.rows for r0, r1 in runs):
            raise OptionError(
                f"rows outside 0:{whole.rows} of {name}", fix="check the token ids against the vocabulary size"
            )
        part = _with_rows(whole, sum(r1 - r0 for r0, r1 in runs))
        view = _writable(buffer, part.size_bytes)
        self._touch(entry)
        row = 0
        for r0, r1 in runs:
            after = row + r1 - r0
            codes = view[row * whole.code_row_bytes : after * whole.code_row_bytes]
            self._read(entry.file, codes, entry.offset + r0 * whole.code_row_bytes)
            start, end = (part.scale_offset + at * whole.scale_row_bytes for at in (row, after))
            self._read(entry.file, view[start:end], entry.offset + whole.scale_offset + r0 * whole.scale_row_bytes)
            row = after
        return part.size_bytes

    def packed(self, name: str, buffer: Buffer, rows: int | None = None) -> Packed:
        """The codes and scales of a quantised tensor inside a buffer that was read into. No bytes are copied.

        `rows`: the number of rows that a row read put there; None: the whole tensor.
        """
        entry = self.entry(name)
        if entry.scheme == PLAIN:
            raise OptionError(f"{name} is stored unquantised", fix="use store.plain(name, buffer)")
        record, shape = _part(entry, rows)
        return view_record(scheme_named(entry.scheme), record, shape, _as_tensor(buffer, record.size_bytes))

    def plain(self, name: str, buffer: Buffer, rows: int | None = None) -> Tensor:
        """An unquantised tensor inside a buffer that was read into. No bytes are copied."""
        entry = self.entry(name)
        if entry.scheme != PLAIN:
            raise OptionError(f"{name} is stored as {entry.scheme}", fix="use store.packed(name, buffer)")
        record, shape = _part(entry, rows)
        return _as_tensor(buffer, record.size_bytes).view(getattr(torch, entry.dtype)).view(shape)

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, dequantised, in its original dtype or in `dtype` (from fp32 for dtypes other than bf16
        and fp32).
        """
        entry = self.entry(name)
        buffer = torch.empty(entry.length, dtype=torch.uint8)
        self.read_into(name, buffer)
        want = dtype or getattr(torch, entry.dtype)
        if entry.scheme == PLAIN:
            return self.plain(name, buffer).to(want)
        return dequantise(self.packed(name, buffer), want if want == torch.bfloat16 else torch.float32).to(want)

    # ---- check ----

    def verify(self) -> None:
        """Check the digest of every layer again. Raises StoreError for the first that does not match."""
        for layer in self.manifest.layers:
            self._check_digest(layer)

    def _touch(self, entry: Entry) -> None:
        """Check the digest of the tensor's layer, once in the life of this object."""
        if entry.layer in self._verified:
            return
        with self._locks[entry.layer]:
            if entry.layer not in self._verified:
                self._check_digest(self._layers[entry.layer])
                self._verified.add(entry.layer)

    def _check_digest(self, layer: Layer) -> None:
        digest, chunk = new_digest(), memoryview(bytearray(min(VERIFY_CHUNK_BYTES, layer.length)))
        for start in range(0, layer.length, VERIFY_CHUNK_BYTES):
            part = chunk[: min(VERIFY_CHUNK_BYTES, layer.length - start)]
            self._read(layer.file, part, layer.offset + start)
            digest.update(part)
        if digest.hexdigest() != layer.digest:
            raise StoreError(f"layer {layer.name} of {self.path} is damaged: its digest does not match", fix=DAMAGED)

    def _read(self, file: str, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`, however many reads that takes. Raises StoreError (short file, closed store),
        DiskError.
        """
        if file not in self._files:
            raise StoreError(f"the store {self.path} is closed", fix="open it again with WeightStore.open")
        fd, start, length = self._files[file], offset, len(view)
        try:
            while view:
                try:
                    count = os.preadv(fd, [view], offset)
                except InterruptedError:
                    continue
                if count == 0:
                    raise StoreError(f"{self.path / file} became shorter while it was open", fix=DAMAGED)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise disk_error(f"reading {self.path / file}", error) from error
        if self._drop_cache and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def _with_rows(record: Record, rows: int) -> Record:
    return Record(rows, record.columns, record.code_row_bytes, record.scale_row_bytes)


def _part(entry: Entry, rows: int | None) -> tuple[Record, tuple[int, ...]]:
    """Record and dense shape of the whole tensor, or of some of its rows."""
    if rows is None:
        return entry.record, entry.shape
    return _with_rows(entry.record, rows), (rows, entry.record.columns)


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive ids: [7, 8, 9, 3] -> [(7, 10), (3, 4)]."""
    runs: list[tuple[int, int]] = []
    for row in ids:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _as_tensor(buffer: Buffer, size_bytes: int) -> Tensor:
    """The first `size_bytes` of a buffer as a u8 tensor that shares its memory. Raises OptionError."""
    if not isinstance(buffer, Tensor):
        view = memoryview(buffer).cast("B")
        buffer = torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
    suits = buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous() and buffer.device.type == "cpu"
    if not suits or buffer.numel() < size_bytes:
        raise OptionError(
            f"the buffer must be one dimension of {size_bytes} or more contiguous u8 on the CPU, "
            f"not {list(buffer.shape)} {buffer.dtype}",
            fix="torch.empty(store.entry(name).length, dtype=torch.uint8)",
        )
    return buffer[:size_bytes]


def _writable(buffer: Buffer, size_bytes: int) -> memoryview:
    """The first `size_bytes` of a buffer, to be written. Raises OptionError for a buffer that is too small or read-
    only.
    """
    if isinstance(buffer, Tensor):
        return _as_tensor(buffer, size_bytes).numpy().data
    view = memoryview(buffer).cast("B")
    if view.readonly or len(view) < size_bytes:
        raise OptionError(
            f"the buffer must be {size_bytes} or more writable bytes", fix="bytearray(store.entry(name).length)"
        )
    return view[:size_bytes]
