"""The sum with a low-rank product, in one walk: `mebp::add_low_rank(base, a, b, alpha, other)` = (base + alpha a b) + other.

LoRA adds such a product to each linear layer, forward (base: what the frozen weight gives) and backward (base: the gradient through it), and a
residual or another layer's gradient (`other`) is usually added to that. One walk reads base and other and writes the sum; the wide product never
exists. Tier "reassociate": base + alpha a b is computed in fp32 and rounded once, where the chain of ops rounds the product, its multiple and the
sum. The sum with other is rounded on its own, as in the chain: every fourth or so of the sums of two bf16 numbers lies between two neighbours
exactly, and a small product added before rounding would decide each of them, so that a small adapter would act as one ten times as large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels import fused

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor base, Tensor a, Tensor b, float alpha, Tensor? other"
_LIBRARY.define(f"add_low_rank({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"add_low_rank.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def add_low_rank(base: Tensor, a: Tensor, b: Tensor, alpha: float, other: Tensor | None = None) -> Tensor:
    """Like base [..., columns]. a: [rows, rank], b: [rank, columns], of one dtype, bf16 or fp32; other: like base. rows: of base, all but its
    last dimension together."""
    return add_low_rank_out(base, a, b, alpha, other, out=fused.dense_like(base))


def add_low_rank_out(base: Tensor, a: Tensor, b: Tensor, alpha: float, other: Tensor | None, *, out: Tensor) -> Tensor:
    """The same into `out`, contiguous."""
    if b.shape[0] > fused.MOST_RANK or a.dtype != b.dtype or not fused.takes(base, a, b, other):
        return in_torch(base, a, b, alpha, other, out)
    fused.add_low_rank(base.contiguous(), a, b, alpha, None if other is None else other.contiguous(), out)
    return out


def in_torch(base: Tensor, a: Tensor, b: Tensor, alpha: float, other: Tensor | None, out: Tensor) -> Tensor:
    """The twin of the C kernel."""
    out.copy_(torch.mm(a.float(), b.float()).mul_(alpha).view(base.shape).add_(base))
    return out if other is None else out.add_(other)


_LIBRARY.impl("add_low_rank", add_low_rank, "CPU")
_LIBRARY.impl("add_low_rank", lambda base, *_: fused.dense_like(base), "Meta")
_LIBRARY.impl("add_low_rank.out", add_low_rank_out, "CPU")
