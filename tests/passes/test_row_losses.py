"""Losses that take one number a row: the same bits, and logits that run in blocks of tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from law1 import assert_same_training, run_both
from models import Recipe, Training
from rewritten import traced
from torch import nn

from mebp_compile.compiler import optimize
from mebp_compile.passes import row_losses

ROWS, WIDTH, CLASSES = 64, 32, 512
CROSS = nn.functional.cross_entropy


def head(dtype: torch.dtype = torch.bfloat16, double: bool = False, scale: float = 1.0, only: int | None = None, **form: Any) -> Training:
    """A classifier of rows, its head frozen. `double`: logits in float32 before the loss. `only`: one class has all the targets."""
    torch.manual_seed(0)
    body, frozen = nn.Linear(WIDTH, WIDTH).to(dtype), nn.Linear(WIDTH, CLASSES, bias=False).to(dtype).requires_grad_(False)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = frozen(body(x))
        loss = CROSS(logits.float() if double else logits, target, **form) * scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def batch(call: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(call)
        target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        target[::3] = form.get("ignore_index", -100)
        return torch.randn(ROWS, WIDTH, generator=generator).to(dtype), target if only is None else torch.full_like(target, only)

    return Training([body, frozen], [optimizer], step, batch)


FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "float32": {"dtype": torch.float32},
    "as language models": {"double": True},
    "a class ignored": {"ignore_index": 0},
    "all ignored": {"only": -100},
    "scaled": {"scale": 0.125},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_same_bits(form: dict[str, Any]) -> None:
    """Whatever is ignored and however rows are put together, losses and updates are eager's; all ignored is nan, as there."""
    step = assert_same_training(lambda: head(**form))
    assert any(op.target == "aten.gather.default" for region in step.graph.ops if region.body for op in region.body.ops)


@pytest.mark.parametrize(
    "form", [{"weight": torch.rand(CLASSES)}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=("weights", "none", "smoothed")
)
def test_other_losses_stay_exact(form: dict[str, Any]) -> None:
    """Where the pass has nothing to do, or another loss looks at the rows too, the step is still eager's."""

    def make() -> Training:
        training = head(dtype=torch.float32, **form)
        if form.get("reduction") == "none":
            training = averaged(training)
        return training

    assert_same_training(make)


def averaged(training: Training) -> Training:
    body, frozen = training.modules

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = CROSS(frozen(body(x)), target, reduction="none").mean()
        loss.backward()
        training.optimizers[0].step()
        training.optimizers[0].zero_grad()
        return loss

    return Training(training.modules, training.optimizers, step, training.batch)


def test_the_backward_waits_for_targets_alone() -> None:
    """After the pass no loss looks at all logits, no gradient starts from what the loss looks like, and there is nothing left to do for it but to
    take the same numbers once more."""
    made = traced(Recipe("qwen2", lora="model").build())
    assert row_losses.applies(made.module)
    assert row_losses.run(made.module) == ["row losses: 1 of one number a token"]
    made.module.graph.lint()
    losses = [node for node in made.module.graph.nodes if str(node.target) == "aten.nll_loss_forward.default"]
    assert [node.args[0].meta["val"].shape[1] for node in losses] == [1, 1]
    assert not any(str(node.target) == "aten.ones_like.default" for node in made.module.graph.nodes)
    assert not row_losses.applies(made.module)


def test_a_target_that_is_no_class_is_still_an_error() -> None:
    """A target out of range raises, as it does in eager."""
    with pytest.raises((IndexError, RuntimeError)):
        assert_same_training(lambda: head(only=CLASSES))


def test_logits_in_blocks_leave_the_same_bits() -> None:
    """With measured costs and a budget of two tensors of logits, the loss runs in blocks that were found to leave the same bits; training is
    eager's."""
    wide = (("vocab_size", 8192), ("hidden_size", 32), ("num_hidden_layers", 1))
    recipe = Recipe("qwen2", optimizer="sgd", dtype=torch.bfloat16, lora="model", sequence=128, batch_size=1, config=wide)
    own, other = recipe.build(), recipe.build()
    step = optimize(other.step, 2 * 128 * 8192 * 4, effort="fast", cache=False)
    run_both(own, other, step, calls=2)
    trips = [int(found) for found in re.findall(r"run\.blocks\(128, (\d+)\)", step.code)]
    assert max(trips) > 1
