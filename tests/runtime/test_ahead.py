"""The calls after the first are planned before the first one runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetInfeasible

Step = Callable[..., Any]
BATCH = (torch.ones(16, 96), torch.zeros(16, dtype=torch.int64))


def momentum_step(clear: str = "first") -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """A perceptron trained by SGD with momentum. clear: where gradients are cleared ("first", "last"), or "never"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if clear == "first":
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if clear == "last":
            optimizer.zero_grad()
        return loss

    return model, optimizer, step


def refusal(compiled: CompiledStep) -> BudgetInfeasible:
    with pytest.raises(BudgetInfeasible) as caught:
        compiled.prepare(*BATCH)
    return caught.value


def test_a_budget_that_only_the_first_call_fits_is_refused_before_it() -> None:
    """The momentum buffers make the later calls need more; nothing has run and no state is left when that is said."""
    model, optimizer, step = momentum_step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    later = refusal(optimize(step, 1, effort="fast", cache=False)).smallest_bytes
    first = smallest_of_the_first_call(step)
    assert later > first
    assert refusal(optimize(step, first, effort="fast", cache=False)).smallest_bytes == later
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))

    _, _, twin = momentum_step()
    compiled = optimize(step, later, effort="fast", cache=False)
    for _ in range(3):
        assert torch.equal(compiled(*BATCH), twin(*BATCH))


def smallest_of_the_first_call(step: Step) -> int:
    """The smallest budget of the program of the first call alone."""
    compiled = optimize(step, 1, effort="fast", cache=False)
    with pytest.raises(BudgetInfeasible) as caught:
        compiled._planned(BATCH, {})
    return caught.value.smallest_bytes


@pytest.mark.parametrize("clear", ["first", "last", "never"])
def test_later_calls_find_their_program_planned(clear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call plans nothing, and state looked into before the first call is as it was."""
    model, optimizer, step = momentum_step(clear)
    _, _, twin = momentum_step(clear)
    compiled = optimize(step, "10MB", effort="fast", cache=False)
    compiled.prepare(*BATCH)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(CompiledStep, "_planned", lambda *_: pytest.fail("planned again"))
    for _ in range(3):
        assert torch.equal(compiled(*BATCH), twin(*BATCH))
    assert sum(map(len, compiled.programs.values())) == 2


def test_a_dry_run_refuses_for_the_later_calls_too() -> None:
    """`plan` says no where the second call would."""
    _, optimizer, step = momentum_step()
    with pytest.raises(BudgetInfeasible):
        optimize(step, smallest_of_the_first_call(step), effort="fast", cache=False).dry_run(*BATCH)
    assert not optimizer.state
