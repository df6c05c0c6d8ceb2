"""Products of bf16 matrices in blocks of fp32: all of them where the processor has no instructions for bf16, none elsewhere, and training goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Recipe
from rewritten import goes_on, traced

from mebp_compile import torch_private
from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.lower import lower
from mebp_compile.passes import products

BF16 = torch.bfloat16
RECIPE = Recipe("qwen2", optimizer="sgd", lora="model", dtype=BF16)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not multiply bf16."""
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", lambda: False)


def counted(recipe: Recipe) -> tuple[list[str], Counter[str]]:
    """The pass's notes, and the ops after it."""
    made = traced(recipe.build())
    applies = products.applies(made.module)
    notes = products.run(made.module)
    assert applies == bool(notes)
    return notes, Counter(op.target for op in lower(made).ops)


@pytest.mark.usefixtures("narrow")
def test_every_product_of_bf16_matrices() -> None:
    """Forward and backward."""
    before = Counter(op.target for op in lower(traced(RECIPE.build())).ops)
    notes, after = counted(RECIPE)
    for kind in ("mm", "addmm"):
        assert after[f"mebp.{kind}.default"] == before[f"aten.{kind}.default"] > 0
        assert after[f"aten.{kind}.default"] == 0
    assert f"{before['aten.mm.default'] + before['aten.addmm.default']:,} of bf16 matrices" in notes[0]


@pytest.mark.parametrize(("native", "dtype"), [(True, BF16), (False, torch.float32)])
def test_none_elsewhere(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor multiplies bf16, or the model is in fp32."""
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", lambda: native)
    notes, after = counted(RECIPE.but(dtype=dtype))
    assert not notes
    assert after["mebp.mm.default"] == after["mebp.addmm.default"] == 0


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_training_goes_on(family: str) -> None:
    """Losses and parameters of three steps, to the rounding of bf16."""
    goes_on(RECIPE.but(family=family).build, ("mm",), 2e-2)


@pytest.mark.usefixtures("narrow")
def test_not_in_tier_exact() -> None:
    """There the bits are torch's."""
    training = RECIPE.build()
    assert "mebp.mm" not in optimize(training.step, "100MB", example=training.batch(0), effort="fast", cache=False).code


@pytest.mark.usefixtures("narrow")
def test_streamed_weights_by_tiles(disk_folder: Path) -> None:
    """The Loops of streamed weights and of the loss multiply in the same way, and the budget holds."""
    recipe = RECIPE.but(config=(("hidden_size", 64), ("intermediate_size", 16384), ("vocab_size", 16384)))
    options: dict[str, Any] = {"weights": "int4", "offload": disk_folder, "effort": "fast", "cache": False}
    training, other = recipe.build(), recipe.build()
    with pytest.raises(BudgetInfeasible) as refused:
        optimize(recipe.build().step, 1, example=recipe.batch(0), numerics="reassociate", **options)
    smallest = refused.value.smallest_bytes
    tight = optimize(training.step, smallest, numerics="reassociate", **options)
    roomy = optimize(other.step, "100MB", **options)
    for call in range(2):
        batch = training.batch(call)
        assert torch.allclose(tight(*batch).float(), roomy(*batch).float(), rtol=5e-3)
    assert tight.plan.peak_bytes <= smallest
    in_loops = [line for line in tight.code.splitlines() if line.startswith("    ") and "mebp.mm" in line]
    assert in_loops
    assert "torch.mm(" not in tight.code
    assert "torch.addmm(" not in tight.code
