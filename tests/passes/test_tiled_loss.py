"""The tiled loss in whole steps: where it applies, what it says where it does not, and that training stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from law1 import named_parameters
from models import OPTIMIZERS, Recipe, Training
from torch import nn

from mebp_compile.capture import capture, find_state
from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.passes import run_passes
from mebp_compile.runtime.metering import meter_storages


def notes_of(training: Training, tier: str = "reassociate") -> tuple[list[str], set[str]]:
    """The notes of the passes, and the ops of the step after them."""
    traced = capture(training.step, find_state(training.step, None), training.batch(0), {})
    notes = run_passes(traced.module, tier)
    traced.module.graph.lint()
    return notes, {str(node.target) for node in traced.module.graph.nodes}


@pytest.mark.parametrize(("family", "lora"), [("qwen2", None), ("qwen2", "float32"), ("llama", None), ("llama", "float32"), ("gpt2", None)])
def test_the_logits_of_a_language_model_go(family: str, lora: str | None) -> None:
    """Tied or not, head trained or frozen: neither log-softmax nor nll loss is left, nor their backward."""
    notes, ops = notes_of(Recipe(family, lora=lora).build())
    assert len(notes) == 1
    assert "never whole" in notes[0]
    assert not [op for op in ops if "softmax_backward" in op or "nll_loss" in op]
    assert "mebp.linear_cross_entropy.default" in ops
    assert ("mebp.head_gradient.default" in ops) == (lora is None)


def test_the_exact_tier_changes_nothing() -> None:
    """Below the tier no pass runs."""
    notes, ops = notes_of(Recipe("qwen2").build(), "exact")
    assert not notes
    assert not [op for op in ops if op.startswith("mebp")]


def test_returned_logits_stay_and_the_note_says_so() -> None:
    """A step that returns the model's output needs the logits."""
    notes, ops = notes_of(Recipe("qwen2", returns="output").build())
    assert len(notes) == 1
    assert "the step returns them" in notes[0]
    assert not [op for op in ops if op.startswith("mebp")]


def classifier(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], bias: bool = False) -> Training:
    """A linear classifier with a loss of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 300, bias=bias))
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value

    return Training([model], [optimizer], step, lambda call: (torch.randn(8, 16), torch.arange(8)))


CROSS = nn.functional.cross_entropy


@pytest.mark.parametrize(
    ("loss", "bias", "reason"),
    [
        (lambda z, y: CROSS(z, y, weight=torch.ones(300)), False, "weighs the classes"),
        (lambda z, y: CROSS(z, y, reduction="none").sum(), False, "not reduced"),
        (lambda z, y: CROSS(z, y), True, "not by one matmul"),
        (lambda z, y: CROSS(z[2:], y[2:]), False, "not by one matmul"),
        (lambda z, y: CROSS(z, y) + z.square().mean(), False, "another use"),
        (lambda z, y: CROSS(z, y, label_smoothing=0.1), False, "another use"),
    ],
)  # fmt: skip
def test_what_is_not_recognised_is_named(loss: Any, bias: bool, reason: str) -> None:
    """Class weights, no reduction, a bias, a part of the rows, a second use: left alone, with the reason."""
    notes, ops = notes_of(classifier(loss, bias))
    assert len(notes) == 1
    assert reason in notes[0]
    assert not [op for op in ops if op.startswith("mebp")]


def test_a_refusal_names_the_tier_that_needs_less() -> None:
    """At the exact tier the advice is the tier of a pass that would apply; above it, or where none would, nothing of the kind is said."""
    with pytest.raises(BudgetInfeasible, match=r'numerics="reassociate" \(tiled_loss\)'):
        optimize(Recipe("qwen2").build().step, 1, example=Recipe("qwen2").batch(0), effort="fast", cache=False)
    for options in ({"numerics": "reassociate"}, {}):
        recipe = Recipe("qwen2", returns="loss" if options else "output")
        with pytest.raises(BudgetInfeasible) as caught:
            optimize(recipe.build().step, 1, example=recipe.batch(0), effort="fast", cache=False, **options)
        assert "numerics" not in str(caught.value)


def differences(own: Training, other: Training) -> float:
    """Largest relative difference between the parameters of two trainings."""
    pairs = zip(named_parameters(own), named_parameters(other), strict=True)
    return max(float((a - b).detach().norm() / (a.detach().norm() + 1e-12)) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_goes_on_as_it_did(family: str, clip: float | None) -> None:
    """Full fine-tuning with a tied head in fp32: losses and parameters agree with eager's to rounding over three steps."""
    recipe = Recipe(family, optimizer="sgd", clip=clip)
    own, other = recipe.build(), recipe.build()
    compiled = optimize(other.step, "100MB", numerics="reassociate", effort="fast", cache=False)
    for call in range(3):
        torch.manual_seed(call)
        expected = own.step(*own.batch(call))
        torch.manual_seed(call)
        assert torch.allclose(compiled(*other.batch(call)), expected.detach(), rtol=1e-5)
    assert differences(own, other) < 1e-5


def test_a_streamed_head_is_read_tile_by_tile(disk_folder: Path) -> None:
    """int4 weights on disk and a budget below the dense head: a loop of rows, and the loss of the step on the dequantised weights."""
    recipe = Recipe("qwen2", optimizer="sgd", lora="model", dtype=torch.bfloat16, config=(("hidden_size", 64), ("vocab_size", 16384)))
    options: dict[str, Any] = {"weights": "int4", "offload": disk_folder, "effort": "fast", "cache": False}
    roomy = optimize(recipe.build().step, "100MB", **options)
    training = recipe.build()
    tight = optimize(training.step, "1.5MB", numerics="reassociate", **options)
    for call in range(3):
        expected, loss = roomy(*training.batch(call)), tight(*training.batch(call))
        assert torch.allclose(expected.float(), loss.float(), rtol=2e-3)
    batch = training.batch(3)
    assert meter_storages(tight.prepare(*batch), list(batch)).peak_bytes <= tight.plan.tensor_bytes <= tight.plan.peak_bytes
    head_bytes = 16384 * 64 * 2
    assert tight.plan.peak_bytes < head_bytes
    assert "run.cross_entropy_tile" in tight.code
    assert "for tile in run.tiles(16384, " in tight.code
