"""Tensors in a safetensors file, written and read one at a time: never mapped, never pickled, at most one more of them in memory than before.

A tensor that is not contiguous is stored as the flat run of memory that it covers; its geometry is kept beside the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mebp_compile.errors import DiskError, StoreError
from mebp_compile.measure.file_io import read_all
from mebp_compile.measure.memory import memory_of
from mebp_compile.quant.safetensors_file import FILE_NAMES, FileTensor, encode_header, read_header
from mebp_compile.whole_file import whole_file

HEADER_ALIGN = 64
CHUNK_BYTES = 256 << 10  # memory taken while a digest is checked
DAMAGED = "save the step again, or restore its files from a copy"


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its memory; dtype is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        return Geometry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride())

    @staticmethod
    def from_data(data: list[Any]) -> Geometry:
        dtype, shape, stride = data
        return Geometry(str(dtype), tuple(map(int, shape)), tuple(map(int, stride)))

    def to_data(self) -> list[Any]:
        return [self.dtype, list(self.shape), list(self.stride)]

    def by_rows(self) -> Geometry:
        """The same tensor where it is contiguous."""
        return Geometry(self.dtype, self.shape, torch.empty(self.shape, device="meta").stride())

    @property
    def contiguous(self) -> bool:
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The tensor's own shape where it is contiguous, else the number of elements between its first and its last."""
        return self.shape if self.contiguous else (self._span,)

    @property
    def _span(self) -> int:
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's memory, as it is stored."""
        return tensor if self.contiguous else tensor.as_strided((self._span,), (1,))

    def read(self, fill: Callable[[memoryview], None]) -> torch.Tensor:
        """A new tensor of this geometry whose memory `fill` writes."""
        flat = torch.empty(self.stored_shape, dtype=getattr(torch, self.dtype))
        fill(memory_of(flat))
        return flat if Geometry.of(flat) == self else flat.as_strided(self.shape, self.stride)


def write_tensors(path: Path, geometries: Mapping[str, Geometry], give: Callable[[str], torch.Tensor]) -> str:
    """Write the file, whole or not at all; its SHA-256. `give` is asked for each tensor in turn. Raises DiskError, StoreError."""
    header = encode_header(list(_layout(geometries)), HEADER_ALIGN)
    digest = hashlib.sha256(header)
    try:
        with whole_file(path) as file:
            file.write(header)
            for name, geometry in geometries.items():
                memory = memory_of(geometry.flat(give(name).detach()))
                digest.update(memory)
                file.write(memory)
    except OSError as error:
        raise DiskError(f"can't write {path}: {error.strerror}", "free space, or give a folder that can be written") from error
    return digest.hexdigest()


def _layout(geometries: Mapping[str, Geometry]) -> Iterator[FileTensor]:
    """The tensors back to back. Raises StoreError for a dtype that the format has no name for."""
    offset = 0
    for name, geometry in geometries.items():
        if geometry.dtype not in FILE_NAMES:
            raise StoreError(f"{name} is of dtype {geometry.dtype}, which safetensors files don't hold here", f"use {', '.join(FILE_NAMES)}")
        tensor = FileTensor(name, geometry.dtype, geometry.stored_shape, offset)
        offset = tensor.end
        yield tensor


class TensorFile:
    """A file that `write_tensors` wrote, open for reading. Raises StoreError where its bytes are not those that were written."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)
        except OSError as error:
            raise StoreError(f"can't read {path}: {error.strerror}", DAMAGED) from error
        try:
            self._check(digest)
            self._start, self.tensors = read_header(self._file.fileno(), str(path))
        except BaseException:
            self._file.close()
            raise

    def _check(self, digest: str) -> None:
        found, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
        while count := self._file.readinto(chunk):  # type: ignore[attr-defined]
            found.update(chunk[:count])
        if found.hexdigest() != digest:
            raise StoreError(f"{self.path} is not the file that was saved with this step", DAMAGED)

    def read(self, name: str, geometry: Geometry) -> torch.Tensor:
        """The tensor, in memory of its own. Raises StoreError where the file has another one of that name, or none."""
        stored = self.tensors.get(name)
        if stored is None or (stored.dtype, stored.shape) != (geometry.dtype, geometry.stored_shape):
            raise StoreError(f"{self.path} has no tensor {name} of {geometry.dtype} {list(geometry.stored_shape)}", DAMAGED)
        return geometry.read(lambda memory: read_all(self._file.fileno(), self._start + stored.offset, memory))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
