"""When the system has no memory left: torch says so by a RuntimeError, Python by a MemoryError; users get one typed error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mebp_compile.errors import MebpError, OutOfMemory

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
MEMORY_FIX = "end other programs, lift the process's memory limit, or plan with a smaller budget"


@contextlib.contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turns a failed allocation inside the block, torch's or Python's, into an OutOfMemory that says what was being done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MebpError) or not _is_shortage(error):
            raise
        raise OutOfMemory(f"{doing}: the system has no memory left ({error})", MEMORY_FIX) from error


def _is_shortage(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)
