"""All state of a step, wherever it lies: copies of what modules and optimizers hold, with what is on disk read from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mebp_compile.capture import State
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.memory import memory_errors


def state_dict(state: State, homes: Homes | None) -> dict[str, Any]:
    """Copies of all state: the `state_dict()` of each module and optimizer, with what lies on disk read from there.

    Keys are "model" and "optimizer" where the step has one module and one optimizer, else the names that the step has for them.
    Tensors without a value here (streamed weights, which their store keeps) are left out; ties stay ties.
    """
    with memory_errors("copying state"):
        return _state_dict(state, homes.loaders() if homes is not None else {})


def _state_dict(state: State, loaders: Mapping[int, Callable[[], torch.Tensor]]) -> dict[str, Any]:
    copies: dict[int, torch.Tensor] = {}
    result: dict[str, Any] = {}
    for root, module in state.modules.items():
        result["model" if len(state.modules) == 1 else root] = _copied(module.state_dict(keep_vars=True), loaders, copies)
    for root, optimizer in state.optimizers.items():
        plain = optimizer.state_dict()
        plain["state"] = {key: _copied(dict(entries), loaders, copies) for key, entries in plain["state"].items()}
        result["optimizer" if len(state.optimizers) == 1 else root] = plain
    return result


def _copied(entries: Any, loaders: Mapping[int, Callable[[], torch.Tensor]], copies: dict[int, torch.Tensor]) -> Any:
    """The dict with its tensors replaced by copies, in place; those without a value are removed. `copies`: made so far, by id."""
    for key, value in list(entries.items()):
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) not in copies and id(value) in loaders:
            copies[id(value)] = loaders[id(value)]()
        elif id(value) not in copies and value.device.type != "meta":
            copies[id(value)] = value.detach().clone()
        if id(value) in copies:
            entries[key] = copies[id(value)]
        else:
            del entries[key]
    return entries
