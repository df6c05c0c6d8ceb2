"""The state of optimizers before their first step: made where `step()` would make it before using it, and only where it is used."""

from __future__ import annotations

from typing import Any

import torch

from mebp_compile import torch_private
from mebp_compile.capture.find import State
from mebp_compile.capture.trace import Traced, parameter_names


def optimizer_state_of(state: State) -> set[tuple[str, int]]:
    """(root, id of parameter) of all the optimizer state that exists."""
    return {
        (root, id(parameter)) for root, optimizer in state.optimizers.items() for parameter, entries in optimizer.state.items() if entries
    }


def initialise_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first `step()` would make before it uses it, for optimizers that do so in `_init_group` (torch.optim).

    State that only comes to be *by* the first update (SGD's momentum buffer) is left absent: the first step is then captured apart.
    """
    if not type(optimizer).__module__.startswith("torch.optim") or not hasattr(optimizer, "_init_group"):
        return
    for group in optimizer.param_groups:
        fresh = [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)]
        grads = [p.grad for p in fresh]
        try:
            for parameter in fresh:
                parameter.grad = parameter.new_zeros(()).expand(parameter.shape)
            lists: list[list[Any]] = [[] for _ in range(torch_private.positional_count(optimizer._init_group) - 1)]
            optimizer._init_group({**group, "params": fresh}, *lists)
        finally:
            for parameter, grad in zip(fresh, grads, strict=True):
                parameter.grad = grad
        for parameter in fresh:
            if not optimizer.state.get(parameter):
                optimizer.state.pop(parameter, None)


def initialise_used(state: State, sources: set[str]) -> None:
    """Make the state that a program known from before finds in its `sources`, as the capture made it."""
    had = optimizer_state_of(state)
    for optimizer in state.optimizers.values():
        initialise_optimizer(optimizer)
    owners = {_owner(source) for source in sources}
    names = parameter_names(state)
    used = {(root, key) for root in state.optimizers for key, name in names.items() if (root, name) in owners}
    forget_state(state, keep=had | used)


def forget_state(state: State, keep: set[tuple[str, int]]) -> None:
    """Take away all optimizer state but that of the (root, id of parameter) in `keep`."""
    for root, optimizer in state.optimizers.items():
        for parameter in [parameter for parameter in optimizer.state if (root, id(parameter)) not in keep]:
            del optimizer.state[parameter]


def drop_unused_state(state: State, traced: Traced, had: set[tuple[str, int]]) -> None:
    """Take away, from the optimizers and from the trace, new state of parameters that the step doesn't update: eager would make none."""
    nodes = [node for node in traced.module.graph.nodes if node.op == "placeholder"]
    used = {
        _owner(item.source) for item, node in zip(traced.inputs, nodes, strict=True) if node.users and item.source.startswith("optimizer:")
    }
    names = parameter_names(state)
    for root, optimizer in state.optimizers.items():
        for parameter in [parameter for parameter, entries in optimizer.state.items() if entries]:
            owner = (root, names[id(parameter)])
            if owner in used or (root, id(parameter)) in had:
                continue
            del optimizer.state[parameter]
            for item, node in list(zip(traced.inputs, nodes, strict=True)):
                if item.source.startswith("optimizer:") and _owner(item.source) == owner:
                    traced.module.graph.erase_node(node)
            kept = [(item, node) for item, node in zip(traced.inputs, nodes, strict=True) if _owner(item.source) != owner]
            traced.inputs, nodes = [item for item, _ in kept], [node for _, node in kept]


def _owner(source: str) -> tuple[str, str]:
    """(optimizer, parameter) of the source of an optimizer's state."""
    kind, *rest = source.split(":")
    return (rest[0], f"{rest[1]}:{rest[2]}") if kind == "optimizer" else ("", "")
