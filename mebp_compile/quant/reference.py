"""Dequantise in plain torch: the definition that the C kernels match bit for bit, and the fallback without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mebp_compile.quant.scheme import CHUNK_ELEMENTS, Scheme, unpack_nibbles

OUT_DTYPES = (torch.bfloat16, torch.float32)


def dequantise_matrix(scheme: Scheme, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the dense rows [rows, columns] of codes [rows, code_row_bytes] and scales [rows, scales_per_row] into
    `out`.

    Works through at most CHUNK_ELEMENTS elements at a time (at least one row), so its workspace stays near 1 MiB.
    """
    step = max(1, CHUNK_ELEMENTS // max(1, out.shape[1]))
    for r0 in range(0, out.shape[0], step):
        rows = slice(r0, r0 + step)
        out[rows] = round_product(dequantise_rows_fp32(scheme, codes[rows], scales[rows]), out.dtype)


def dequantise_rows_fp32(scheme: Scheme, codes: Tensor, scales: Tensor) -> Tensor:
    """level * scale in fp32 [rows, columns]."""
    if not scheme.levels:
        return codes.view(torch.int8).to(torch.float32) * scales
    levels = torch.tensor(scheme.levels, dtype=torch.float32, device=codes.device)
    index = unpack_nibbles(codes)
    values = levels.index_select(0, index.flatten().to(torch.int32)).view(index.shape)
    return (values * scales.to(torch.float32).unsqueeze(-1)).flatten(1)


def round_product(product: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 -> `dtype`, nearest-even, every NaN made the quiet positive one (torch's own NaN depends on its vector
    path).
    """
    result = product.to(dtype)
    nan = torch.isnan(product)
    return result.masked_fill_(nan, math.nan) if bool(nan.any()) else result
