"""Weights that a scheme's name quantises for one step: they are never lost with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from law1 import assert_same, bits, estimated_costs, snapshot
from models import Recipe, Training

import mebp_compile
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.runtime.weights import WeightStore

RECIPE = Recipe("llama", lora="float32")


def frozen(training: Training) -> dict[str, torch.Tensor]:
    """What is quantised: frozen matrices, by name."""
    return {name: p for name, p in training.modules[0].named_parameters() if not p.requires_grad and p.dim() >= 2}


def rounded(training: Training, folder: Path) -> dict[str, object]:
    """What int4 makes of them, as bits."""
    with WeightStore.from_module(training.modules[0], folder / "expected", "int4") as store:
        return {name: bits(store.dense(name, p.dtype)) for name, p in frozen(training).items()}


def held(training: Training) -> dict[str, object]:
    return {name: bits(p.detach()) for name, p in frozen(training).items()}


def test_a_refusal_gives_the_weights_back(tmp_path: Path) -> None:
    """After a refused budget the model holds its dequantised weights, nothing else has changed, and a larger budget trains it."""
    own = RECIPE.build()
    expected, others = rounded(own, tmp_path), {key: bits for key, bits in snapshot(own).items() if not any(name in key for name in frozen(own))}
    with estimated_costs(), pytest.raises(BudgetInfeasible) as refused:
        mebp_compile.optimize(own.step, 1, weights="int4", offload=tmp_path, effort="fast", cache=False, example=own.batch(0))
    assert_same("weights", expected, held(own))
    assert_same("the rest", others, {key: bits for key, bits in snapshot(own).items() if key in others})
    with estimated_costs():
        budget = refused.value.smallest_bytes
        step = mebp_compile.optimize(own.step, budget, weights="int4", offload=tmp_path, effort="fast", cache=False, example=own.batch(0))
    assert torch.isfinite(torch.as_tensor(step(*own.batch(0))))


def test_a_dry_run_gives_the_weights_back(tmp_path: Path) -> None:
    """`plan` plans for quantised weights and leaves the model with dequantised ones, in memory."""
    own = RECIPE.build()
    expected = rounded(own, tmp_path)
    with estimated_costs():
        plan = mebp_compile.plan(own.step, "100MB", weights="int4", offload=tmp_path, effort="fast", cache=False, example=own.batch(0))
    assert any(block.name.endswith("_packed") for block in plan.problem.storages)
    assert_same("weights", expected, held(own))
    assert not list((tmp_path / "weights").iterdir())
