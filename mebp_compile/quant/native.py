"""The C kernels, called through ctypes: pointers in, the GIL released, no torch headers. Absent without a compiler."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
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
    if library() is None:
        raise OptionError(
            "the dequantise kernels were not built", fix="install a C compiler and reinstall, or use the torch path"
        )
    call = _kernel(
        scheme,
        codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0) * scales.element_size(),
        out.data_ptr(), out.stride(0) * out.element_size(), ids.data_ptr() if ids is not None else None,
        out.shape[0], codes.shape[0], out.shape[1], out.dtype, path, torch.get_num_threads(),
    )  # fmt: skip
    _check_status(call(), path)


def tile_calls(scheme: Scheme, codes: Tensor, scales: Tensor, tiles: Sequence[slice], by_rows: bool, columns: int, out: Tensor) -> list[Call]:
    """For each tile, rows or columns, a call that makes it at the start of `out`; see `dequantise.tile_makers`. columns: of the dense matrix."""
    code_bytes, scale_bytes = codes.stride(0), scales.stride(0) * scales.element_size()
    table, calls = codes.shape[0], list[Call]()
    for tile in tiles:
        first, length = tile.start, tile.stop - tile.start
        if by_rows:
            rows, width = length, columns
            code, scale = first * code_bytes, first * scale_bytes
        else:
            rows, width = table, length
            code, scale = first * scheme.bits // 8, first // scheme.group * scales.element_size() if scheme.group else 0
        calls.append(_kernel(
            scheme, codes.data_ptr() + code, code_bytes, scales.data_ptr() + scale, scale_bytes,
            out.data_ptr(), width * out.element_size(), None, rows, rows, width, out.dtype, "auto", 1,
        ))  # fmt: skip
    return calls


def _kernel(scheme: Scheme, *arguments: Any) -> Call:
    """The call of the scheme's kernel: codes, bytes of a row, scales, bytes of a row, out, bytes of a row, ids, rows, rows of the table, columns,
    dtype, path, threads."""
    *rows, columns, dtype, path, threads = arguments
    lib, form = library(), (int(dtype == torch.float32), PATHS[path], threads)
    assert lib is not None
    if scheme.levels:
        return functools.partial(lib.mebp_dequantise_table, *rows, columns // 64, _level_array(scheme.levels), *form)
    return functools.partial(lib.mebp_dequantise_int8, *rows, columns, *form)


def _check_status(status: int, path: str) -> None:
    if status == _ERROR_PATH:
        raise OptionError(f"this processor can't run path {path!r}", fix=f"one of {', '.join(available_paths())}")
    if status == _ERROR_ROW:
        raise OptionError("a row id lies outside the table", fix="check the token ids against the vocabulary size")
