"""RMSNorm in one walk: `mebp::rms_norm(x, weight, eps)` = (x r w, r) with r = 1 / sqrt(mean(x^2) + eps) of each row, and for a frozen weight

    mebp::rms_norm_backward(grad, x, weight, r, other) = other + r (grad w - x r^2 mean(grad w x))

where `other` is the gradient that reaches x past the norm. Saved are x and r, one number a row. Tier "reassociate": everything is fp32 and rounded
once; models round the normed x before they multiply it by the weight, and the two parts of the gradient before they add them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels import fused

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_BACKWARD = "Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? other"
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm.out(Tensor x, Tensor weight, float eps, *, Tensor(a!) out, Tensor(b!) scale) -> (Tensor(a!), Tensor(b!))")
_LIBRARY.define(f"rms_norm_backward({_BACKWARD}) -> Tensor")
_LIBRARY.define(f"rms_norm_backward.out({_BACKWARD}, *, Tensor(a!) out) -> Tensor(a!)")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, like x; r, fp32 [..., 1]). x: [..., columns]; weight: [columns], bf16 or fp32."""
    return rms_norm_out(x, weight, eps, out=fused.dense_like(x), scale=_scale(x))


def rms_norm_out(x: Tensor, weight: Tensor, eps: float, *, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same into two contiguous tensors."""
    if not fused.takes(x, weight):
        return forward_in_torch(x, weight, eps, out, scale)
    fused.rms_norm(x.contiguous(), weight.contiguous(), eps, out, scale)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, other: Tensor | None = None) -> Tensor:
    """The gradient of x, like x. grad and other: like x; scale: from `rms_norm`."""
    return rms_norm_backward_out(grad, x, weight, scale, other, out=fused.dense_like(x))


def rms_norm_backward_out(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, other: Tensor | None, *, out: Tensor) -> Tensor:
    """The same into `out`, contiguous."""
    if not fused.takes(grad, x, weight, other):
        return backward_in_torch(grad, x, weight, scale, other, out)
    beside = None if other is None else other.contiguous()
    fused.rms_norm_backward(grad.contiguous(), x.contiguous(), weight.contiguous(), scale.contiguous(), beside, out)
    return out


# --- the twins of the C kernels ---


def forward_in_torch(x: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale.copy_(torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    return out.copy_(wide * scale * weight), scale


def backward_in_torch(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, other: Tensor | None, out: Tensor) -> Tensor:
    wide, pulled = x.float(), grad.float() * weight
    result = (pulled - wide * (scale.square() * (pulled * wide).mean(-1, keepdim=True))) * scale
    return out.copy_(result if other is None else result + other)


def _scale(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_LIBRARY.impl("rms_norm", rms_norm, "CPU")
_LIBRARY.impl("rms_norm", lambda x, weight, eps: (fused.dense_like(x), _scale(x)), "Meta")
_LIBRARY.impl("rms_norm.out", rms_norm_out, "CPU")
_LIBRARY.impl("rms_norm_backward", rms_norm_backward, "CPU")
_LIBRARY.impl("rms_norm_backward", lambda grad, x, *_: fused.dense_like(x), "Meta")
_LIBRARY.impl("rms_norm_backward.out", rms_norm_backward_out, "CPU")
