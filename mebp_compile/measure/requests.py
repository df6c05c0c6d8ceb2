"""The JSON forms in which calls travel to a child: ops by name, tensors by their geometry.

Tensors {"tensor": {"shape": [2, 3], "stride": [3, 1], "dtype": "bfloat16", "fill": "normal"}}, with fill "normal",
"zeros", "ones", "index:<max>" (integers in [0, max)) or "mask" (bool, or 0 and -inf); {"dtype": "float32"},
{"device": "cpu"}, {"memory_format": "channels_last"}, {"layout": "strided"}; lists as lists; scalars and null plain.
Stride, dtype and fill may be left out (contiguous, float32, normal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mebp_compile.errors import MeasureError

PATTERN_ELEMENTS = 1 << 20
OP_FIX = "check the op's name and arguments against torch.ops"

Json = dict[str, Any]


def find_op(target: str) -> Callable[..., Any]:
    """torch.ops.aten.mm.default from "aten.mm.default"."""
    found: Any = torch.ops
    for name in target.split("."):
        try:
            found = getattr(found, name)
        except (AttributeError, RuntimeError) as error:
            raise MeasureError(f"there is no op {target}", OP_FIX) from error
    if not isinstance(found, torch._ops.OpOverload):
        raise MeasureError(f"{target} is no overload", 'name one, such as "aten.mm.default"')
    return found


def tensor_spec(tensor: torch.Tensor, fill: str = "normal") -> Json:
    """The JSON form of a tensor's geometry (real, fake or meta) with a fill, as an argument of a request."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"tensor": {"shape": list(tensor.shape), "stride": list(tensor.stride()), "dtype": dtype, "fill": fill}}


def decode(value: Any) -> Any:
    """The argument for one JSON value; see the module's text for the forms. Raises MeasureError on an unknown form."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind == "tensor" and isinstance(inner, dict):
        return _make_tensor(**inner)
    if kind == "device" and isinstance(inner, str):
        return torch.device(inner)
    if kind in ("dtype", "memory_format", "layout") and isinstance(inner, str):
        return _torch_constant(inner)
    raise MeasureError(
        f"an argument {value!r} has no known form", 'use "tensor", "dtype", "device", "memory_format" or "layout"'
    )


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
        raise MeasureError(f"torch.{name} is no dtype, memory format or layout", 'use a name such as "bfloat16"')
    return found


def _make_tensor(
    shape: Sequence[int], stride: Sequence[int] | None = None, dtype: str = "float32", fill: str = "normal", device: str = "cpu"
) -> torch.Tensor:
    """A tensor with exactly the storage its geometry needs, filled from a repeated pattern of a million elements at
    most; on another device the same numbers.
    """
    if stride is None:
        stride = torch.empty(tuple(shape), device="meta").stride()
    elements = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    base = torch.empty(elements, dtype=_torch_constant(dtype))
    if elements:
        pattern = _pattern(min(elements, PATTERN_ELEMENTS), base.dtype, fill)
        for start in range(0, elements, PATTERN_ELEMENTS):
            part = base[start : start + PATTERN_ELEMENTS]
            part.copy_(pattern[: part.numel()])
    return base.to(device).as_strided(tuple(shape), tuple(stride))


def _pattern(elements: int, dtype: torch.dtype, fill: str) -> torch.Tensor:
    if fill == "zeros" or fill == "ones":
        return torch.full((elements,), float(fill == "ones")).to(dtype)
    if fill.startswith("index:"):
        return torch.randint(0, max(1, int(fill.removeprefix("index:"))), (elements,)).to(dtype)
    if fill == "mask":
        kept = torch.rand(elements) < 0.5
        return kept if dtype is torch.bool else torch.where(kept, 0.0, float("-inf")).to(dtype)
    if fill != "normal":
        raise MeasureError(f"fill {fill!r} is unknown", 'use "normal", "zeros", "ones", "index:<max>" or "mask"')
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(elements).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (elements,)).to(dtype)
