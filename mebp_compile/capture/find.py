"""Find what a training step works on: the modules, optimizers and other stateful objects that its code can reach."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mebp_compile.errors import OptionError, Unsupported

OWN_WORLD = ("torch", "transformers", "peft", "numpy", "builtins", "functools", "mebp_compile")
DEPTH = 5


@dataclass
class Reach:
    """The user's own code that a step reaches: its functions, the objects whose attributes they may read, and every name in their code."""

    functions: list[types.FunctionType] = field(default_factory=list)
    objects: list[tuple[str, Any]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    seen: dict[int, Any] = field(default_factory=dict)


@dataclass
class State:
    """Roots by the name they have in the step: modules, optimizers, and other objects whose Python state must not change.

    stand_ins: during a trace, (stand-in, the tensor that it stands for) by the id of the stand-in.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)
    stand_ins: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(root, path, parameter) of every parameter, each object once."""
        seen: set[int] = set()
        for root, module in self.modules.items():
            for path, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield root, path, parameter


def find_state(step_fn: Callable[..., Any], declared: Iterable[Any] | None = None) -> State:
    """Modules and optimizers that `step_fn` reaches through its closure, `__self__`, partial arguments and the globals it names.

    `declared` (the user's `state=`) replaces the search for modules and optimizers. Raises Unsupported for a DDP-wrapped module.
    """
    found = State()
    for name, item in _everything(step_fn, found.reach):
        _file(found, name, item, roots=declared is None)
    for number, item in enumerate(declared or ()):
        if not isinstance(item, (nn.Module, torch.optim.Optimizer)):
            raise OptionError(f"state[{number}] is a {type(item).__name__}", "list modules and optimizers only: state=[model, optimizer]")
        _file(found, f"model_{number}" if isinstance(item, nn.Module) else f"optimizer_{number}", item, roots=True)
    _drop_submodules(found)
    _refuse_wrappers(found)
    return found


def _file(found: State, name: str, item: Any, roots: bool) -> None:
    name = _identifier(name)
    table: dict[str, Any] = found.others
    if isinstance(item, nn.Module):
        table = found.modules
    elif isinstance(item, torch.optim.Optimizer):
        table = found.optimizers
    if (table is found.others or roots) and not any(known is item for known in table.values()):
        while name in table:
            name += "_"
        table[name] = item


def _identifier(name: str) -> str:
    text = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
    return text if text.isidentifier() else f"state_{text}"


def _everything(step_fn: Callable[..., Any], reach: Reach) -> Iterator[tuple[str, Any]]:
    """What the step reaches, and what the methods reach that its code names, until nothing new turns up."""
    yield from _reachable(step_fn, "step", DEPTH, reach)
    known = -1
    while len(reach.seen) > known:
        known = len(reach.seen)
        for name, item in list(reach.objects):
            for attribute, member in _members(type(item)):
                if attribute == "__call__" or attribute in reach.names:
                    yield from _reachable(member, name, DEPTH, reach)


def _members(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Functions of a class of the user's own and of its bases: methods, static and class methods, properties."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in OWN_WORLD:
            continue
        for name, member in vars(base).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, types.FunctionType):
                yield name, function


def _reachable(item: Any, name: str, depth: int, reach: Reach) -> Iterator[tuple[str, Any]]:
    """(name, object) of every module, optimizer and stateful object that `item` reaches."""
    if depth < 0 or id(item) in reach.seen or isinstance(item, (str, bytes, int, float, type, types.ModuleType, torch.dtype)):
        return
    reach.seen[id(item)] = item
    if isinstance(item, (nn.Module, torch.optim.Optimizer)) or _has_state(item):
        yield name, item
    for child_name, child in _children(item, name, reach):
        yield from _reachable(child, child_name, depth - 1, reach)


def _has_state(item: Any) -> bool:
    """Schedulers, scalers and their like; Python and numpy random generators."""
    return not isinstance(item, torch.Tensor) and (
        hasattr(item, "state_dict") or hasattr(item, "getstate") or hasattr(item, "bit_generator")
    )


def _children(item: Any, name: str, reach: Reach) -> Iterator[tuple[str, Any]]:
    if isinstance(item, functools.partial):
        yield name, item.func
        yield from ((f"{name}_{index}", part) for index, part in enumerate(item.args))
        yield from item.keywords.items()
    elif isinstance(item, types.MethodType):
        yield "self", item.__self__
        yield name, item.__func__
    elif isinstance(item, types.FunctionType):
        yield from _closure(item, reach)
    elif isinstance(item, Mapping):
        yield from ((f"{name}_{key}", part) for key, part in item.items())
    elif isinstance(item, (list, tuple, set)):
        yield from ((f"{name}_{index}", part) for index, part in enumerate(item))
    elif isinstance(item, (nn.Module, torch.Tensor, torch.optim.Optimizer)):
        return
    elif type(item).__module__.split(".")[0] not in OWN_WORLD:
        reach.objects.append((name, item))
        yield from vars(item).items() if hasattr(item, "__dict__") else ()


def _closure(function: types.FunctionType, reach: Reach) -> Iterator[tuple[str, Any]]:
    """Cells, defaults, and the globals that the function's code (and the code nested in it) names."""
    for cell_name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if _filled(cell):
            yield cell_name, cell.cell_contents
    yield from ((f"default_{index}", part) for index, part in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield function.__name__, wrapped
    if function.__module__ and function.__module__.split(".")[0] in OWN_WORLD:
        return
    reach.functions.append(function)
    for code in _codes(function.__code__):
        reach.names.update(code.co_names)
        for name in code.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _drop_submodules(found: State) -> None:
    """A module that lies inside another found module is not a root."""
    inner = {id(child) for module in found.modules.values() for child in module.modules() if child is not module}
    found.modules = {name: module for name, module in found.modules.items() if id(module) not in inner}


def _refuse_wrappers(found: State) -> None:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for root, module in found.modules.items():
        for path, child in module.named_modules():
            if isinstance(child, wrappers) or type(child).__name__ == "FullyShardedDataParallel":
                raise Unsupported(
                    f"{'.'.join(filter(None, (root, path)))} is wrapped in {type(child).__name__}, whose communication "
                    "would be lost in the capture",
                    "pass the module inside it (`.module`) and average the gradients in the step",
                )
            if getattr(child, "gradient_checkpointing", False) and child.training:
                raise Unsupported(
                    f"gradient checkpointing is on in {'.'.join(filter(None, (root, path)))}: it would fix the recompute "
                    "that the solver is to choose",
                    "switch it off: model.gradient_checkpointing_disable() (activation_checkpointing_disable() in newer transformers)",
                )
