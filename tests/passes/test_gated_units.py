"""Gated units in whole steps: where they are found, what is left alone and why, and that training stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Recipe, Training
from rewritten import after, goes_on, trained_by
from torch import nn
from torch.nn import functional as F

from mebp_compile.kernels import fused
from mebp_compile.passes import gated_units

pytestmark = pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no C compiler)")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("lora", [None, "model"])
def test_language_models(family: str, lora: str | None) -> None:
    """SwiGLU and GeGLU of two layers: the activation and its backward are gone."""
    notes, ops = after(gated_units, Recipe(family, lora=lora, dtype=torch.bfloat16).build())
    assert notes == ["gated units: 2 in one walk each"]
    assert ops["mebp.gated.default"] == ops["mebp.gated_backward.default"] == 2
    assert not [op for op in ops if "silu" in op or "gelu" in op]


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def unit(function: Any, frozen: tuple[int, ...] = ()) -> Training:
    return trained_by(lambda x, gate, up: function(x, gate(x), up(x)), nn.Linear(32, 32), nn.Linear(32, 32), frozen=frozen)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, gate, up: F.silu(gate) * up, ""),
        (lambda x, gate, up: up * tanh_gelu(gate), ""),
        (lambda x, gate, up: F.gelu(gate) * up, "only the tanh form"),
        (lambda x, gate, up: F.silu(gate) * up + F.silu(gate.t().t() if gate.dim() == 2 else gate), ""),
        (lambda x, gate, up: (a := F.silu(gate)) * up + a, "another use"),
        (lambda x, gate, up: (a := F.silu(gate)) * up + a * x, "another use"),
        (lambda x, gate, up: F.silu(gate) * up[:1], "not contiguous tensors of one shape"),
        (lambda x, gate, up: F.silu(gate.transpose(0, 1)) * up.transpose(0, 1), "not contiguous tensors of one shape"),
        (lambda x, gate, up: F.silu(gate) * x, ""),
    ],
)
def test_forms(function: Any, reason: str) -> None:
    """What is a gated unit, and what only looks like one; each place that is left has its reason."""
    notes, ops = after(gated_units, unit(function))
    assert ops["mebp.gated.default"] == (0 if reason else 1)
    assert reason in notes[0]


def test_a_gate_without_a_gradient_is_named() -> None:
    """Half of the backward is missing: all is left as it was."""
    notes, ops = after(gated_units, unit(lambda x, gate, up: F.silu(gate) * up, frozen=(0,)))
    assert "its backward is not the one of a gated unit" in notes[0]
    assert not [op for op in ops if op.startswith("mebp")]


@pytest.mark.parametrize("act", [F.silu, tanh_gelu])
def test_training_goes_on(act: Any) -> None:
    """Both units, trained in fp32."""
    goes_on(lambda: unit(lambda x, gate, up: act(gate) * up), ("gated", "gated_backward"))


WHOLE = [("qwen2", torch.float32, 1e-5), ("llama", torch.bfloat16, 2e-2), ("gemma3", torch.float32, 1e-5)]


@pytest.mark.parametrize(("family", "dtype", "tolerance"), WHOLE)
def test_language_models_go_on(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """All parameters of whole models."""
    goes_on(Recipe(family, optimizer="sgd", dtype=dtype).build, ("gated", "gated_backward"), tolerance)
