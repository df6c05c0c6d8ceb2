"""int8: symmetric 8-bit levels -127..127, one fp32 scale per row.

scale = max|w| / 127 in fp32 (four bytes a row cost nothing; a bf16 scale would add an error as large as half a level).
level = clamp(round_half_even(w / scale), -127, 127), stored as a two's complement byte. Code -128 is never written;
it reads as -128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mebp_compile.quant.layout import FORMATS
from mebp_compile.quant.scheme import Scheme, divide_or_zero


def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(-1, keepdim=True)
    scales = largest / torch.full_like(largest, 127.0)  # a true division: a scalar divisor may become a multiplication
    levels = divide_or_zero(rows, scales).round_().clamp_(-127, 127)
    return levels.to(torch.int8).view(torch.uint8), scales


INT8 = Scheme(FORMATS["int8"], torch.float32, (), _quantise)
