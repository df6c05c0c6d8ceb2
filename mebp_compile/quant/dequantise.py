"""Dequantise: one traceable op `mebp::dequantise`, and the row, column and embedding forms that tiled code uses.

`torch.ops.mebp.dequantise(codes, scales, scheme, shape, dtype)` returns the dense weight; `.out` writes it into a
contiguous tensor. Both work on fake and meta tensors, so a trace holds one node per weight. Packed weights are
frozen: there is no derivative. Every form is bit-equal to the same slice of the whole dequantised weight. Results are
bf16 or fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mebp_compile.errors import OptionError
from mebp_compile.quant import native, reference
from mebp_compile.quant.scheme import Packed, Scheme
from mebp_compile.quant.schemes import scheme_named

Make = Callable[[], object]
_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor codes, Tensor scales, str scheme, SymInt[] shape, ScalarType dtype"
_LIBRARY.define(f"dequantise({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"dequantise.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def dequantise(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The dense weight of `packed`, bf16 or fp32, contiguous."""
    result: Tensor = torch.ops.mebp.dequantise(packed.codes, packed.scales, packed.scheme, packed.shape, dtype)
    return result


def dequantise_into(packed: Packed, out: Tensor) -> Tensor:
    """The dense weight into `out` (contiguous, of the weight's shape, bf16 or fp32)."""
    op = torch.ops.mebp.dequantise.out
    result: Tensor = op(packed.codes, packed.scales, packed.scheme, packed.shape, out.dtype, out=out)
    return result


def dequantise_rows(packed: Packed, r0: int, r1: int, out: Tensor) -> Tensor:
    """Rows r0..r1 of the matrix view into `out` [r1 - r0, columns], contiguous."""
    rows_maker(packed, r0, r1, out, torch.get_num_threads())()
    return out


def dequantise_columns(packed: Packed, c0: int, c1: int, out: Tensor) -> Tensor:
    """Columns c0..c1 (multiples of the scheme's group) of the matrix view into `out` [rows, c1 - c0], contiguous."""
    columns_maker(packed, c0, c1, out, torch.get_num_threads())()
    return out


def rows_maker(packed: Packed, r0: int, r1: int, out: Tensor, threads: int = 1) -> Make:
    """`dequantise_rows` for later, on so many threads. The caller keeps `packed` and `out` alive.

    All that is Python's is done here: where two threads make tiles at once, each of a few microseconds, they would wait for each other's turn at
    the interpreter.
    """
    _check_range("row", r0, r1, packed.codes.shape[0], 1)
    _check_out(out, (r1 - r0, packed.shape[-1]), packed.codes)
    return _maker(packed, packed.codes[r0:r1], packed.scales[r0:r1], out, threads)


def columns_maker(packed: Packed, c0: int, c1: int, out: Tensor, threads: int = 1) -> Make:
    """`dequantise_columns` for later, likewise."""
    scheme = scheme_named(packed.scheme)
    _check_range("column", c0, c1, packed.shape[-1], scheme.format.column_multiple)
    _check_out(out, (packed.codes.shape[0], c1 - c0), packed.codes)
    codes = packed.codes[:, c0 * scheme.bits // 8 : c1 * scheme.bits // 8]
    scales = packed.scales[:, c0 // scheme.group : c1 // scheme.group] if scheme.group else packed.scales
    return _maker(packed, codes, scales, out, threads)


def _maker(packed: Packed, codes: Tensor, scales: Tensor, out: Tensor, threads: int) -> Make:
    scheme = scheme_named(packed.scheme)
    if _use_native(codes):
        return native.prepared(scheme, codes, scales, out, threads=threads)
    return functools.partial(reference.dequantise_matrix, scheme, codes, scales, out)


def embedding_rows(packed: Packed, ids: Tensor, out: Tensor) -> Tensor:
    """Row ids[i] of the table into row i of `out` [ids.numel(), columns], contiguous; only the rows looked up are
    dequantised.

    `ids` is any integer tensor. Raises OptionError for an id outside the table.
    """
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    _check_out(out, (flat.numel(), packed.shape[-1]), packed.codes)
    if _use_native(packed.codes):
        native.dequantise_matrix(scheme_named(packed.scheme), packed.codes, packed.scales, out, ids=flat)
        return out
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < packed.codes.shape[0]:
        raise OptionError("a row id lies outside the table", fix="check the token ids against the vocabulary size")
    codes, scales = packed.codes.index_select(0, flat), packed.scales.index_select(0, flat)
    reference.dequantise_matrix(scheme_named(packed.scheme), codes, scales, out)
    return out


def _use_native(codes: Tensor) -> bool:
    return codes.device.type == "cpu" and native.library() is not None


def _run(scheme: Scheme, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantise rows into `out` [rows, columns] by the C kernel, or in torch where there is none."""
    run = native.dequantise_matrix if _use_native(codes) else reference.dequantise_matrix
    run(scheme, codes, scales, out)


def _check_range(what: str, start: int, end: int, limit: int, multiple: int) -> None:
    if not 0 <= start <= end <= limit or start % multiple or end % multiple:
        raise OptionError(
            f"{what} range {start}:{end} does not lie in 0:{limit} on multiples of {multiple}",
            fix=f"tile the {what}s on multiples of {multiple}",
        )


def _check_out(out: Tensor, shape: Sequence[int], codes: Tensor) -> None:
    if (
        tuple(out.shape) != tuple(shape)
        or not out.is_contiguous()
        or out.dtype not in reference.OUT_DTYPES
        or out.device != codes.device
    ):
        raise OptionError(
            f"out must be contiguous {list(shape)} bf16 or fp32 on {codes.device}, not {list(out.shape)} {out.dtype}",
            fix="allocate it with torch.empty(shape, dtype=torch.bfloat16)",
        )


def _check_packed(codes: Tensor, scales: Tensor, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> None:
    """The op's arguments agree with each other. Raises OptionError."""
    if dtype not in reference.OUT_DTYPES:
        raise OptionError(f"can't dequantise to {dtype}", fix="torch.bfloat16 or torch.float32")
    record = scheme.format.record(shape)
    scales_per_row = record.scale_row_bytes // scheme.format.scale_bytes
    want = ((record.rows, record.code_row_bytes), torch.uint8, (record.rows, scales_per_row), scheme.scale_dtype)
    got = (tuple(codes.shape), codes.dtype, tuple(scales.shape), scales.dtype)
    if got != want or not codes.is_contiguous() or not scales.is_contiguous():
        raise OptionError(
            f"packed tensors of {scheme.name} {list(shape)} must be contiguous {want}, not {got}",
            fix="pass the codes and scales of one Packed",
        )


def _dequantise(codes: Tensor, scales: Tensor, scheme: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    return _dequantise_out(codes, scales, scheme, shape, dtype, out=out)


def _dequantise_out(
    codes: Tensor, scales: Tensor, scheme: str, shape: Sequence[int], dtype: torch.dtype, *, out: Tensor
) -> Tensor:
    chosen = scheme_named(scheme)
    _check_packed(codes, scales, chosen, shape, dtype)
    _check_out(out, shape, codes)
    if out.dtype != dtype:
        raise OptionError(f"out is {out.dtype}, the result is {dtype}", fix="give both the same dtype")
    _run(chosen, codes, scales, out.view(codes.shape[0], shape[-1]))
    return out


def _dequantise_fake(codes: Tensor, scales: Tensor, scheme: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    scheme_named(scheme)
    return codes.new_empty(shape, dtype=dtype)


def _dequantise_out_fake(
    codes: Tensor, scales: Tensor, scheme: str, shape: Sequence[int], dtype: torch.dtype, *, out: Tensor
) -> Tensor:
    return out


_LIBRARY.impl("dequantise", _dequantise, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantise.out", _dequantise_out, "CompositeExplicitAutograd")
torch.library.register_fake("mebp::dequantise", _dequantise_fake, lib=_LIBRARY)
torch.library.register_fake("mebp::dequantise.out", _dequantise_out_fake, lib=_LIBRARY)
