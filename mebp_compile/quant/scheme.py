"""What a quantisation scheme is, and what a packed weight is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mebp_compile.errors import OptionError
from mebp_compile.quant.layout import Format, Record

CHUNK_ELEMENTS = 1 << 16  # weights are packed and, without the C kernel, dequantised this many elements at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight of dense `shape`: codes u8 [rows, code_row_bytes], scales [rows, scales_per_row]. May be views
    of a record.
    """

    scheme: str
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of codes and scales, without the record's padding."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, eq=False)
class Scheme:
    """One way to store a weight in few bits: value = round(level(code) * scale).

    `quantise(fp32 [rows, columns]) -> (codes u8, scales)` packs some whole rows. `levels` are the values of the 16
    codes, exact in fp32; an empty tuple means that a code is itself the level, as a two's complement byte. The
    product is one fp32 multiplication; a bf16 result is that product rounded to nearest, ties to even. A NaN result
    is always the quiet positive NaN.
    """

    format: Format
    scale_dtype: torch.dtype
    levels: tuple[float, ...]
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: a whole row."""
        return self.format.group

    def supports(self, shape: tuple[int, ...]) -> bool:
        return self.format.supports(shape)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the record of a weight of `shape` (codes, padding to 64, scales). Raises OptionError for an
        unsupported shape.
        """
        return self.format.record(shape).size_bytes

    def pack(self, weight: Tensor) -> Packed:
        """Pack fp32, fp16 or bf16 `weight` [..., columns], a few rows at a time. Raises OptionError (shape, dtype,
        NaN or Inf).
        """
        record = self.format.record(tuple(weight.shape))
        matrix = weight.detach().reshape(record.rows, record.columns)
        packed = empty_packed(self, record, tuple(weight.shape))
        step = rows_per_chunk(record)
        for r0 in range(0, record.rows, step):
            packed.codes[r0 : r0 + step], packed.scales[r0 : r0 + step] = self.pack_rows(matrix[r0 : r0 + step])
        return packed

    def pack_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of some rows [rows, columns] on the CPU. Raises OptionError for values that no scale can
        hold.
        """
        if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise OptionError(
                f"{self.name} can't pack {rows.dtype}",
                fix="pack fp32, fp16 or bf16 weights; leave the others as they are",
            )
        codes, scales = self.quantise(rows.to("cpu", torch.float32))
        if not bool(torch.isfinite(scales).all()):
            raise OptionError(
                "the weight holds NaN, Inf or values beyond the range of the scale",
                fix="repair the weight, or leave this tensor unquantised",
            )
        return codes, scales


def rows_per_chunk(record: Record) -> int:
    """Rows that make about CHUNK_ELEMENTS elements, at least one."""
    return max(1, CHUNK_ELEMENTS // max(1, record.columns))


def empty_packed(scheme: Scheme, record: Record, shape: tuple[int, ...]) -> Packed:
    """An uninitialised packed weight in a buffer of its own."""
    return view_record(scheme, record, shape, torch.empty(record.size_bytes, dtype=torch.uint8))


def view_record(scheme: Scheme, record: Record, shape: tuple[int, ...], buffer: Tensor) -> Packed:
    """The codes and scales inside a u8 buffer that holds a record at its start. No bytes are copied."""
    codes = buffer[: record.code_bytes].view(record.rows, record.code_row_bytes)
    scales = buffer[record.scale_offset : record.size_bytes].view(scheme.scale_dtype)
    return Packed(scheme.name, shape, codes, scales.view(record.rows, -1))


def group_scales(values: Tensor, divisor: float) -> Tensor:
    """bf16 scales [rows, groups, 1] = bf16(largest value by magnitude, sign kept, / divisor); the positive one where
    both signs tie.

    `values` is fp32 [rows, groups, 64].
    """
    highest, lowest = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    return (torch.where(highest >= -lowest, highest, lowest) / divisor).to(torch.bfloat16)


def divide_or_zero(values: Tensor, scales: Tensor) -> Tensor:
    """values / scales in fp32, and 0 where the scale is 0 (a group of zeros, or of values too small for any scale)."""
    divisor = scales.to(torch.float32)
    return torch.where(divisor == 0, torch.zeros_like(values), values / divisor)


def pack_nibbles(codes: Tensor) -> Tensor:
    """u8 codes 0..15 [rows, groups, 64] -> u8 [rows, groups * 32]: column j in the low nibble of byte j, column j +
    32 in the high.
    """
    return (codes[..., :32] | (codes[..., 32:] << 4)).flatten(1)


def unpack_nibbles(codes: Tensor) -> Tensor:
    """The inverse: u8 [rows, groups * 32] -> u8 [rows, groups, 64]."""
    groups = codes.view(codes.shape[0], -1, 32)
    return torch.cat((groups & 15, groups >> 4), dim=-1)
