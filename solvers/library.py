"""This package's own C libraries: plain shared libraries, called through ctypes."""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

NATIVE_OPS = 60  # problems of fewer ops are worked on in Python: a call would cost as much as the work


def native(op_count: int, *names: str) -> bool:
    """The libraries are there, and a problem of so many ops is worth a call."""
    return op_count >= NATIVE_OPS and all(load_library(name) is not None for name in names)


@cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The library built from `name`.c; None where it was not built (no C compiler at install) or is for another machine."""
    stem = Path(__file__).with_name(f"_{name}")
    for path in filter(Path.exists, (stem.with_name(stem.name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            return None
    return None


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """To the first element of an array that the caller keeps."""
    return ctypes.c_void_p(array.ctypes.data)
