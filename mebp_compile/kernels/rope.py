"""Rotary embedding in one walk: `mebp::rope(x, cos, sin, transposed, contiguous)` turns the halves x1, x2 of each head,

    (x1 c1 - x2 s1, x2 c2 + x1 s2)        transposed, as the backward does it:  (x1 c1 + x2 s2, x2 c2 - x1 s1).

Backward saves nothing of x. Tier "reassociate": the two products are fp32 and their sum is rounded once; the chain of ops rounds three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels import fused

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor x, Tensor cos, Tensor sin, bool transposed, bool contiguous"
_LIBRARY.define(f"rope({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"rope.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, contiguous: bool) -> Tensor:
    """Like x [batch, heads, tokens, size], contiguous or in its strides. cos, sin: [batch or 1, 1, tokens, size], of the dtype of x."""
    return rope_out(x, cos, sin, transposed, contiguous, out=_shape(x, cos, sin, transposed, contiguous))


def rope_out(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, contiguous: bool, *, out: Tensor) -> Tensor:
    """The same into `out`, of any strides in which the numbers of a head are adjacent."""
    alike = cos.stride() == sin.stride() and cos.stride(3) == x.stride(3) == out.stride(3) == 1
    if not (alike and x.dtype == cos.dtype == sin.dtype and fused.takes(x)):
        return in_torch(x, cos, sin, transposed, out)
    fused.rope(x, cos, sin, transposed, out)
    return out


def in_torch(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """The twin of the C kernel."""
    wide, middle = x.float(), x.shape[3] // 2
    pulled = wide * sin if transposed else wide
    first, second = pulled[..., :middle], pulled[..., middle:]
    turned = torch.cat((second, -first) if transposed else (-second, first), -1)
    return out.copy_(wide * cos + (turned if transposed else turned * sin))


def _shape(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, contiguous: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format if contiguous else torch.preserve_format)


_LIBRARY.impl("rope", rope, "CPU")
_LIBRARY.impl("rope", _shape, "Meta")
_LIBRARY.impl("rope.out", rope_out, "CPU")
