"""The live state of the user's step: finds each persistent tensor where the user's objects hold it, and puts results back there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from mebp_compile.capture import State, tensor_places
from mebp_compile.errors import GraphError

HYPER_NAMES = {"abs": abs, "bool": bool, "float": float, "int": int, "round": round}

Getter = Callable[[], torch.Tensor]


class Live(Protocol):
    """What an engine and its runner ask of a step's state: `LiveState` for the user's objects, `DataState` for plain data."""

    def getter(self, source: str) -> Getter: ...

    def put(self, path: str, tensor: torch.Tensor | None) -> None: ...

    def forget(self, path: str) -> None: ...

    def hyper(self, expression: str) -> Any: ...


class LiveState:
    """Getters by source ("parameter:model:layers.0.weight", ...), resolved against the user's own modules and optimizers."""

    def __init__(self, state: State, constants: dict[str, torch.Tensor]) -> None:
        self.state, self.constants = state, constants
        self.parameters = {f"{root}:{path}": parameter for root, path, parameter in state.parameters()}

    def getter(self, source: str) -> Getter:
        """A function that gives the tensor at `source` as it is now."""
        kind, rest = source.split(":", 1)
        if kind == "parameter":
            parameter = self.parameters[rest]
            return lambda: parameter.detach()
        if kind == "gradient":
            owner = self.parameters[rest]
            return lambda: owner.grad  # type: ignore[return-value]
        if kind == "buffer":
            root, path = rest.split(":", 1)
            module, name = _owner(self.state.modules[root], path)
            return lambda: getattr(module, name)  # type: ignore[no-any-return]
        if kind == "optimizer":
            root, model, path, key = rest.split(":")
            optimizer, owner = self.state.optimizers[root], self.parameters[f"{model}:{path}"]
            return lambda: optimizer.state[owner][key]  # type: ignore[no-any-return]
        if kind == "group":
            root, index, key = rest.split(":")
            group = self.state.optimizers[root].param_groups[int(index)]
            return lambda: group[key]  # type: ignore[no-any-return]
        if kind == "tensor":
            return tensor_places(self.state)[rest]
        if kind == "constant":
            constant = self.constants[rest]
            return lambda: constant
        raise GraphError(f"state source {source!r} is of no known kind")

    def put(self, path: str, tensor: torch.Tensor | None) -> None:
        """Bind a result that outlives the step: a gradient, new optimizer state, a replaced buffer."""
        kind, rest = path.split(":", 1)
        if kind == "gradient":
            self.parameters[rest].grad = tensor
        elif kind == "optimizer":
            root, model, name, key = rest.split(":")
            self.state.optimizers[root].state[self.parameters[f"{model}:{name}"]][key] = tensor
        else:
            root, name = rest.split(":", 1)
            module, attribute = _owner(self.state.modules[root], name)
            setattr(module, attribute, tensor)

    def owner(self, path: str) -> torch.Tensor:
        """The parameter of a gradient or of an entry of optimizer state."""
        kind, rest = path.split(":", 1)
        return self.parameters[rest if kind == "gradient" else ":".join(rest.split(":")[1:3])]

    def lacks(self, path: str) -> bool:
        """Whether there is no such gradient or entry of optimizer state yet. Other state is always there."""
        kind, rest = path.split(":", 1)
        if kind == "gradient":
            return self.parameters[rest].grad is None
        if kind != "optimizer":
            return False
        state = self.state.optimizers[rest.split(":")[0]].state
        owner = self.owner(path)
        return owner not in state or state[owner].get(rest.split(":")[3]) is None

    def forget(self, path: str) -> None:
        """Take away a gradient or an entry of optimizer state."""
        kind, rest = path.split(":", 1)
        if kind == "gradient":
            self.parameters[rest].grad = None
        else:
            del self.state.optimizers[rest.split(":")[0]].state[self.owner(path)][rest.split(":")[3]]

    def hyper(self, expression: str) -> Any:
        """The value now of an expression over param groups, such as `1 - opt.param_groups[0]['lr'] * ...`."""
        return evaluate(expression, self.state.optimizers)


def evaluate(expression: str, optimizers: Mapping[str, Any]) -> Any:
    """The value of a hyper-parameter expression over optimizers by name."""
    return eval(compile(expression, "<hyper>", "eval"), {"__builtins__": HYPER_NAMES, "math": math}, dict(optimizers))


def _owner(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name
