"""The arena's memory on the CPU: one range of addresses whose pages can go back to the system in mid-step and come again, empty, when used."""

from __future__ import annotations

import mmap

import torch


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


def _mapped(size_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"can't map {size_bytes:,} bytes for the arena") from error
