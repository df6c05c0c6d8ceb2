"""Steps before and after one pass: which ops are left, and that training goes on as it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from law1 import named_parameters
from models import OPTIMIZERS, Training
from torch import nn

from mebp_compile.capture import capture, find_state
from mebp_compile.capture.trace import Traced
from mebp_compile.compiler import optimize
from mebp_compile.lower import lower
from mebp_compile.runtime.metering import meter_storages


def traced(training: Training) -> Traced:
    return capture(training.step, find_state(training.step, None), training.batch(0), {})


def after(step: ModuleType, training: Training) -> tuple[list[str], Counter[str]]:
    """The notes of one pass, and how often each op is in the Graph after it, which lowers and verifies."""
    made = traced(training)
    applies = step.applies(made.module)
    notes = step.run(made.module)
    made.module.graph.lint()
    assert applies == any("walk" in note for note in notes)
    return notes, Counter(op.target for op in lower(made).ops)


def trained_by(
    function: Callable[..., torch.Tensor], *layers: nn.Module, batch: tuple[int, ...] = (2, 6, 32), frozen: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Training:
    """A training of `layers` (those at `frozen` frozen) by the square of `function(x, *layers)`."""
    torch.manual_seed(0)
    for layer in layers:
        layer.to(dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    for number in frozen:
        layers[number].requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad])

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = function(x, *layers).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    draw = lambda call: (torch.randn(batch, generator=torch.Generator().manual_seed(call)).to(dtype),)  # noqa: E731
    return Training(list(layers), [optimizer], step, draw)


def goes_on(build: Callable[[], Training], ops: tuple[str, ...], tolerance: float = 1e-5, budget: int | str = "100MB", **options: Any) -> None:
    """Losses and parameters of three steps agree with eager's to rounding, in a program that has these ops, at the peak that was predicted."""
    own, other = build(), build()
    compiled = optimize(other.step, budget, numerics="reassociate", effort="fast", cache=False, **options)
    for call in range(3):
        expected, got = own.step(*own.batch(call)), compiled(*own.batch(call))
        assert torch.allclose(got.float(), expected.detach().float(), rtol=tolerance), call
    for op in ops:
        assert f"mebp.{op}" in compiled.code, op
    assert compiled.code.count("run.at(") == len(compiled.plan.placement.offsets)  # what is not in its place takes memory of its own
    batch = own.batch(3)
    own.step(*batch)
    measured_bytes = meter_storages(compiled.prepare(*batch), list(batch)).peak_bytes  # a fourth step
    assert measured_bytes <= compiled.plan.tensor_bytes <= compiled.plan.peak_bytes <= compiled.plan.problem.budget_bytes
    compiled.materialise()
    pairs = zip(named_parameters(own), named_parameters(other), strict=True)
    for (name, a), (_, b) in pairs:
        assert float((a - b).detach().norm() / (a.detach().norm() + 1e-12)) < tolerance, name
