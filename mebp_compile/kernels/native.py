"""The C kernels of this package, through ctypes: pointers in, the GIL released. Without a compiler the torch code beside each caller runs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library

NAMES = {torch.bfloat16: "mebp_cross_entropy_tile_bf16", torch.float32: "mebp_cross_entropy_tile_fp32"}
_TILE: list[Any] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 5]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    stem = Path(__file__).resolve().parent / "_cross_entropy"
    return shared_library.load(stem, _declare, "the cross-entropy kernels", "using torch, several times slower")


def _declare(lib: ctypes.CDLL) -> None:
    for name in NAMES.values():
        getattr(lib, name).argtypes, getattr(lib, name).restype = _TILE, None


def takes(logits: Tensor) -> bool:
    """Whether the kernel can work on these logits: on the CPU, bf16 or fp32, dense rows."""
    return logits.dtype in NAMES and logits.device.type == "cpu" and logits.stride(1) == 1 and library() is not None


def cross_entropy_tile(logits: Tensor, aimed: Tensor, top: Tensor, rest: Tensor, aim: Tensor) -> Tensor:
    """One tile [tokens, rows], in place; aimed: int64 [tokens], the target's column (outside the tile: another's).

    Updates top, rest and aim, and returns by what earlier sums are to be multiplied, fp32 [tokens].
    """
    lib, keep = library(), torch.empty_like(top)
    assert lib is not None
    sums = (tensor.data_ptr() for tensor in (aimed, top, rest, aim, keep))
    getattr(lib, NAMES[logits.dtype])(logits.data_ptr(), logits.shape[0], logits.shape[1], logits.stride(0), *sums)
    return keep
