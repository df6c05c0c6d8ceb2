"""The threads of torch's own OpenMP library: one of them alone, or each with a piece of work of its own.

With all threads in every op a tile of a weight is written in parts by each of them and read whole by all. Where two cores don't share their last
cache (core complexes of one processor) that makes the products of a step take 1.4 to 1.7 times as long; with a tile for each it costs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Work = Callable[[], None]
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _library() -> Any:
    """The OpenMP library that the process has loaded for all to see, as torch does, by the entry point that compilers call; None without one."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = library.omp_set_num_threads.restype = None
        library.omp_set_num_threads.argtypes = [ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return library


def threads() -> int:
    """Those of a region that the calling thread begins; 1 where they can't be told to do different things."""
    return torch.get_num_threads() if _library() is not None else 1


def together(works: Sequence[Work]) -> None:
    """Each piece of work in a thread of its own, in which no op uses other ones; returns when all are over, and raises what one of them raised."""
    left, errors, grad = list(works), list[BaseException](), torch.is_grad_enabled()

    def member(_: Any) -> None:
        try:
            with torch.set_grad_enabled(grad):  # threads begin with it enabled
                while left:
                    left.pop()()
        except BaseException as error:  # may not pass through C
            errors.append(error)

    if len(works) > 1:
        _library().GOMP_parallel(_REGION(member), None, len(works), 0)
    else:
        member(None)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, ops of the calling thread use no other one, as in `together`."""
    before, library = torch.get_num_threads(), _library()
    if library is not None:
        library.omp_set_num_threads(1)
    try:
        yield
    finally:
        if library is not None:
            library.omp_set_num_threads(before)
