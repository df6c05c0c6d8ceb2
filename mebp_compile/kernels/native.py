"""The C kernels of this package, through ctypes: pointers in, the GIL released. Without a compiler the torch code beside each caller runs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library

_TILE: list[Any] = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_float, *[ctypes.c_void_p] * 7, *[ctypes.c_int] * 2]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    stem = Path(__file__).resolve().parent / "_cross_entropy"
    return shared_library.load(stem, _declare, "the cross-entropy kernels", "using torch, several times slower")


def _declare(lib: ctypes.CDLL) -> None:
    lib.mebp_cross_entropy_tile.argtypes, lib.mebp_cross_entropy_tile.restype = _TILE, None


def takes(logits: Tensor) -> bool:
    """Whether the kernel can work on these logits: on the CPU, bf16 or fp32, dense rows."""
    return logits.dtype in (torch.bfloat16, torch.float32) and logits.device.type == "cpu" and logits.stride(1) == 1 and library() is not None


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
    places = [None if tensor is None else tensor.data_ptr() for tensor in (logits, slopes, aimed, top, rest, aim, flat, keep, even)]
    numbers = (*logits.shape, logits.stride(0), start, cap)
    lib.mebp_cross_entropy_tile(*places[:2], *numbers, *places[2:], logits.dtype == torch.bfloat16, torch.get_num_threads())
    return keep
