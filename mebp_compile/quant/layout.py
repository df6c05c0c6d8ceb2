"""Where the bytes of a packed weight lie. Torch-free, so that a manifest can be checked without torch.

A weight of shape [..., columns] is a matrix of rows = product of the leading dimensions. Its record is one run of
bytes:
    codes   u8 [rows, code_row_bytes]      row-major, no gaps
    pad     zero bytes up to a multiple of 64
    scales  [rows, scales_per_row]         bf16 (int4, nf4) or fp32 (int8)
so a whole weight is one read, and a row range is one read of codes and one of scales.
int4/nf4: a group is 64 columns in 32 bytes; byte j holds column j in its low nibble and column j + 32 in its high
nibble. int8: one two's complement byte a column, one scale a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mebp_compile.errors import OptionError

TENSOR_ALIGN_BYTES = 64
MIN_INT8_COLUMNS = 32  # below this the fp32 scale of a row costs more than an eighth of its codes


def align_up(size_bytes: int, align_bytes: int) -> int:
    """The smallest multiple of `align_bytes` that is not below `size_bytes`."""
    return -(-size_bytes // align_bytes) * align_bytes


@dataclass(frozen=True)
class Record:
    """Byte layout of one stored tensor, offsets from the start of its record. Plain tensors have no scales."""

    rows: int
    columns: int
    code_row_bytes: int
    scale_row_bytes: int

    @property
    def code_bytes(self) -> int:
        return self.rows * self.code_row_bytes

    @property
    def scale_bytes(self) -> int:
        return self.rows * self.scale_row_bytes

    @property
    def scale_offset(self) -> int:
        return align_up(self.code_bytes, TENSOR_ALIGN_BYTES) if self.scale_row_bytes else self.code_bytes

    @property
    def size_bytes(self) -> int:
        return self.scale_offset + self.scale_bytes


@dataclass(frozen=True)
class Format:
    """The byte format of a scheme: `bits` a code, one scale of `scale_bytes` a `group` of columns (0: a whole row)."""

    name: str
    bits: int
    group: int
    scale_bytes: int

    @property
    def column_multiple(self) -> int:
        """Column ranges start and end on multiples of this."""
        return self.group or 1

    def supports(self, shape: Sequence[int]) -> bool:
        """True for non-empty tensors of two or more dimensions whose last one suits the groups (int8: at least 32
        columns).
        """
        if len(shape) < 2 or 0 in shape:
            return False
        return shape[-1] % self.group == 0 if self.group else shape[-1] >= MIN_INT8_COLUMNS

    def record(self, shape: Sequence[int]) -> Record:
        """The layout of a weight of `shape`. Raises OptionError for a shape that the format does not support."""
        if not self.supports(shape):
            want = (
                f"a last dimension that is a multiple of {self.group}"
                if self.group
                else f"{MIN_INT8_COLUMNS} columns or more"
            )
            raise OptionError(
                f"{self.name} can't hold shape {list(shape)}: it needs two or more dimensions and {want}",
                fix="use int8, or leave this tensor unquantised",
            )
        rows, columns = math.prod(shape[:-1]), shape[-1]
        scales = columns // self.group if self.group else 1
        return Record(rows, columns, columns * self.bits // 8, scales * self.scale_bytes)


FORMATS = {
    "int4": Format("int4", bits=4, group=64, scale_bytes=2),
    "nf4": Format("nf4", bits=4, group=64, scale_bytes=2),
    "int8": Format("int8", bits=8, group=0, scale_bytes=4),
}
PLAIN = "none"  # the scheme name of a tensor stored as it is
ITEM_BYTES = {  # dtypes a store may hold, by torch name
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
QUANTISABLE_DTYPES = ("float32", "float16", "bfloat16")


def format_named(scheme: str) -> Format:
    """The format of a scheme. Raises OptionError for an unknown name."""
    if scheme not in FORMATS:
        raise OptionError(f"unknown scheme {scheme!r}", fix=f"one of {', '.join(FORMATS)}")
    return FORMATS[scheme]


def plain_record(shape: Sequence[int], dtype: str) -> Record:
    """The layout of an unquantised tensor: rows of its last dimension, no scales (a 0-d tensor is one row of one
    column).
    """
    columns = shape[-1] if shape else 1
    return Record(math.prod(shape[:-1]), columns, columns * ITEM_BYTES[dtype], 0)


def record_of(scheme: str, shape: Sequence[int], dtype: str) -> Record:
    """The layout of a stored tensor, quantised or plain. Raises OptionError for an unknown scheme or an unsupported
    shape.
    """
    return plain_record(shape, dtype) if scheme == PLAIN else format_named(scheme).record(shape)


def never_quantised(name: str) -> bool:
    """True for biases and norm weights, by name: the last part ends in "bias", or one of the last two parts contains
    "norm".
    """
    parts = name.lower().split(".")
    return parts[-1].endswith("bias") or any("norm" in part for part in parts[-2:])


def choose_scheme(scheme: str, name: str, shape: Sequence[int], dtype: str) -> str:
    """The scheme a tensor is stored in when `scheme` was asked for.

    `scheme` where it supports the shape; else int8 where that does (a last dimension that is no multiple of 64); else
    "none": biases, norm weights, tensors of fewer than two dimensions, dtypes other than fp32, fp16 and bf16.
    """
    if scheme == PLAIN or never_quantised(name) or dtype not in QUANTISABLE_DTYPES:
        return PLAIN
    for candidate in (format_named(scheme), FORMATS["int8"]):
        if candidate.supports(shape):
            return candidate.name
    return PLAIN
