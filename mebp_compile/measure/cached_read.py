"""Reads of what the page cache holds, which wait for no disk and are done by all of torch's threads (cached_read.c). Torch-free."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

from mebp_compile.measure.process import available_memory_bytes
from mebp_compile.shared_library import load

CACHE_BYTES = 4 << 30  # of available memory, from which on the page cache is taken to hold the files of a step


class Span(NamedTuple):
    """Bytes of an open file, and where in memory they are read to or written from (0: it can't be told)."""

    fd: int
    offset: int
    size_bytes: int
    address: int

    def overlaps(self, other: Span) -> bool:
        """Whether both have a byte of the file in common."""
        return self.fd == other.fd and self.offset < other.offset + other.size_bytes and other.offset < self.offset + self.size_bytes


def files_stay_cached() -> bool:
    """Whether the system has memory to spare for the files of a step."""
    return available_memory_bytes() >= CACHE_BYTES


def moves_at_once() -> bool:
    """Whether the caller's threads are to copy between files and memory: files stay in the page cache, and C can read them there."""
    return files_stay_cached() and library() is not None


def is_cached(span: Span) -> bool:
    """Whether the page cache seems to hold it (its first and its last byte), and C can read it."""
    lib = library()
    return lib is not None and span.size_bytes > 0 and bool(lib.is_cached(span.fd, span.offset, span.size_bytes))


def read_cached(span: Span) -> bool:
    """Read it if all of it is in the page cache; False where it is not, and is to be read in another way."""
    lib = library()
    return lib is not None and span.address != 0 and bool(lib.cached_read(span.fd, span.offset, span.address, span.size_bytes))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    return load(Path(__file__).with_name("_cached_read"), _declare, "the library that reads the page cache", "a thread reads it")


def _declare(lib: Any) -> None:
    integer = ctypes.c_int64
    lib.cached_read.argtypes = [ctypes.c_int, integer, ctypes.c_void_p, integer]
    lib.is_cached.argtypes = [ctypes.c_int, integer, integer]
    lib.cached_read.restype = lib.is_cached.restype = ctypes.c_int
