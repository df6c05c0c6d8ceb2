"""Memory on the CPU that goes back to the system by the page: the arena, one range of addresses whose pages can go in mid-step and come again,
empty, when used; and tensors with pages of their own."""

from __future__ import annotations

import math
import mmap

import torch

from mebp_compile.overhead import MAPPED_BYTES


class PagedArena:
    """`bytes`: the memory as a uint8 tensor that starts on a page. A page of it is in memory from its first use on."""

    def __init__(self, size_bytes: int) -> None:
        self._map = _mapped(max(1, size_bytes))
        self.bytes = self.view(0, size_bytes, torch.uint8) if size_bytes else torch.empty(0, dtype=torch.uint8)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` numbers from byte `offset` on, as a storage of its own."""
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def keep_pages_small(self) -> None:
        """No huge pages, of which a few bytes in use would keep 2 MiB in memory."""
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)

    def decommit(self, low: int, high: int) -> None:
        """The whole pages of bytes [low, high) go back to the system; what was in them is lost."""
        first, last = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def mapped(shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
    """An uninitialised dense tensor whose pages go back to the system with it; malloc would keep its block as a hole. A small one is malloc's."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype) if stride is None else torch.empty_strided(shape, stride, dtype=dtype)
    flat = torch.frombuffer(_mapped(size_bytes), dtype=dtype)
    return flat.view(shape) if stride is None else flat.as_strided(shape, stride)


def has_own_pages(tensor: torch.Tensor) -> bool:
    """Whether it is a large one that `mapped` made: malloc's blocks don't begin on a page, for a header lies before them."""
    return tensor.untyped_storage().nbytes() >= MAPPED_BYTES and tensor.untyped_storage().data_ptr() % mmap.PAGESIZE == 0


def with_own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it with pages of its own if it is large and has none."""
    if tensor.nbytes < MAPPED_BYTES or tensor.device.type != "cpu" or has_own_pages(tensor):
        return tensor
    return mapped(tuple(tensor.shape), tensor.dtype, tensor.stride()).copy_(tensor)


def _mapped(size_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"can't map {size_bytes:,} bytes") from error
