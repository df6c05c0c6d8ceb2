"""The attention kernel in whole steps: where it is put, what is left to torch and why, and that training stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Recipe, Training
from rewritten import after, goes_on, trained_by
from torch import nn
from torch.nn import functional as F

from mebp_compile.kernels import attention
from mebp_compile.passes import attention as step

pytestmark = pytest.mark.skipif(not attention.is_fast(), reason="the attention kernel is not built, or this processor is not for it")


def attending(function: Callable[..., Any], size: int = 16) -> Training:
    """Two heads of queries, seventy tokens."""

    def whole(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        q, k, v = layer(x).unflatten(-1, (3, 2, size)).permute(2, 0, 3, 1, 4)
        return function(q, k, v)

    return trained_by(whole, nn.Linear(32, 6 * size), batch=(2, 70, 32))


@pytest.mark.parametrize(
    ("function", "size", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 16, ""),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 16, ""),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True), 16, ""),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(70, 70)), 16, "it has a mask"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 24, "multiple of 16"),
    ],
    ids=["causal", "a scale", "shared keys", "a mask", "odd heads"],
)
def test_places(function: Callable[..., Any], size: int, reason: str) -> None:
    """Forward and backward of every attention that the kernel takes."""
    notes, ops = after(step, attending(function, size))
    assert ops["mebp.attention.default"] == ops["mebp.attention_backward.default"] == (0 if reason else 1)
    assert reason in notes[0]
    assert bool(reason) == any("flash_attention" in op for op in ops)


@pytest.mark.parametrize("causal", [True, False])
def test_training_goes_on(causal: bool) -> None:
    """As with torch's kernel, into the arena."""
    goes_on(
        lambda: attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)), ("attention.out", "attention_backward.out")
    )


def test_small_heads_of_language_models_are_named() -> None:
    """The tests' models have heads of eight numbers."""
    notes, _ = after(step, Recipe("qwen2").build())
    assert all(note.startswith("attention: not for the one at ") for note in notes)


def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wide registers torch's kernel stays."""
    monkeypatch.setattr(attention, "is_fast", lambda: False)
    notes, ops = after(step, attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)))
    assert not ops["mebp.attention.default"]
    assert "512 bits" in notes[0]
