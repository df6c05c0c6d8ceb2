"""Python values that a trace bakes in: numbers, strings and small containers that the step's own code reads, and the attributes of modules.

A captured step never runs the user's Python again. What that Python could read is listed here as *places*: read before the trace and compared
after it (`unchanged`: the step must not change them), and compared again at each call (`runtime.guards`: the caller may, and then the step is
captured anew).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mebp_compile.capture.find import State

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
LARGEST_CONTAINER = 64
# Attributes that torch keeps for itself.
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Place:
    """Somewhere that Python code keeps a value: a cell, a global, an attribute."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def read_facts(state: State) -> dict[str, Any]:
    """The value now of every place, in a form that `==` compares."""
    return {place.name: frozen(place.read()) for place in places(state)}


def frozen(value: Any, depth: int = 3) -> Any:
    """A value as comparable data: scalars as they are, containers by content, all else by identity. Long containers by their length."""
    if isinstance(value, SCALARS):
        return (type(value), repr(value) if isinstance(value, float) else value)
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) > LARGEST_CONTAINER or depth == 0:
            return (type(value), id(value), len(value))
        parts = value.items() if isinstance(value, dict) else value
        return (type(value), tuple(frozen(part, depth - 1) for part in parts))
    return (type(value), id(value))


def places(state: State) -> Iterator[Place]:
    """Every place whose value the step's Python could have read; a name may occur once only."""
    taken: set[str] = set()
    for place in _all_places(state):
        if place.name not in taken and _tracked(place.read()):
            taken.add(place.name)
            yield place


def _tracked(value: Any) -> bool:
    return isinstance(value, (*SCALARS, list, tuple, set, dict, torch.Tensor))


def _all_places(state: State) -> Iterator[Place]:
    for function in state.reach.functions:
        yield from _cells(function)
        yield from _globals(function, state.reach.names)
    for name, item in state.reach.objects:
        yield from _attributes(name, item, state.reach.names)
    for root, top in state.modules.items():
        for path, module in top.named_modules():
            yield from _attributes(".".join(filter(None, (root, path))), module, None)
        yield from _attributes(f"{root}.config", getattr(top, "config", None), None)


def _cells(function: Any) -> Iterator[Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            _ = cell.cell_contents
        except ValueError:
            continue
        yield Place(name, lambda cell=cell: cell.cell_contents, lambda value, cell=cell: setattr(cell, "cell_contents", value))


def _globals(function: Any, names: set[str]) -> Iterator[Place]:
    scope = function.__globals__
    for name in function.__code__.co_names:
        if name in scope:
            yield Place(name, lambda name=name: scope.get(name), lambda value, name=name: scope.__setitem__(name, value))


def _attributes(label: str, item: Any, names: set[str] | None) -> Iterator[Place]:
    """Attributes of an object: those that the step's code names, or all (`names` None), without what torch keeps for itself."""
    for name in list(getattr(item, "__dict__", ())):
        if (names is None or name in names) and name not in OWN_ATTRIBUTES:
            yield Place(f"{label}.{name}", lambda name=name: vars(item).get(name), lambda value, name=name: setattr(item, name, value))
