"""Where the bytes of a CPU tensor lie, and a memoryview of them, without a copy."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, NamedTuple

from mebp_compile.errors import MeasureError

if TYPE_CHECKING:
    import torch


class Place(NamedTuple):
    """Bytes of this process's memory, which `owner` keeps alive: made in a tenth of the time that a memoryview of them takes."""

    address: int
    nbytes: int
    owner: object

    @property
    def view(self) -> memoryview:
        """The bytes; the view keeps the memory alive."""
        if isinstance(self.owner, memoryview):
            return self.owner
        if self.nbytes == 0:
            return memoryview(bytearray())
        array = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        array._owner = self.owner  # type: ignore[attr-defined]
        return memoryview(array).cast("B")


def place_of(tensor: torch.Tensor | torch.UntypedStorage) -> Place:
    """The bytes of a CPU tensor (or of a whole storage); any dtype.

    The tensor must cover a gapless range of its storage, in any order of dimensions: a slice of an arena does, every
    other column doesn't. Raises MeasureError otherwise, and for tensors without memory here (meta, fake, another
    device).
    """
    import torch  # not above: the transfer thread also serves programs without torch

    device = tensor.device.type
    if device != "cpu" or type(tensor).__name__ == "FakeTensor":
        raise MeasureError(f"a {type(tensor).__name__} on {device} has no bytes in this memory", "pass a CPU tensor")
    if isinstance(tensor, torch.UntypedStorage):
        return Place(tensor.data_ptr(), tensor.nbytes(), tensor)
    if not tensor.is_contiguous():
        _check_gapless(tensor, "pass its storage or a contiguous copy")
    return Place(tensor.data_ptr(), tensor.nbytes, tensor.untyped_storage())


def place_in(buffer: memoryview) -> Place:
    """The bytes of a buffer; the address of one that is read-only, or empty, is 0: it can't be told."""
    view = memoryview(buffer)
    flat = view if view.nbytes == 0 else view.cast("B")
    known = flat.nbytes and not flat.readonly
    return Place(ctypes.addressof(ctypes.c_char.from_buffer(flat)) if known else 0, flat.nbytes, flat)


def memory_of(tensor: torch.Tensor | torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU tensor without a copy, as in `place_of`. The view keeps the memory alive."""
    return place_of(tensor).view


def _check_gapless(tensor: torch.Tensor, fix: str) -> None:
    if not _is_gapless(tuple(tensor.shape), tensor.stride()):
        raise MeasureError(f"a tensor of shape {list(tensor.shape)} and stride {list(tensor.stride())} has gaps or repeats", fix)


def _is_gapless(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True if some order of the dimensions is contiguous (empty tensors are)."""
    if math.prod(shape) == 0:
        return True
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on any device as one dimension of uint8, without a copy: what `memory_of` is for the CPU. Raises MeasureError for one
    with gaps or repeats."""
    import torch

    _check_gapless(tensor, "pass a contiguous copy")
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
