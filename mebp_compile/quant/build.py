"""Write a weight store: plan the layout from shapes, then stream each tensor through the packer, a few rows at a time.

Nothing but one chunk of dense rows, its codes and one tensor's scales is in memory at any time. The store is written
to a temporary folder beside the target, synced, and renamed into place; on any error the temporary folder is removed
and the target is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mebp_compile.errors import DiskError, OptionError, StoreError
from mebp_compile.quant.layout import PLAIN, TENSOR_ALIGN_BYTES, align_up, choose_scheme, format_named
from mebp_compile.quant.manifest import (
    LAYER_ALIGN_BYTES,
    DataFile,
    Entry,
    Layer,
    Manifest,
    check_tensor_name,
    new_digest,
)
from mebp_compile.quant.safetensors_file import FileTensor, encode_header, fill_holes
from mebp_compile.quant.scheme import Scheme, rows_per_chunk
from mebp_compile.quant.schemes import scheme_named
from mebp_compile.quant.sources import Source

Progress = Callable[[str, int, int], None]  # (tensor just written, bytes done, bytes in all)
MAX_FILE_BYTES = 4 << 30  # a new file starts before a layer that would pass this
_LAYER = re.compile(r"((?:.*?\.)?\d+)\.")
_SCALE_NAMES = {2: "bfloat16", 4: "float32"}


def layer_name(name: str) -> str:
    """The layer a tensor is stored in: its name up to the first number ("model.layers.3"), else its module
    ("model.norm").
    """
    match = _LAYER.match(name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def write_store(
    path: Path,
    model_id: str,
    scheme: str,
    sources: Sequence[Source],
    aliases: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """Write the store of `sources` at `path`, which must not exist (or be an empty folder).

    Raises OptionError (unknown scheme), StoreError (path taken, names, dtypes, NaN weights), DiskError (disk full or
    failing).
    """
    if scheme != PLAIN:
        format_named(scheme)
    with disk_errors(f"looking at {path}"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(f"{path} exists and is not an empty folder", fix="remove it, or choose another path for the store")
    plans = plan_files(scheme, sources)
    total_bytes = sum(plan.payload_bytes for plan in plans)
    with disk_errors(f"writing the weight store {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, total_bytes)
        with _committed_folder(path) as folder:
            writer = _Writer({source.name: source for source in sources}, progress, total_bytes)
            written = [writer.write_file(folder, plan) for plan in plans]
            layers = tuple(layer for _, file_layers in written for layer in file_layers)
            manifest = Manifest(model_id[:512], scheme, tuple(file for file, _ in written), layers, dict(aliases))
            _write_whole(folder / "manifest.json", manifest.to_json())


@dataclass(frozen=True)
class _FilePlan:
    """One file to be written: layers with offsets from the start of the payload, their digests still empty."""

    name: str
    layers: tuple[Layer, ...]
    payload_bytes: int


def plan_files(scheme: str, sources: Sequence[Source]) -> list[_FilePlan]:
    """Lay the tensors out: grouped by layer, layers in order of first appearance, files of at most MAX_FILE_BYTES
    where layers allow.
    """
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(layer_name(check_tensor_name(source.name)), []).append(source)
    plans: list[_FilePlan] = []
    layers: list[Layer] = []
    for name, members in groups.items():
        layer = _plan_layer(scheme, name, members)
        if layers and _end(layers) + layer.length > MAX_FILE_BYTES:
            plans.append(_plan_file(len(plans), layers))
            layers = []
        layers.append(layer)
    return [*plans, _plan_file(len(plans), layers)] if layers else plans


def _plan_layer(scheme: str, name: str, members: Sequence[Source]) -> Layer:
    """A layer at offset 0 of no file yet."""
    entries, position = [], 0
    for source in members:
        chosen = choose_scheme(scheme, source.name, source.shape, source.dtype) if source.quantise else PLAIN
        entry = Entry(source.name, source.shape, source.dtype, chosen, name, "", position)
        entries.append(entry)
        position = align_up(position + entry.length, TENSOR_ALIGN_BYTES)
    return Layer(name, "", 0, align_up(position, LAYER_ALIGN_BYTES), "", tuple(entries))


def _plan_file(index: int, layers: Sequence[Layer]) -> _FilePlan:
    """Place layers one after the other, offsets from the start of the payload."""
    name, position, placed = f"weights-{index:05d}.safetensors", 0, []
    for layer in layers:
        placed.append(_moved(layer, name, position, ""))
        position += layer.length
    return _FilePlan(name, tuple(placed), position)


def _end(layers: Sequence[Layer]) -> int:
    return sum(layer.length for layer in layers)


def _moved(layer: Layer, file: str, shift: int, digest: str) -> Layer:
    """`layer` in `file`, `shift` bytes further on."""
    entries = tuple(
        Entry(entry.name, entry.shape, entry.dtype, entry.scheme, entry.layer, file, entry.offset + shift)
        for entry in layer.entries
    )
    return Layer(layer.name, file, layer.offset + shift, layer.length, digest, entries)


def file_tensors(entry: Entry) -> list[FileTensor]:
    """An entry as the safetensors header lists it: itself when plain, else `<name>.codes` and `<name>.scales`."""
    record = entry.record
    if entry.scheme == PLAIN:
        return [FileTensor(entry.name, entry.dtype, entry.shape, entry.offset)]
    scale_bytes = format_named(entry.scheme).scale_bytes
    scale_shape = (record.rows, record.scale_row_bytes // scale_bytes)
    return [
        FileTensor(f"{entry.name}.codes", "uint8", (record.rows, record.code_row_bytes), entry.offset),
        FileTensor(f"{entry.name}.scales", _SCALE_NAMES[scale_bytes], scale_shape, entry.offset + record.scale_offset),
    ]


class _Writer:
    """Streams layers into files, keeping the digest of the layer at hand and the progress."""

    def __init__(self, sources: Mapping[str, Source], progress: Progress | None, total_bytes: int) -> None:
        self._sources, self._progress, self._total_bytes = sources, progress, total_bytes
        self._done_bytes = 0
        self._fd = -1
        self._digest = new_digest()

    def write_file(self, folder: Path, plan: _FilePlan) -> tuple[DataFile, list[Layer]]:
        """Write and sync one file; its description and its layers with digests and offsets in the file."""
        pieces = [piece for layer in plan.layers for entry in layer.entries for piece in file_tensors(entry)]
        header = encode_header(fill_holes(pieces, plan.payload_bytes), LAYER_ALIGN_BYTES)
        digest = new_digest()
        digest.update(header)
        with _new_file(folder / plan.name) as self._fd:
            _write_all(self._fd, memoryview(header))
            layers = [self._write_layer(layer, len(header)) for layer in plan.layers]
            os.fsync(self._fd)
            _forget_pages(self._fd)
        return DataFile(plan.name, len(header) + plan.payload_bytes, len(header), digest.hexdigest()), layers

    def _write_layer(self, layer: Layer, header_bytes: int) -> Layer:
        self._digest = new_digest()
        position = layer.offset
        for entry in layer.entries:
            self._write(bytes(entry.offset - position))
            self._write_entry(entry)
            position = entry.offset + entry.length
            if self._progress is not None:
                self._progress(entry.name, self._done_bytes, self._total_bytes)
        self._write(bytes(layer.offset + layer.length - position))
        return _moved(layer, layer.file, header_bytes, self._digest.hexdigest())

    def _write_entry(self, entry: Entry) -> None:
        source, record = self._sources[entry.name], entry.record
        step = rows_per_chunk(record)
        chunks = (source.read_rows(r0, min(r0 + step, record.rows)) for r0 in range(0, record.rows, step))
        if entry.scheme == PLAIN:
            for chunk in chunks:
                self._write(_bytes_of(chunk))
            return
        scheme = scheme_named(entry.scheme)
        scales = torch.empty(record.rows, record.scale_row_bytes // scheme.format.scale_bytes, dtype=scheme.scale_dtype)
        row = 0
        for chunk in chunks:
            codes, scales[row : row + len(chunk)] = _pack_rows(scheme, entry.name, chunk)
            self._write(_bytes_of(codes))
            row += len(chunk)
        self._write(bytes(record.scale_offset - record.code_bytes))
        self._write(_bytes_of(scales))

    def _write(self, data: bytes | memoryview) -> None:
        _write_all(self._fd, memoryview(data))
        self._digest.update(data)
        self._done_bytes += len(data)


def _pack_rows(scheme: Scheme, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return scheme.pack_rows(rows)
    except OptionError as error:
        raise StoreError(f"{name}: {error.message}", fix=error.fix) from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor (copied only where it is strided or on another device)."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(fd: int, data: memoryview) -> None:
    """Write all of `data`; a write may take less than it was given."""
    while data:
        with contextlib.suppress(InterruptedError):
            data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _forget_pages(fd: int) -> None:
    """Drop a synced file from the page cache. Written piece by piece it lies there in single pages, which are copied at a third of the speed of
    the long runs that reading brings in (9 against 26 GB/s on ext4)."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice only
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_whole(path: Path, data: bytes) -> None:
    with _new_file(path) as fd:
        _write_all(fd, memoryview(data))
        os.fsync(fd)


@contextlib.contextmanager
def _committed_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends well and removed when it does not."""
    folder = path.parent / f".{path.name}.tmp-{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        yield folder
        _sync_folder(folder)
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_space(folder: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise DiskError(
            f"the store needs {need_bytes} bytes, {folder} has {free_bytes} free",
            fix="free disk space, or use another disk",
        )


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turns an OSError inside the block into a DiskError."""
    try:
        yield
    except OSError as error:
        raise disk_error(doing, error) from error


def disk_error(doing: str, error: OSError) -> DiskError:
    """The DiskError that says what was being done when `error` came."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free disk space, or use another disk" if full else "check the path, its permissions and the disk"
    return DiskError(f"{doing}: {error}", fix=fix)
