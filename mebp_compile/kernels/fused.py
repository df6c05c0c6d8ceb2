"""The C kernels of `fused.c` through ctypes: chains of elementwise ops in one walk, on torch's own threads, the GIL released.

Each function fills `out`. Without a compiler, or for tensors that the kernels do not take, callers run their torch twins.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library

DTYPES = (torch.bfloat16, torch.float32)
MOST_RANK = 64  # of a low-rank product, as in fused.c
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "mebp_add_low_rank": [*[_POINTER] * 5, *[_LONG] * 9, _FLOAT, *[_INT] * 3],
    "mebp_gated": [*[_POINTER] * 6, _LONG, *[_INT] * 3],
    "mebp_rms_norm": [*[_POINTER] * 6, *[_LONG] * 2, _FLOAT, *[_INT] * 3],
    "mebp_rope": [*[_POINTER] * 4, *[_LONG] * 12, *[_INT] * 3],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    stem = Path(__file__).resolve().parent / "_fused"
    return shared_library.load(stem, _declare, "the fused elementwise kernels", "passes leave elementwise ops as they are")


def _declare(lib: ctypes.CDLL) -> None:
    for name, arguments in _SIGNATURES.items():
        getattr(lib, name).argtypes, getattr(lib, name).restype = arguments, None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can work on these: on the CPU, bf16 or fp32."""
    return library() is not None and all(part is None or (part.dtype in DTYPES and part.device.type == "cpu") for part in tensors)


def dense_like(tensor: Tensor) -> Tensor:
    """A new tensor of its shape and dtype, contiguous."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _half(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def add_low_rank(base: Tensor, a: Tensor, b: Tensor, alpha: float, other: Tensor | None, out: Tensor) -> None:
    """out = base + other + alpha a b. base, other, out: [..., columns], contiguous, of one dtype; a [rows, rank], b [rank, columns]: of one dtype,
    any strides; rank at most MOST_RANK."""
    rank, columns = b.shape
    sizes = (a.shape[0], columns, rank, columns, columns, *a.stride(), *b.stride())
    pointers = (base.data_ptr(), _pointer(other), a.data_ptr(), b.data_ptr(), out.data_ptr())
    library().mebp_add_low_rank(*pointers, *sizes, alpha, _half(a), _half(base), torch.get_num_threads())  # type: ignore[union-attr]


def gated(gate: Tensor, up: Tensor, kind: int, out: Tensor) -> None:
    """out = act(gate) up. All contiguous, of one shape and dtype. kind: 0 silu, 1 gelu in its tanh form."""
    pointers = (None, gate.data_ptr(), up.data_ptr(), out.data_ptr(), None, None)
    library().mebp_gated(*pointers, gate.numel(), kind, _half(gate), torch.get_num_threads())  # type: ignore[union-attr]


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int, to_gate: Tensor, to_up: Tensor) -> None:
    """to_gate = grad up act'(gate), to_up = grad act(gate). All contiguous, of one shape and dtype."""
    pointers = (grad.data_ptr(), gate.data_ptr(), up.data_ptr(), None, to_gate.data_ptr(), to_up.data_ptr())
    library().mebp_gated(*pointers, gate.numel(), kind, _half(gate), torch.get_num_threads())  # type: ignore[union-attr]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor) -> None:
    """out = x scale weight, scale = 1 / sqrt(mean(x^2) + eps). x, out: [..., columns], contiguous, of one dtype; scale: fp32, one a row."""
    pointers = (None, x.data_ptr(), weight.data_ptr(), None, out.data_ptr(), scale.data_ptr())
    _norm(pointers, x, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, other: Tensor | None, out: Tensor) -> None:
    """out = other + d loss / d x. grad, x, other, out: [..., columns], contiguous, of one dtype; scale: from `rms_norm`."""
    pointers = (grad.data_ptr(), x.data_ptr(), weight.data_ptr(), _pointer(other), out.data_ptr(), scale.data_ptr())
    _norm(pointers, x, weight, 0.0)


def _norm(pointers: tuple[int | None, ...], x: Tensor, weight: Tensor, eps: float) -> None:
    columns = x.shape[-1]
    sizes = (x.numel() // columns, columns)
    library().mebp_rms_norm(*pointers, *sizes, eps, _half(weight), _half(x), torch.get_num_threads())  # type: ignore[union-attr]


def rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, out: Tensor) -> None:
    """out = the halves of each head turned. x, out: [batch, heads, tokens, size], cos, sin: [batch or 1, 1, tokens, size] of one geometry; all of
    one dtype, numbers of a head adjacent."""
    turn = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(2))
    sizes = (*x.shape, *x.stride()[:3], *out.stride()[:3], *turn)
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    library().mebp_rope(*pointers, *sizes, int(transposed), _half(x), torch.get_num_threads())  # type: ignore[union-attr]
