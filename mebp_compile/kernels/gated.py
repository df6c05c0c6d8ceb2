"""Gated units in one walk: `mebp::gated(gate, up, act)` = act(gate) up (SwiGLU with silu, GeGLU with gelu in its tanh form), and
`mebp::gated_backward`, which gives both gradients at once:

    d gate = d out up act'(gate)        d up = d out act(gate)

Backward needs what forward was given, gate and up, and not the activation between. Tier "reassociate": everything in between is fp32 and rounded
once; the chain of ops rounds the activation, or the gradient before it, and then again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels import fused

KINDS = ("silu", "gelu_tanh")  # as fused.c numbers them
_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("gated(Tensor gate, Tensor up, str act) -> Tensor")
_LIBRARY.define("gated.out(Tensor gate, Tensor up, str act, *, Tensor(a!) out) -> Tensor(a!)")
_LIBRARY.define("gated_backward(Tensor grad, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)")
_LIBRARY.define(
    "gated_backward.out(Tensor grad, Tensor gate, Tensor up, str act, *, Tensor(a!) to_gate, Tensor(b!) to_up) -> (Tensor(a!), Tensor(b!))"
)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) up, like gate; act: one of KINDS."""
    return gated_out(gate, up, act, out=fused.dense_like(gate))


def gated_out(gate: Tensor, up: Tensor, act: str, *, out: Tensor) -> Tensor:
    """The same into `out`, contiguous."""
    if not fused.takes(gate, up):
        return forward_in_torch(gate, up, act, out)
    fused.gated(gate.contiguous(), up.contiguous(), KINDS.index(act), out)
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(d gate, d up) where grad is the gradient of what `gated` gives."""
    return gated_backward_out(grad, gate, up, act, to_gate=fused.dense_like(gate), to_up=fused.dense_like(up))


def gated_backward_out(grad: Tensor, gate: Tensor, up: Tensor, act: str, *, to_gate: Tensor, to_up: Tensor) -> tuple[Tensor, Tensor]:
    """The same into two contiguous tensors."""
    if not fused.takes(grad, gate, up):
        return backward_in_torch(grad, gate, up, act, to_gate, to_up)
    fused.gated_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), KINDS.index(act), to_gate, to_up)
    return to_gate, to_up


# --- the twins of the C kernels ---


def forward_in_torch(gate: Tensor, up: Tensor, act: str, out: Tensor) -> Tensor:
    wide = gate.float()
    value = torch.nn.functional.silu(wide) if act == "silu" else torch.nn.functional.gelu(wide, approximate="tanh")
    return out.copy_(value.mul_(up))


def backward_in_torch(grad: Tensor, gate: Tensor, up: Tensor, act: str, to_gate: Tensor, to_up: Tensor) -> tuple[Tensor, Tensor]:
    pulled, wide = grad.float() * up, gate.float()
    if act == "silu":
        inner = torch.ops.aten.silu_backward(pulled, wide)
    else:
        inner = torch.ops.aten.gelu_backward(pulled, wide, approximate="tanh")
    forward_in_torch(gate, grad, act, to_up)
    return to_gate.copy_(inner), to_up


_LIBRARY.impl("gated", gated, "CPU")
_LIBRARY.impl("gated", lambda gate, up, act: fused.dense_like(gate), "Meta")
_LIBRARY.impl("gated.out", gated_out, "CPU")
_LIBRARY.impl("gated_backward", gated_backward, "CPU")
_LIBRARY.impl("gated_backward", lambda grad, gate, up, act: (fused.dense_like(gate), fused.dense_like(up)), "Meta")
_LIBRARY.impl("gated_backward.out", gated_backward_out, "CPU")
