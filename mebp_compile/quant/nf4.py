"""nf4: the 16 quantiles of a normal distribution, one bf16 absmax scale per 64 columns.

The code book is QLoRA's (Dettmers et al. 2023, appendix E), as fp32. scale = bf16(max|w|); a code is the entry
nearest to w / scale (fp32 division by the rounded scale), the lower one when w / scale is exactly the fp32 midpoint
of two entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mebp_compile.quant.layout import FORMATS
from mebp_compile.quant.scheme import Scheme, divide_or_zero, pack_nibbles

CODE_BOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
MIDPOINTS = (CODE_BOOK[1:] + CODE_BOOK[:-1]) / 2


def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.reshape(rows.shape[0], -1, 64)
    scales = values.abs().amax(-1, keepdim=True).to(torch.bfloat16)
    codes = torch.bucketize(divide_or_zero(values, scales), MIDPOINTS, out_int32=True)
    return pack_nibbles(codes.to(torch.uint8)), scales.squeeze(-1)


NF4 = Scheme(FORMATS["nf4"], torch.bfloat16, tuple(CODE_BOOK.tolist()), _quantise)
