"""Rotary embeddings in whole steps: where they are found, and that training stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Recipe, Training
from rewritten import after, goes_on, trained_by
from torch import nn

from mebp_compile.kernels import fused
from mebp_compile.passes import rotary

pytestmark = pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no C compiler)")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_language_models(family: str, dtype: torch.dtype) -> None:
    """Queries and keys of two layers, forward and backward: no half is cut out, turned or padded any more."""
    notes, ops = after(rotary, Recipe(family, dtype=dtype).build())
    assert notes == ["rotary: 8 embeddings in one walk each"]
    assert ops["mebp.rope.default"] == 8
    assert not ops["aten.slice_backward.default"]


def turned(x: torch.Tensor, at: int = 16, sign: float = -1.0) -> torch.Tensor:
    first, second = x[..., :at], x[..., at:]
    return torch.cat((-second if sign == -1.0 else sign * second, first), -1)


def embedded(function: Any) -> Training:
    """Two heads of 32 numbers, eight tokens."""

    def whole(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        angles = torch.arange(8.0)[:, None] * torch.linspace(0.1, 1.0, 32)
        return function(layer(x).transpose(1, 2), angles.cos()[None, None], angles.sin()[None, None])

    return trained_by(whole, nn.Linear(32, 32), batch=(2, 8, 2, 32))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x, cos, sin: x * cos + turned(x) * sin, 2),
        (lambda x, cos, sin: sin * turned(x) + cos * x, 1),  # its gradient is added up in another order, and left
        (lambda x, cos, sin: x * cos + turned(x, 8) * sin, 0),
        (lambda x, cos, sin: x * cos + turned(x, 16, -2.0) * sin, 0),
        (lambda x, cos, sin: x * cos - turned(x) * sin, 0),
        (lambda x, cos, sin: x * cos + (y := turned(x)) * sin + y, 0),
        (lambda x, cos, sin: x * cos[..., :1] + turned(x) * sin[..., :1], 0),
    ],
    ids=["plain", "the other way round", "no halves", "no turn", "a difference", "used twice", "one angle"],
)
def test_forms(function: Any, count: int) -> None:
    """What is a rotary embedding, and what only looks like one."""
    _, ops = after(rotary, embedded(function))
    assert ops["mebp.rope.default"] == count


def test_training_goes_on() -> None:
    """Angles that differ between the halves too, trained in fp32."""
    goes_on(lambda: embedded(lambda x, cos, sin: x * cos + turned(x) * sin), ("rope",))


WHOLE = [("qwen2", torch.float32, 1e-5), ("gemma3", torch.float32, 1e-5), ("llama", torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("family", "dtype", "tolerance"), WHOLE)
def test_language_models_go_on(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """All parameters of whole models."""
    goes_on(Recipe(family, optimizer="sgd", dtype=dtype).build, ("rope",), tolerance)
