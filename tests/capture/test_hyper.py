"""Live hyper-parameters: expressions that follow Python's arithmetic exactly, guards for what Python decides, and what gets lost."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mebp_compile.capture import find_state, initialise_optimizer
from mebp_compile.capture.hyper import HyperTable, LiveFloat, followed_math, live_groups, stand_in
from mebp_compile.capture.lost import KNOWN, lost_number, may_lose
from mebp_compile.capture.trace import trace_step
from mebp_compile.runtime.state import HYPER_NAMES

NUMBERS = st.floats(0.01, 100.0, allow_nan=False) | st.floats(-5.0, -0.01)


def evaluate(expression: str, **values: float) -> Any:
    return eval(expression, {"__builtins__": HYPER_NAMES, "math": math}, values)


@given(
    NUMBERS, NUMBERS, st.lists(st.sampled_from(["+", "-", "*", "/", "r-", "r/", "neg", "abs", "sqrt", "//", "%"]), min_size=1, max_size=6)
)
@settings(max_examples=200, deadline=None)
def test_expressions_give_what_python_gives(lr: float, other: float, steps: list[str]) -> None:
    """Any chain of arithmetic on a live number is an expression whose value, from the true number, is the same double."""
    table = HyperTable()
    live: Any = table.live(lr, "lr")
    plain: Any = lr
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}
    with followed_math():
        for step in steps:
            if plain == 0 or abs(plain) > 1e100:
                break
            if isinstance(live, LiveFloat) and stand_in(live) == 0:  # `//` of the stand-in alone: dividing by it is refused in a capture
                break
            if step == "neg":
                live, plain = -live, -plain
            elif step == "abs":
                live, plain = abs(live), abs(plain)
            elif step == "sqrt":
                live, plain = math.sqrt(abs(live)), math.sqrt(abs(plain))
            elif step.startswith("r"):
                live, plain = operators[step[1:]](other, live), operators[step[1:]](other, plain)
            else:
                live, plain = operators[step](live, other), operators[step](plain, other)
    if isinstance(live, LiveFloat):
        assert evaluate(live.expression, lr=lr).hex() == plain.hex()
        assert table.expressions[stand_in(live)] == live.expression


@given(NUMBERS)
@settings(deadline=None)
def test_decisions_are_made_on_true_values(lr: float) -> None:
    """Comparisons, int(), round() and bool() see the true value, and leave a guard that it satisfies."""
    table = HyperTable()
    live: Any = table.live(lr, "lr")
    assert (live == lr) is True
    assert (live < lr) is False
    assert (live >= lr) is True
    assert bool(live) is True
    assert int(live) == int(lr)
    assert round(live, 2) == round(lr, 2)
    with followed_math():
        assert math.floor(live) == math.floor(lr)
    assert all(evaluate(guard.subject, lr=lr) == guard.expect for guard in table.guards.values())


def test_zero_and_one_stay_themselves_under_guard() -> None:
    """0 and 1 are what optimizers branch on: they stay plain numbers, guarded; other numbers never look like them."""
    table = HyperTable()
    assert [type(table.live(value, str(value))) for value in (0.0, 1.0, float("inf"))] == [float] * 3
    assert len(table.guards) == 3
    assert isinstance(table.live(0.5, "half"), LiveFloat)


def test_equal_values_have_different_stand_ins() -> None:
    """Two groups with the same learning rate are told apart; another salt gives other stand-ins."""
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    )
    first, second = (group["lr"] for group in live_groups(optimizer, "own", HyperTable()))
    assert stand_in(first) != stand_in(second)
    assert stand_in(live_groups(optimizer, "own", HyperTable("again"))[0]["lr"]) != stand_in(first)


def test_constants_made_of_hyper_parameters_are_found() -> None:
    """A one-element tensor made of a live number is its expression, in float64 and, rounded, in float32; in bfloat16 it can't be told."""
    table = HyperTable()
    live = table.live(0.3, "lr")
    assert table.expression_of(torch.tensor(stand_in(live), dtype=torch.float64)) == "lr"
    assert table.expression_of(torch.tensor(stand_in(live), dtype=torch.float32)) == "lr"
    assert table.expression_of(torch.tensor(stand_in(live), dtype=torch.bfloat16)) is None
    assert table.expression_of(torch.tensor([1.0, 2.0])) is None
    assert table.expression_of(torch.tensor(0.3)) is None


KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}, "Adam": {"weight_decay": 0.01}, "AdamW": {},
    "NAdam": {"weight_decay": 0.01},
    "Adamax": {"weight_decay": 0.01}, "RMSprop": {"momentum": 0.9, "weight_decay": 0.01, "centered": True},
    "Adadelta": {"weight_decay": 0.01},
    "Adagrad": {"lr_decay": 0.01, "weight_decay": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_known_optimizers_lose_no_hyper_parameter(kind: type[torch.optim.Optimizer], foreach: bool, dtype: torch.dtype) -> None:
    """Two traces with different stand-ins agree for every optimizer that is trusted without the second trace, before and after its first
    step.
    """
    net = nn.Linear(3, 2).to(dtype)
    own = kind(net.parameters(), lr=0.05, foreach=foreach, **KINDS[kind.__name__])  # type: ignore[call-arg]

    def step(x: torch.Tensor) -> None:
        net(x).sum().backward()
        own.step()
        own.zero_grad()

    x = torch.ones(2, 3, dtype=dtype)
    for _ in range(2):
        state = find_state(step)
        initialise_optimizer(own)
        assert lost_number(trace_step(step, state, (x,), {}), trace_step(step, state, (x,), {}, "again")) is None
        step(x)
    assert not may_lose(find_state(step))


@pytest.mark.parametrize("reason", ["unknown class", "reads groups", "holds a group", "hook"])
def test_code_that_may_lose_hyper_parameters_is_traced_twice(reason: str) -> None:
    """Optimizers of the user's own, hooks on steps, and code that reads param groups make the second trace necessary."""

    class Own(torch.optim.SGD):
        pass

    net = nn.Linear(3, 2)
    own = (Own if reason == "unknown class" else torch.optim.SGD)(net.parameters(), lr=0.1)
    group = own.param_groups[0]
    if reason == "hook":
        own.register_step_post_hook(lambda *args: None)
    steps: dict[str, Callable[..., Any]] = {
        "reads groups": lambda: own.param_groups[0]["lr"],
        "holds a group": lambda: (own, group["lr"]),
    }
    assert may_lose(find_state(steps.get(reason, lambda: own.step())))
