"""Products of matrices by name: torch's, and those of this package in blocks of fp32 (`kernels/product.py`)."""

from __future__ import annotations

from mebp_compile import torch_private

MULTIPLY, ADD_MULTIPLY = "aten.mm.default", "aten.addmm.default"
WIDENED, ADD_WIDENED = "mebp.mm.default", "mebp.addmm.default"
MATMULS = {MULTIPLY: 1, WIDENED: 1, ADD_MULTIPLY: 2, ADD_WIDENED: 2}  # position of the second matrix


def in_blocks(target: str) -> bool:
    """Whether a product is one in blocks of fp32."""
    return target in (WIDENED, ADD_WIDENED)


def multiplier(dtype: str) -> str:
    """What multiplies matrices of this dtype fastest here, where the bits may be others than torch's."""
    return WIDENED if dtype == "bfloat16" and not torch_private.multiplies_bfloat16() else MULTIPLY
