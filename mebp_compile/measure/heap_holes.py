"""Holes in glibc's heap: given back to the system, and closed, so that no later allocation fills them again. Torch-free, Linux.

malloc_trim gives the pages of free blocks back and leaves the blocks to malloc, which goes round them: blocks of a few MB at a time came back
to 43 MB of holes within one step. A hole that is allocated and never written takes addresses, and no page but the one with its header.
"""

from __future__ import annotations

import ctypes
import threading

from mebp_compile.measure.process import PAGE_BYTES, malloc_trim

SMALLEST_BYTES = PAGE_BYTES + 64  # what malloc_trim leaves of the heap's end is smaller, and so is a block with no whole page in it
SIZES = tuple(size for size in (int(2 ** (19 - quarter / 4)) for quarter in range(28)) if size >= SMALLEST_BYTES)  # below every mapping threshold

_lock = threading.Lock()
_plugs: list[int] = []


def close_holes() -> int:
    """Give malloc's free pages back and take the holes' addresses: what is allocated afterwards lies at the heap's end, packed as malloc packs.

    Returns the bytes taken; 0 without glibc, or where the calling thread has a heap of its own. A second call begins by freeing what the first
    took, so that holes join.
    """
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("__libc_malloc", "__libc_free", "sbrk")):
        return 0
    malloc, free, sbrk = library.__libc_malloc, library.__libc_free, library.sbrk  # behind any meter of malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    free.restype, free.argtypes = None, (ctypes.c_void_p,)
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t,)
    with _lock:
        while _plugs:
            free(_plugs.pop())
        malloc_trim()
        end, taken_bytes = sbrk(0), 0
        for size_bytes in SIZES:
            while (address := malloc(size_bytes)) and address + size_bytes <= end:
                _plugs.append(address)
                taken_bytes += size_bytes
            free(address)  # the one from the heap's end or beyond, or None
    return taken_bytes
