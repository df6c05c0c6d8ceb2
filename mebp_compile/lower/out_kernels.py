"""Which ops can fill a given buffer with the very bits that they would return: the ones with a native out= kernel, copies and fills."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mebp_compile import torch_private

# Ops without an out= kernel whose effect is exactly one in-place call on a buffer of their result's geometry.
FILLS = {
    "aten._to_copy.default": "copy_",
    "aten.clone.default": "copy_",
    "aten.zeros_like.default": "zero_",
    "aten.new_zeros.default": "zero_",
    "aten.zeros.default": "zero_",
    "aten.full.default": "fill_",
    "aten.empty_like.default": "empty",
    "aten.new_empty_strided.default": "empty",
    "aten.empty.memory_format": "empty",
}


def out_kernel(target: Any, made: Any) -> tuple[str, tuple[str, ...]]:
    """(overload, names of its out arguments), ("copy_", ()) for a copy, or ("", ()) where the result must come from the allocator.

    Only for dense results: a buffer is bit-equal when it has the strides that eager would give it.
    """
    parts = list(made) if isinstance(made, (list, tuple)) else [made]
    if not parts or not all(isinstance(part, torch.Tensor) and _dense(part) for part in parts):
        return "", ()
    name = torch_private.target_name(target)
    if name in FILLS:
        return FILLS[name], ()
    return _native(target)


def _dense(tensor: torch.Tensor) -> bool:
    """The tensor fills its storage exactly, in some order of dimensions."""
    return (
        tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and tensor.numel() > 0
    )


@functools.cache
def _native(target: Any) -> tuple[str, tuple[str, ...]]:
    return torch_private.native_out_overload(target) or ("", ())
