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
from mebp_compile.passes import run_passes, tiled_loss
from mebp_compile.runtime.metering import meter_storages


def notes_of(training: Training) -> tuple[list[str], set[str]]:
    """The notes of the pass, and the ops of the step after it."""
    traced = capture(training.step, find_state(training.step, None), training.batch(0), {})
    notes = tiled_loss.run(traced.module)
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


def test_the_exact_tier_computes_as_eager_does() -> None:
    """Below the tier no op of this package's own comes in."""
    training = Recipe("qwen2", lora="model").build()
    traced = capture(training.step, find_state(training.step, None), training.batch(0), {})
    run_passes(traced.module, "exact")
    assert not [node for node in traced.module.graph.nodes if str(node.target).startswith("mebp")]


def test_returned_logits_stay_and_the_note_says_so() -> None:
    """A step that returns the model's output needs the logits."""
    notes, ops = notes_of(Recipe("qwen2", returns="output").build())
    assert len(notes) == 1
    assert "the step returns them" in notes[0]
    assert not [op for op in ops if op.startswith("mebp")]


CAPPED: tuple[tuple[str, Any], ...] = (("final_logit_softcapping", 5.0),)
CROSS = nn.functional.cross_entropy


def smoothed(recipe: Recipe, smoothing: float, sliced: bool = False, reduction: str = "mean") -> Training:
    """A language model trained by a loss of its own: labels smoothed, and shifted by a slice of the logits or by labels that are ignored."""
    torch.manual_seed(0)
    model = recipe.model().train()
    optimizer = OPTIMIZERS[recipe.optimizer]([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        wanted = ids[:, 1:] if sliced else nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        logits = logits[:, :-1] if sliced else logits
        loss = CROSS(logits.float().reshape(-1, logits.shape[-1]), wanted.reshape(-1), label_smoothing=smoothing, reduction=reduction)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return Training([model], [optimizer], step, recipe.batch)


@pytest.mark.parametrize("lora", [None, "float32"])
@pytest.mark.parametrize("config", [(), CAPPED, (*CAPPED, ("tie_word_embeddings", False))], ids=["plain", "capped", "capped-untied"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("sliced", "reduction", "dtype"), [(True, "mean", torch.float32), (False, "sum", torch.bfloat16)])
def test_every_form_of_the_loss_is_recognised(
    lora: str | None, config: Any, smoothing: float, sliced: bool, reduction: str, dtype: torch.dtype
) -> None:
    """Gemma's soft-capping, label smoothing, both, the shift by a slice, head trained or frozen: the note names them, and nothing is left."""
    notes, ops = notes_of(smoothed(Recipe("gemma3", lora=lora, config=config, dtype=dtype), smoothing, sliced, reduction))
    assert len(notes) == 1
    assert "never whole" in notes[0]
    assert ("soft-capped at 5" in notes[0]) == bool(config)
    assert ("smoothed by 0.1" in notes[0]) == bool(smoothing)
    left = ("softmax_backward", "nll_loss", "tanh_backward", "log_softmax")
    assert not [op for op in ops if any(name in op for name in left)]
    assert ("mebp.head_gradient.default" in ops) == (lora is None)


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


def capped(z: torch.Tensor, inner: Any = 30.0, outer: Any = 30.0) -> torch.Tensor:
    return torch.tanh(z / inner) * outer


def own_smoothing(z: torch.Tensor, y: torch.Tensor, even: float = 0.1, ignored: int = -100, reduction: str = "mean") -> torch.Tensor:
    """Written by hand: as cross_entropy does it, but for the weights, the rows that count, or the reduction of one part."""
    logp = torch.log_softmax(z, 1)
    rest = (-logp.sum(1)).masked_fill_(y == ignored, 0.0)
    return nn.functional.nll_loss(logp, y, reduction=reduction) * 0.9 + rest.sum() / (~(y == -100)).sum() * (even / 300)


@pytest.mark.parametrize(
    ("loss", "bias", "reason"),
    [
        (lambda z, y: CROSS(z, y, weight=torch.ones(300)), False, "weighs the classes"),
        (lambda z, y: CROSS(z, y, reduction="none").sum(), False, "not reduced"),
        (lambda z, y: CROSS(z, y), True, "not by one matmul"),
        (lambda z, y: CROSS(z[::2], y[::2]), False, "takes the rows of the logits apart"),
        (lambda z, y: CROSS(z[:, :200], y), False, "takes the rows of the logits apart"),
        (lambda z, y: CROSS(z[2:][:4], y[:4]), False, "sliced more than once"),
        (lambda z, y: CROSS(z.view(2, 4, 300).transpose(1, 2), y.view(2, 4)), False, "nll_loss2d_forward"),
        (lambda z, y: CROSS(z, torch.full((8, 300), 1 / 300)), False, "log_softmax is used by aten.mul"),
        (lambda z, y: -torch.log_softmax(z, 1).gather(1, y[:, None]).mean(), False, "log_softmax is used by aten.gather"),
        (lambda z, y: CROSS(z, y) + CROSS(z, y + 1), False, "more than one loss"),
        (lambda z, y: CROSS(z, y) + z.square().mean(), False, "another use"),
        (lambda z, y: CROSS(capped(z), y) + z.square().mean(), False, "another use"),
        (lambda z, y: CROSS(z, y, label_smoothing=0.1) + z.logsumexp(1).mean(), False, "another use"),
        (lambda z, y: CROSS(z, y, label_smoothing=0.1, weight=torch.ones(300)), False, "weighs the classes"),
        (lambda z, y: CROSS(z * 2.0, y), False, "made by aten.mul"),
        (lambda z, y: CROSS(torch.tanh(z) * 30.0, y), False, "made by aten.mul"),
        (lambda z, y: CROSS(capped(z, 30.0, 20.0), y), False, "not cap * tanh(logits / cap)"),
        (lambda z, y: CROSS(capped(z, -3.0, -3.0), y), False, "not cap * tanh(logits / cap)"),
        (lambda z, y: CROSS(capped(z, torch.tensor(3.0), torch.tensor(3.0)), y), False, "not a number"),
        (lambda z, y: own_smoothing(z, y, even=0.2), False, "do not add up to 1"),
        (lambda z, y: own_smoothing(z, y, ignored=3), False, "leaves other rows out"),
        (lambda z, y: own_smoothing(z, y, reduction="sum"), False, "reduced in another way"),
        (lambda z, y: CROSS(torch.log_softmax(z, 1), y), False, "made by aten._log_softmax"),
    ],
)  # fmt: skip
def test_what_is_not_recognised_is_named(loss: Any, bias: bool, reason: str) -> None:
    """Class weights, no reduction, a bias, a part of the words, other shapes, a second use, almost a cap, almost smoothing: left alone, with
    the reason."""
    notes, ops = notes_of(classifier(loss, bias))
    assert reason in notes[0]
    assert all(note.startswith("tiled loss: not for the loss at ") for note in notes)
    assert not [op for op in ops if op.startswith("mebp")]


def test_smoothing_by_hand_is_recognised() -> None:
    """The sums of cross_entropy's label smoothing, written out."""
    notes, _ = notes_of(classifier(own_smoothing))
    assert "labels smoothed by 0.1" in notes[0]


def test_a_batched_head_is_named() -> None:
    """A slice of the hidden states makes of a frozen head a batched matmul: the note says what to do, and doing it helps."""
    torch.manual_seed(0)
    hidden, head = nn.Linear(16, 16), nn.Linear(16, 300, bias=False).requires_grad_(False)
    optimizer = torch.optim.SGD(hidden.parameters(), lr=0.1)
    for dense in (False, True):

        def step(x: torch.Tensor, y: torch.Tensor, dense: bool = dense) -> torch.Tensor:
            optimizer.zero_grad()
            seen = hidden(x)[:, :-1]
            loss = CROSS(head(seen.contiguous() if dense else seen).reshape(-1, 300), y.reshape(-1))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss

        notes, _ = notes_of(Training([hidden, head], [optimizer], step, lambda call: (torch.randn(2, 5, 16), torch.arange(8).view(2, 4))))
        assert ("never whole" if dense else "aten.bmm.default, not by one matmul (a contiguous() before the head makes it one)") in notes[0]


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


def goes_on(own: Training, other: Training, batch: Callable[[int], tuple[Any, ...]]) -> None:
    """Losses and parameters agree with eager's to rounding over three steps."""
    compiled = optimize(other.step, "100MB", numerics="reassociate", effort="fast", cache=False)
    for call in range(3):
        torch.manual_seed(call)
        expected = own.step(*batch(call))
        torch.manual_seed(call)
        assert torch.allclose(compiled(*batch(call)), expected.detach(), rtol=1e-5)
    assert "mebp.linear_cross_entropy" in compiled.code
    assert differences(own, other) < 1e-5


@pytest.mark.parametrize(("family", "clip"), [("qwen2", None), ("qwen2", 0.5), ("gpt2", None), ("gpt2", 0.5)])
def test_training_goes_on_as_it_did(family: str, clip: float | None) -> None:
    """Full fine-tuning with a tied head in fp32."""
    recipe = Recipe(family, optimizer="sgd", clip=clip)
    goes_on(recipe.build(), recipe.build(), recipe.batch)


@pytest.mark.parametrize(
    ("config", "smoothing", "sliced", "reduction"),
    [(CAPPED, 0.0, True, "mean"), ((), 0.1, True, "sum"), (CAPPED, 0.2, False, "mean")],
)
def test_training_goes_on_capped_and_smoothed(config: Any, smoothing: float, sliced: bool, reduction: str) -> None:
    """The same with Gemma's soft-capping, label smoothing, and the shift by a slice."""
    recipe = Recipe("gemma3", optimizer="sgd", config=config)
    own, other = (smoothed(recipe, smoothing, sliced, reduction) for _ in range(2))
    goes_on(own, other, recipe.batch)


@pytest.mark.parametrize("rows", [slice(2, None), slice(-3, None), slice(-20, -1), slice(1, 6)])
def test_any_slice_of_the_rows(rows: slice) -> None:
    """The loss sees some tokens: the others get no gradient, and do not count in the mean."""
    own, other = (classifier(lambda z, y: CROSS(z[rows], y[rows], label_smoothing=0.1)) for _ in range(2))
    batch = own.batch(0)
    goes_on(own, other, lambda call: batch)


def test_a_cap_that_changes_is_followed() -> None:
    """A cap read from a param group is live: the next call uses its new value."""

    def build() -> Training:
        training = classifier(lambda z, y: CROSS(z, y))
        model, optimizer = training.modules[0], training.optimizers[0]
        optimizer.param_groups[0]["cap"] = 2.0

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            cap = optimizer.param_groups[0]["cap"]
            loss = CROSS(capped(model(x), cap, cap), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss

        return Training([model], [optimizer], step, training.batch)

    own, other = build(), build()
    compiled = optimize(other.step, "100MB", numerics="reassociate", effort="fast", cache=False)
    batch = own.batch(0)
    for cap in (2.0, 0.5):
        own.optimizers[0].param_groups[0]["cap"] = other.optimizers[0].param_groups[0]["cap"] = cap
        assert torch.allclose(compiled(*batch), own.step(*batch).detach(), rtol=1e-5)
    assert "mebp.linear_cross_entropy" in compiled.code


STREAMED: dict[str, tuple[str, tuple[tuple[str, Any], ...], float]] = {
    "plain": ("qwen2", (), 0.0),
    "capped and smoothed": ("gemma3", CAPPED, 0.1),
}


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "capped and smoothed"])
def test_a_streamed_head_is_read_tile_by_tile(name: str, disk_folder: Path) -> None:
    """int4 weights on disk and a budget below the dense head: a loop of rows, and the loss of the step on the dequantised weights."""
    family, config, smoothing = STREAMED[name]
    config = (("hidden_size", 64), ("vocab_size", 16384), *config)
    recipe = Recipe(family, optimizer="sgd", lora="model", dtype=torch.bfloat16, config=config)
    options: dict[str, Any] = {"weights": "int4", "offload": disk_folder, "effort": "fast", "cache": False}
    roomy = optimize(smoothed(recipe, smoothing).step, "100MB", **options)
    training = smoothed(recipe, smoothing)
    tight = optimize(training.step, "1.6MB", numerics="reassociate", **options)
    for call in range(3):
        expected, loss = roomy(*training.batch(call)), tight(*training.batch(call))
        assert torch.allclose(expected.float(), loss.float(), rtol=2e-3)
    batch = training.batch(3)
    assert meter_storages(tight.prepare(*batch), list(batch)).peak_bytes <= tight.plan.tensor_bytes <= tight.plan.peak_bytes
    head_bytes = 16384 * 64 * 2
    assert tight.plan.peak_bytes < head_bytes
    assert "run.cross_entropy_tile" in tight.code
    assert "for tile in run.tiles(16384, " in tight.code
