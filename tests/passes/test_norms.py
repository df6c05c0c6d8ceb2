"""RMSNorm in whole steps: where it is found, what is left alone and why, and that training stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Recipe, Training
from rewritten import after, goes_on, trained_by
from torch import nn

from mebp_compile.kernels import fused
from mebp_compile.passes import norms

pytestmark = pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no C compiler)")
LEFT = ("aten.rsqrt.default", "aten.mean.dim", "aten.pow.Tensor_Scalar", "aten.div.Scalar")


@pytest.mark.parametrize(("family", "count"), [("qwen2", 5), ("llama", 5), ("gemma3", 9)])
def test_language_models(family: str, count: int) -> None:
    """Every norm with a frozen weight, Gemma's 1 + w among them; those of Gemma's queries and keys, which see transposed heads, are named."""
    notes, ops = after(norms, Recipe(family, lora="model", dtype=torch.bfloat16).build())
    assert notes[0] == f"norms: {count} in one walk each"
    assert ops["mebp.rms_norm.default"] == count
    assert all("not contiguous" in note for note in notes[1:])
    assert bool(notes[1:]) == (family == "gemma3") == any(ops[op] for op in LEFT)


def test_fp32_is_named() -> None:
    """Without casts torch adds up the gradient of x in another order, which is left alone."""
    notes, _ = after(norms, Recipe("qwen2", lora="model").build())
    assert "its backward is not the one of RMSNorm" in notes[-1]


def test_a_trained_weight_is_named() -> None:
    """What was normed is needed for the gradient of the weight."""
    notes, ops = after(norms, Recipe("qwen2").build())
    assert "because its weight is trained" in notes[0]
    assert not ops["mebp.rms_norm.default"]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))


def root(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * root(wide)).to(x.dtype)


def normed(function: Any) -> Training:
    return trained_by(lambda x, first, norm: function(first(x), norm.weight), nn.Linear(32, 32), Normed(), frozen=(1,), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: norm(x) * w, ""),
        (lambda x, w: w * norm(x) + x, ""),
        (lambda x, w: ((y := x.float()) * (r := root(y))).to(x.dtype) * w + r.to(x.dtype), "its backward is not"),
        (lambda x, w: norm(x) * 2.0, "it has no weight"),
        (lambda x, w: (n := norm(x)) * w + n, "trained"),
        (lambda x, w: norm(x) * w[:1], "the weight is no vector"),
        (lambda x, w: norm(x.transpose(0, 1)) * w, "not contiguous"),
    ],
)
def test_forms(function: Any, reason: str) -> None:
    """What is an RMSNorm, and what only looks like one; each place that is left has its reason."""
    notes, ops = after(norms, normed(function))
    assert ops["mebp.rms_norm.default"] == ops["mebp.rms_norm_backward.default"] == (0 if reason else 1)
    assert reason in notes[0]


def test_training_goes_on() -> None:
    """A norm with a residual."""
    goes_on(lambda: normed(lambda x, w: w * norm(x) + x), ("rms_norm", "rms_norm_backward"), 2e-2)


def test_an_output_that_the_arena_does_not_take() -> None:
    """The scales, one number a row, are too small for the arena and the normed rows are not: each goes where the plan has it."""
    build = lambda: trained_by(  # noqa: E731
        lambda x, first, scaled: scaled.weight * norm(first(x)) + x, nn.Linear(32, 32), Normed(), batch=(2, 60, 32), frozen=(1,),
        dtype=torch.bfloat16,
    )  # fmt: skip
    goes_on(build, ("rms_norm.out",), 2e-2)


@pytest.mark.parametrize(("family", "dtype", "tolerance"), [("qwen2", torch.bfloat16, 2e-2), ("gemma3", torch.bfloat16, 2e-2)])
def test_language_models_go_on(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """LoRA of whole models."""
    goes_on(Recipe(family, optimizer="sgd", lora="model", dtype=dtype).build, ("rms_norm", "rms_norm_backward"), tolerance)
