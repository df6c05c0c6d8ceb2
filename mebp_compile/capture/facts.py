"""Python values that a trace bakes in: numbers, strings and small containers that the step's own code reads, and the attributes of modules.

A captured step never runs the user's Python again. What that Python could read is listed here as *places*: read before the trace and
compared after it (`unchanged`: the step must not change them), and compared again at each call (`runtime.guards`: the caller may, and then
the step is captured anew). Tensors in such places are read live at each call, so only their geometry is a fact.
"""

from __future__ import annotations

import hashlib
import marshal
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mebp_compile.capture.find import State

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, set, frozenset, dict)
LARGEST_CONTAINER = 64
# Attributes that torch keeps for itself.
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Place:
    """Somewhere that Python code keeps a value: a cell, a global, an attribute, an entry of a container.

    settles: an attribute of a module or its configuration, which libraries may fill in at the first call.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    settles: bool = False


def read_facts(state: State) -> tuple[tuple[str, str], ...]:
    """(name, text of the value now) of every place. Equal texts mean that the step's Python would do the same; good across processes."""
    result: dict[str, str] = {}
    for place in _reached(state):
        result.setdefault(place.name, fact(place.read()))
    for label, item in _trees(state):  # thousands of attributes, at every call
        for name, value in _kept(item):
            result.setdefault(f"{label}.{name}", fact(value))
    return tuple(result.items())


def fact(value: Any, depth: int = 3) -> str:
    """A value as text: scalars and small containers by content, tensors by geometry, functions by code, all else by type."""
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, CONTAINERS):
        if len(value) > LARGEST_CONTAINER or depth == 0:
            return f"{type(value).__name__} of {len(value)}"
        if isinstance(value, dict):
            parts = [f"{fact(key, depth - 1)}: {fact(item, depth - 1)}" for key, item in value.items()]
        else:
            parts = [fact(part, depth - 1) for part in (sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {list(value.shape)} {value.stride()} {value.requires_grad}"
    if isinstance(value, types.FunctionType):
        return f"{value.__qualname__} {hashlib.sha256(marshal.dumps(value.__code__)).hexdigest()[:16]}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def places(state: State) -> Iterator[Place]:
    """Every place whose value the step's Python could have read, each name once."""
    taken: set[str] = set()
    for place in _all_places(state):
        if place.name not in taken:
            taken.add(place.name)
            yield place


def tensor_places(state: State) -> dict[str, Callable[[], Any]]:
    """Readers, by name, of the places that hold a tensor."""
    return {place.name: place.read for place in places(state) if isinstance(place.read(), torch.Tensor)}


def _all_places(state: State) -> Iterator[Place]:
    yield from _reached(state)
    for label, item in _trees(state):
        yield from _attributes(label, item, None)


def _reached(state: State) -> Iterator[Place]:
    """What the step's own code reads: cells, globals, and attributes of objects that are no modules."""
    for function in state.reach.functions:
        yield from _with_entries(_cells(function))
        yield from _with_entries(_globals(function))
    for name, item in state.reach.objects:
        yield from _with_entries(_attributes(name, item, state.reach.names))


def _trees(state: State) -> Iterator[tuple[str, Any]]:
    """All modules and their configuration, by name."""
    for root, top in state.modules.items():
        for path, module in top.named_modules():
            yield f"{root}.{path}" if path else root, module
        yield f"{root}.config", getattr(top, "config", None)


def _with_entries(some: Iterator[Place]) -> Iterator[Place]:
    """The places, and the tensors that lie in their lists and dicts as places of their own."""
    for place in some:
        yield place
        value = place.read()
        if isinstance(value, (list, dict)) and len(value) <= LARGEST_CONTAINER:
            for key in value if isinstance(value, dict) else range(len(value)):
                if isinstance(value[key], torch.Tensor):
                    yield _entry(place, key)


def _entry(place: Place, key: Any) -> Place:
    return Place(f"{place.name}[{key!r}]", lambda: place.read()[key], lambda value: place.read().__setitem__(key, value))


def _cells(function: Any) -> Iterator[Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            _ = cell.cell_contents
        except ValueError:
            continue
        yield Place(
            f"{function.__qualname__}: {name}",
            lambda cell=cell: cell.cell_contents,
            lambda value, cell=cell: setattr(cell, "cell_contents", value),
        )


def _globals(function: Any) -> Iterator[Place]:
    scope = function.__globals__
    for name in function.__code__.co_names:
        if name in scope and not isinstance(scope[name], (types.ModuleType, type)):
            label = f"{function.__module__}.{name}"
            yield Place(label, lambda name=name: scope.get(name), lambda value, name=name: scope.__setitem__(name, value))


def _kept(item: Any) -> list[tuple[str, Any]]:
    """Attributes of an object, without what torch keeps for itself."""
    if not hasattr(item, "__dict__"):
        return []
    return [(n, v) for n, v in vars(item).items() if n not in OWN_ATTRIBUTES and not isinstance(v, (nn.Module, torch.optim.Optimizer))]


def _attributes(label: str, item: Any, names: set[str] | None) -> Iterator[Place]:
    """Attributes of an object: those that the step's code names, or all (`names` None), without what torch keeps for itself."""
    for name, _ in _kept(item):
        if names is None or name in names:
            yield Place(
                f"{label}.{name}",
                lambda name=name: vars(item).get(name),
                lambda value, name=name: setattr(item, name, value),
                settles=names is None,
            )
