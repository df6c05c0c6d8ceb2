"""Low-rank sums in whole steps: where they are found, what is left alone, and that training stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Recipe, Training
from rewritten import after, goes_on, traced, trained_by
from torch import nn

from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.kernels import fused
from mebp_compile.passes import low_rank

pytestmark = pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no C compiler)")
BF16 = torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize(("lora", "dtype"), [("model", BF16), ("float32", BF16), ("float32", torch.float32)])
def test_adapters_are_found(family: str, lora: str, dtype: torch.dtype) -> None:
    """Two layers with two adapters each: their sums, forward and backward, and the scale of each wide gradient."""
    notes, ops = after(low_rank, Recipe(family, lora=lora, dtype=dtype).build())
    same = lora == "model" or dtype != BF16
    assert ops["mebp.add_low_rank.default"] >= (6 if same else 4)  # nothing below the first layer's adapters has a gradient
    assert "low-rank sums: 4 scales left the wide gradients" in notes


def lora(x: torch.Tensor, base: nn.Module, down: nn.Module, up: nn.Module) -> torch.Tensor:
    return base(x) + 2.0 * up(down(x))


def adapted(rank: int = 4, function: Any = lora, width: int = 32) -> Training:
    layers = nn.Linear(32, width), nn.Linear(32, rank, bias=False), nn.Linear(rank, width, bias=False)
    return trained_by(function, *layers, frozen=(0,))


@pytest.mark.parametrize(
    ("function", "rank", "width", "sums", "scales"),
    [
        (lora, 4, 32, 1, 1),
        (lambda x, base, down, up: x + lora(x, base, down, up), 4, 32, 1, 1),
        (lambda x, base, down, up: base(x) + up(down(x)), 4, 32, 1, 0),
        (lambda x, base, down, up: 0.5 * up(down(x)) + base(x), 8, 32, 1, 1),
        (lora, 16, 32, 0, 0),
        (lora, 4, 8, 0, 1),
        (lambda x, base, down, up: (product := up(down(x))) * 2.0 + base(x) + product.sum(), 4, 32, 0, 0),
        (lambda x, base, down, up: base(x)[0] + 2.0 * up(down(x)), 4, 32, 0, 1),
        (lambda x, base, down, up: torch.add(base(x), up(down(x)), alpha=2), 4, 32, 0, 0),
    ],
    ids=["plain", "residual", "no scale", "turned", "rank too large", "product too narrow", "used twice", "broadcast", "alpha of add"],
)
def test_forms(function: Any, rank: int, width: int, sums: int, scales: int) -> None:
    """What is a sum with a low-rank product, and what only looks like one."""
    notes, ops = after(low_rank, adapted(rank, function, width))
    assert ops["mebp.add_low_rank.default"] == sums
    assert any("left the wide gradients" in note for note in notes) == bool(scales)


@pytest.mark.parametrize("rank", [4, 16])
def test_training_goes_on(rank: int) -> None:
    """With and without a sum to fuse."""
    goes_on(lambda: adapted(rank), ("add_low_rank",) if rank == 4 else ())


@pytest.mark.parametrize(("family", "dtype", "tolerance"), [("qwen2", torch.float32, 1e-5), ("llama", BF16, 2e-2), ("gemma3", torch.float32, 1e-5)])
@pytest.mark.parametrize("adapters", ["model", "float32"])
def test_language_models_go_on(family: str, dtype: torch.dtype, tolerance: float, adapters: str) -> None:
    """LoRA of whole models, adapters in the model's dtype and in fp32."""
    goes_on(Recipe(family, optimizer="sgd", lora=adapters, dtype=dtype).build, ("add_low_rank",), tolerance)


def test_the_smallest_budget_holds(disk_folder: Path) -> None:
    """All fused ops in a step that recomputes or moves what it can: measured is at most predicted, and that at most the budget."""
    recipe = Recipe("qwen2", optimizer="sgd", lora="model", dtype=BF16, sequence=64)
    with pytest.raises(BudgetInfeasible) as refused:
        optimize(recipe.build().step, 1, example=recipe.batch(0), numerics="reassociate", effort="fast", cache=False, offload=disk_folder)
    ops = ("add_low_rank", "gated", "gated_backward", "rms_norm", "rms_norm_backward", "rope")
    goes_on(recipe.build, ops, 2e-2, refused.value.smallest_bytes, offload=disk_folder)


def test_without_the_kernels_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no C compiler was, the twins would be slower than the ops they replace: the pass says so and leaves them."""
    monkeypatch.setattr(fused, "library", lambda: None)
    made = traced(adapted())
    assert "not built" in low_rank.run(made.module)[0]
    assert not [node for node in made.module.graph.nodes if str(node.target).startswith("mebp")]
