"""The bytes of a CPU tensor as a memoryview, without a copy."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

from mebp_compile.errors import MeasureError

if TYPE_CHECKING:
    import torch


def memory_of(tensor: torch.Tensor | torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU tensor (or of a whole storage) without a copy; any dtype. The view keeps the memory alive.

    The tensor must cover a gapless range of its storage, in any order of dimensions: a slice of an arena does, every
    other column doesn't. Raises MeasureError otherwise, and for tensors without memory here (meta, fake, another
    device).
    """
    import torch  # not above: the transfer thread also serves programs without torch

    device = tensor.device.type
    if device != "cpu" or type(tensor).__name__ == "FakeTensor":
        raise MeasureError(f"a {type(tensor).__name__} on {device} has no bytes in this memory", "pass a CPU tensor")
    if isinstance(tensor, torch.UntypedStorage):
        return _view(tensor.data_ptr(), tensor.nbytes(), tensor)
    _check_gapless(tensor, "pass its storage or a contiguous copy")
    return _view(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor.untyped_storage())


def _view(address: int, size_bytes: int, owner: object) -> memoryview:
    if size_bytes == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * size_bytes).from_address(address)
    array._owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


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
