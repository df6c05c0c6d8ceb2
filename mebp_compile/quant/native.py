"""The C kernels, called through ctypes: pointers in, the GIL released, no torch headers. Absent without a compiler."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library
from mebp_compile.errors import OptionError
from mebp_compile.quant.scheme import Scheme

PATHS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "neon": 4}

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ROWS: list[Any] = [_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT, _INT]
_ERROR_PATH, _ERROR_ROW = -1, -2
Call = Callable[[], int]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel library beside this file, or None (said once through `logging`) where it was not built or can't be
    loaded.
    """
    stem = Path(__file__).resolve().parent / "_dequantise"
    return shared_library.load(stem, _declare, "the dequantise kernels", "using torch, about 70 times slower")


def _declare(lib: ctypes.CDLL) -> None:
    """Argument types; raises AttributeError where a symbol is missing."""
    lib.mebp_dequantise_paths.argtypes, lib.mebp_dequantise_paths.restype = [], ctypes.c_int32
    lib.mebp_dequantise_table.argtypes = [*_ROWS, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int32] * 3]
    lib.mebp_dequantise_int8.argtypes = [*_ROWS, *[ctypes.c_int32] * 3]
    lib.mebp_dequantise_table.restype = lib.mebp_dequantise_int8.restype = ctypes.c_int32


def available_paths() -> tuple[str, ...]:
    """Names of the paths that this processor runs ("scalar", "avx2", ...); empty without the library."""
    lib = library()
    if lib is None:
        return ()
    bits = lib.mebp_dequantise_paths()
    return tuple(name for name, path in PATHS.items() if path and bits >> path & 1)


@functools.cache
def _level_array(levels: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(levels))(*levels)


def dequantise_matrix(
    scheme: Scheme, codes: Tensor, scales: Tensor, out: Tensor, ids: Tensor | None = None, path: str = "auto"
) -> None:
    """Rows of codes [table_rows, code_row_bytes] and scales [table_rows, scales_per_row] into `out` [rows, columns]
    (bf16 or fp32).

    Row r of `out` is row ids[r] (int64, contiguous), or row r. The rows of codes, scales and out may be strided;
    inside a row they must be dense. All on the CPU. Raises OptionError for a path that this processor lacks or an id
    outside the table.
    """
    _check_status(prepared(scheme, codes, scales, out, ids, path, torch.get_num_threads())(), path)


def prepared(
    scheme: Scheme, codes: Tensor, scales: Tensor, out: Tensor, ids: Tensor | None = None, path: str = "auto", threads: int = 1
) -> Call:
    """`dequantise_matrix` for later: a call that is nothing but the kernel's, on so many threads. The caller keeps the tensors alive. Without
    ids, and by the path that is chosen for this processor, it can't fail."""
    lib = library()
    if lib is None:
        raise OptionError(
            "the dequantise kernels were not built", fix="install a C compiler and reinstall, or use the torch path"
        )
    rows = (
        codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0) * scales.element_size(),
        out.data_ptr(), out.stride(0) * out.element_size(), ids.data_ptr() if ids is not None else None,
        out.shape[0], codes.shape[0],
    )  # fmt: skip
    form = (int(out.dtype == torch.float32), PATHS[path], threads)
    if scheme.levels:
        return functools.partial(lib.mebp_dequantise_table, *rows, out.shape[1] // 64, _level_array(scheme.levels), *form)
    return functools.partial(lib.mebp_dequantise_int8, *rows, out.shape[1], *form)


def _check_status(status: int, path: str) -> None:
    if status == _ERROR_PATH:
        raise OptionError(f"this processor can't run path {path!r}", fix=f"one of {', '.join(available_paths())}")
    if status == _ERROR_ROW:
        raise OptionError("a row id lies outside the table", fix="check the token ids against the vocabulary size")
