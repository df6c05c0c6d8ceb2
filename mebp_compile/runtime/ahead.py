"""What the first call of a step will leave behind, so that the calls after it can be planned before it runs.

An optimizer may make state by its first update only (SGD's momentum buffer), and a step may leave gradients to which its next call adds:
the calls after the first are then another program, which must fit the budget too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mebp_compile.capture import State
from mebp_compile.graph import Graph, Value
from mebp_compile.runtime.state import LiveState


@contextlib.contextmanager
def state_after(state: State, graph: Graph, ignored_gradients: frozenset[str]) -> Iterator[bool]:
    """Inside, gradients and optimizer state that a call of `graph` makes are there, in memory that nobody touches. False: it makes none."""
    live = LiveState(state, {})
    new = {path: name for path, name in graph.results if live.lacks(path) and path.removeprefix("gradient:") not in ignored_gradients}
    had = {root: set(optimizer.state) for root, optimizer in state.optimizers.items()}
    try:
        for path, name in new.items():
            live.put(path, _untouched(graph.value[name], live.owner(path).device))
        yield bool(new)
    finally:
        for path in new:
            live.forget(path)
        for root, optimizer in state.optimizers.items():
            for parameter in set(optimizer.state) - had[root]:
                del optimizer.state[parameter]


def _untouched(value: Value, device: torch.device) -> torch.Tensor:
    """A tensor like the value. Large memory that is never written to is never resident."""
    return torch.empty_strided(value.shape, value.stride, dtype=getattr(torch, value.dtype), device=device)
