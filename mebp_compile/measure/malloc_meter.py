"""Reads the malloc meter, a small C library that is preloaded into a process and counts every byte malloc hands out.
Torch-free.

It sees what no torch meter sees: the workspaces that kernels allocate inside an op. It counts what malloc reserves
(malloc_usable_size), so a tensor of n bytes shows as n plus its rounding: up to 100 bytes in the heap, up to a page
when mapped.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mebp_compile.errors import MeasureError

BUILD_FIX = "install a C compiler and then the package again, or go on without measured workspaces"


class MallocMeter:
    """Live and peak bytes of malloc in this process. Only where the library was preloaded: ask
    `MallocMeter.available()` first.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        if not hasattr(library, "mebp_malloc_live"):
            raise MeasureError("the malloc meter is not preloaded", "start this process with preload_environment()")
        self._live = library.mebp_malloc_live
        self._peak = library.mebp_malloc_peak
        self._reset_peak = library.mebp_malloc_reset_peak
        for function in (self._live, self._peak, self._reset_peak):
            function.restype = ctypes.c_int64
            function.argtypes = []

    @staticmethod
    def available() -> bool:
        """True if the library is preloaded into this process."""
        return hasattr(ctypes.CDLL(None), "mebp_malloc_live")

    @property
    def live_bytes(self) -> int:
        return int(self._live())

    @property
    def peak_bytes(self) -> int:
        """The highest `live_bytes` since the last `reset_peak`, or since the process began."""
        return int(self._peak())

    def reset_peak(self) -> int:
        """Set the peak to the bytes live now, and return them."""
        return int(self._reset_peak())


def library_path() -> Path | None:
    """The compiled library beside this file, or None where it was not built."""
    built = sorted(Path(__file__).parent.glob("_malloc_meter*.so"))
    return built[0] if built else None


def preload_environment() -> dict[str, str]:
    """The environment variable that puts the meter into a child process. Raises MeasureError if the library was not
    built.
    """
    library = library_path()
    if library is None:
        raise MeasureError("the malloc meter's library is not built", BUILD_FIX)
    present = os.environ.get("LD_PRELOAD", "")
    if str(library) in present.replace(":", " ").split():
        return {"LD_PRELOAD": present}
    return {"LD_PRELOAD": f"{library} {present}".strip()}
