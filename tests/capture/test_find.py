"""What a step reaches: modules, optimizers and stateful objects, by every way in which Python code can hold them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mebp_compile.capture.facts import fact, places, read_facts, tensor_places
from mebp_compile.capture.find import find_state
from mebp_compile.errors import OptionError

MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


def by_globals() -> None:
    MODEL(torch.ones(2)).sum().backward()
    OPTIMIZER.step()


def helper() -> None:
    by_globals()


class Holder:
    def __init__(self) -> None:
        self.parts = {"model": MODEL, "list": [OPTIMIZER]}

    def __call__(self) -> None: ...

    def step(self) -> None: ...

    def indirect(self) -> None:
        self.inner()

    def inner(self) -> None:
        helper()


def decorated(function: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(function)
    def inner() -> None:
        function()

    return inner


STEPS: dict[str, Callable[..., Any]] = {
    "globals": by_globals,
    "helper": helper,
    "lambda": lambda: helper(),
    "nested": lambda: [helper() for _ in range(1)],
    "method": Holder().step,
    "callable": Holder(),
    "indirect": Holder().indirect,
    "partial": functools.partial(lambda net, own=None: None, MODEL, own=OPTIMIZER),
    "partial of method": functools.partial(Holder().step),
    "decorated": decorated(by_globals),
    "defaults": lambda net=MODEL, *, own=OPTIMIZER: None,
    "namespace": functools.partial(lambda box: None, SimpleNamespace(net=MODEL, deep=SimpleNamespace(own=OPTIMIZER))),
}


@pytest.mark.parametrize("name", STEPS)
def test_state_is_found(name: str) -> None:
    """The module and the optimizer are found once each, however the step holds them."""
    state = find_state(STEPS[name])
    assert list(state.modules.values()) == [MODEL]
    assert list(state.optimizers.values()) == [OPTIMIZER]
    assert all(root.isidentifier() for root in (*state.modules, *state.optimizers))


def test_submodules_are_no_roots() -> None:
    """A module inside another found module is reached through it."""
    outer = nn.Sequential(MODEL, nn.ReLU())
    inner = outer[0]
    assert list(find_state(lambda: (outer, inner)).modules.values()) == [outer]


def test_shared_parameters_are_listed_once() -> None:
    """Tied parameters, within a module and between two."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    assert len(list(find_state(lambda: (first, second)).parameters())) == 3


def test_declared_state_replaces_the_search() -> None:
    """With state=[...] only what is named counts; schedulers are still watched."""
    scheduler = torch.optim.lr_scheduler.ConstantLR(OPTIMIZER)
    state = find_state(lambda: (by_globals(), scheduler.step()), [MODEL])
    assert list(state.modules.values()) == [MODEL]
    assert not state.optimizers
    assert scheduler in state.others.values()
    with pytest.raises(OptionError, match="modules and optimizers only"):
        find_state(by_globals, [3])


def test_random_generators_are_watched() -> None:
    """Python and numpy generators in a closure are stateful objects."""
    own = random.Random(0)
    assert own in find_state(lambda: own.random()).others.values()


def test_cycles_and_empty_cells_are_no_trouble() -> None:
    """Objects that hold each other, and a cell that is not filled yet."""
    box: dict[str, Any] = {"net": MODEL}
    box["self"] = box

    def outer() -> Callable[[], Any]:
        def step() -> Any:
            return box, later

        found = find_state(step)
        assert list(found.modules.values()) == [MODEL]
        later = 3
        return step

    outer()


def test_facts_follow_plain_values() -> None:
    """Cells, globals, attributes that the code names and module attributes are facts; counters that it doesn't name are not."""
    box, weights = SimpleNamespace(scale=2.0, steps_done=0), torch.ones(3)
    net = nn.Dropout(0.5)
    state = find_state(lambda: (box.scale, net, weights))
    before = read_facts(state)
    box.steps_done = 5
    weights.add_(1)
    assert read_facts(state) == before
    box.scale = 3.0
    changed = read_facts(state)
    assert changed != before
    net.p = 0.25
    assert read_facts(state) != changed
    assert any(read() is weights for read in tensor_places(state).values())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([1], (1,)),
        ({"a": 1}, {"a": 2}),
        (torch.ones(2), torch.ones(3)),
        (lambda: 1, lambda: 2),
        (None, 0),
    ],
)
def test_facts_tell_values_apart(left: Any, right: Any) -> None:
    """Values that Python calls equal, or that print alike, are different facts where code can tell them apart."""
    assert fact(left) != fact(right)
    assert fact(left) == fact(left)


def test_places_can_be_written() -> None:
    """What is read at a place can be put back there."""
    knob = {"scale": torch.ones(1)}
    count = 1
    state = find_state(lambda: (knob, count))
    for place in list(places(state)):
        if place.name.endswith(": count"):
            place.write(7)
        if place.name.endswith("['scale']"):
            place.write(torch.zeros(1))
    assert count == 7
    assert knob["scale"].item() == 0
