"""Scheme definitions written a second time, in numpy and loops, sharing no code with the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
LEVELS = {"int4": [float(level) for level in range(-8, 8)], "nf4": NF4, "int8": [float(code) for code in range(128)]
          + [float(code - 256) for code in range(128, 256)]}  # fmt: skip


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, nearest-even; NaN -> 0x7FC0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def fp32_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> its bits; NaN -> 0x7FC00000."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), bits)


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def code_matrix(scheme: str, codes: np.ndarray) -> np.ndarray:
    """One code a column, from packed bytes [rows, code_row_bytes]."""
    if scheme == "int8":
        return codes
    rows = codes.shape[0]
    wide = np.empty((rows, codes.shape[1] // 32, 64), np.uint8)
    for j in range(32):
        wide[:, :, j] = codes.reshape(rows, -1, 32)[:, :, j] & 15
        wide[:, :, j + 32] = codes.reshape(rows, -1, 32)[:, :, j] >> 4
    return wide.reshape(rows, -1)


def dense_bits(scheme: str, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Bits of the dequantised matrix: u16 for bf16, u32 for fp32."""
    matrix = code_matrix(scheme, codes.numpy())
    if scheme == "int8":
        wide_scales = scales.numpy()
    else:
        wide_scales = np.repeat(bf16_to_fp32(scales.view(torch.int16).numpy().view(np.uint16)), 64, axis=1)
    with np.errstate(all="ignore"):
        product = np.array(LEVELS[scheme], np.float32)[matrix] * wide_scales
    return bf16_bits(product) if dtype == torch.bfloat16 else fp32_bits(product)


def bits_of(tensor: Tensor) -> np.ndarray:
    """The raw bits of a bf16 or fp32 tensor."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.view(torch.int32).numpy().view(np.uint32)


def pack_group_int4(group: list[float]) -> tuple[list[int], float]:
    """Stored codes and scale of 64 fp32 values, one at a time (float64 quotients, rounded once to fp32)."""
    extreme = max(group, key=lambda value: (abs(value), value))
    scale = float(bf16_to_fp32(bf16_bits(np.array([extreme / -8.0], np.float32)))[0])
    if scale == 0:
        return [8] * 64, scale
    return [min(7, max(-8, round(float(np.float32(value / scale))))) + 8 for value in group], scale


def pack_group_nf4(group: list[float]) -> tuple[list[int], float]:
    scale = float(bf16_to_fp32(bf16_bits(np.array([max(abs(value) for value in group)], np.float32)))[0])
    quotients = [float(np.float32(value / scale)) if scale else 0.0 for value in group]
    return [min(range(16), key=lambda i: (abs(NF4[i] - quotient), i)) for quotient in quotients], scale


def pack_row_int8(row: list[float]) -> tuple[list[int], float]:
    scale = float(np.float32(max(abs(value) for value in row)) / np.float32(127))
    if scale == 0:
        return [0] * len(row), scale
    return [min(127, max(-127, round(float(np.float32(value / scale))))) for value in row], scale
