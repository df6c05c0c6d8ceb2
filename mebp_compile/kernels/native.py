"""The C kernels of this package, through ctypes: pointers in, the GIL released. Without a compiler the torch code beside each caller runs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library

KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_TILE: list[Any] = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_float, *[ctypes.c_void_p] * 7]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    stem = Path(__file__).resolve().parent / "_cross_entropy"
    return shared_library.load(stem, _declare, "the cross-entropy kernels", "using torch, several times slower")


def _declare(lib: ctypes.CDLL) -> None:
    for kind in KINDS.values():
        for name in (_name(kind, 0.0), _name(kind, 1.0)):
            getattr(lib, name).argtypes, getattr(lib, name).restype = _TILE, None


def _name(kind: str, cap: float) -> str:
    return f"mebp_cross_entropy_{'capped_' if cap else ''}tile_{kind}"


def takes(logits: Tensor) -> bool:
    """Whether the kernel can work on these logits: on the CPU, bf16 or fp32, dense rows."""
    return logits.dtype in KINDS and logits.device.type == "cpu" and logits.stride(1) == 1 and library() is not None


def cross_entropy_tile(
    logits: Tensor, slopes: Tensor | None, even: Tensor | None, aimed: Tensor, start: int, cap: float,
    top: Tensor, rest: Tensor, aim: Tensor, flat: Tensor,
) -> Tensor:  # fmt: skip
    """One tile [tokens, rows], in place. slopes: like the logits and dense, even: fp32 [tokens], both filled where they are given; aimed: int64
    [tokens], the target's column (outside the tile: another's); start: columns of earlier tiles.

    Updates top, rest, aim and flat, and returns by what earlier sums are to be multiplied, fp32 [tokens].
    """
    lib, keep = library(), torch.empty_like(top)
    assert lib is not None
    kernel = getattr(lib, _name(KINDS[logits.dtype], cap))
    sums = (None if tensor is None else tensor.data_ptr() for tensor in (aimed, top, rest, aim, flat, keep, even))
    kernel(logits.data_ptr(), None if slopes is None else slopes.data_ptr(), *logits.shape, logits.stride(0), start, cap, *sums)
    return keep
