"""Guards: what a captured program relies on, asked again at every call.

A program is found by its `signature` (batch geometry, train flags, which state exists); its hyper-parameter facts and batch predicates are
then evaluated. Where anything differs the step is captured and planned anew, inside the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture import State, read_facts
from mebp_compile.capture.contract import Contract


def signature(state: State, batch: Any, ignore_gradients: frozenset[str] = frozenset()) -> tuple[Any, ...]:
    """Hashable facts that decide which program applies: batch, Python values, parameters, train flags, optimizer state, gradients,
    threads.
    """
    return (
        batch_facts(batch),
        read_facts(state),
        tuple(module.training for top in state.modules.values() for module in top.modules()),
        tuple(_parameter(root, path, parameter, ignore_gradients) for root, path, parameter in state.parameters()),
        tuple((tuple(buffer.shape), buffer.stride(), buffer.dtype) for top in state.modules.values() for buffer in top.buffers()),
        tuple(_optimizer(optimizer) for optimizer in state.optimizers.values()),
        environment_facts(),
    )


def batch_facts(batch: Any) -> tuple[Any, ...]:
    """The structure of a batch, the geometry of its tensors, and its other values."""
    leaves, spec = pytree.tree_flatten(batch)
    return (str(spec), tuple(_leaf(leaf) for leaf in leaves))


def environment_facts() -> tuple[Any, ...]:
    """What torch's kernels depend on besides their arguments; the number of threads comes first."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mkldnn.enabled,
    )


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad)
    return (type(leaf).__qualname__, repr(leaf))  # True, 1 and 1.0 are equal, and so are 0.0 and -0.0


def _parameter(root: str, path: str, parameter: torch.Tensor, ignore: frozenset[str]) -> Any:
    grad = parameter.grad is not None and f"{root}:{path}" not in ignore
    return (tuple(parameter.shape), parameter.dtype, parameter.requires_grad, grad)


def _optimizer(optimizer: torch.optim.Optimizer) -> Any:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return tuple(
        tuple(key if value is not None else (key, None) for key, value in optimizer.state[parameter].items())
        if parameter in optimizer.state
        else None
        for parameter in parameters
    )


def holds(contract: Contract, hyper: Callable[[str], Any], batch: dict[str, torch.Tensor]) -> bool:
    """Whether every hyper-parameter fact and every batch predicate gives what the capture saw."""
    return all(_same(hyper(guard.subject), guard.expect) for guard in contract.guards) and all(
        _same(predicate.ask(batch), predicate.expect) for predicate in contract.predicates
    )


def _same(now: Any, expect: Any) -> bool:
    return type(now) is type(expect) and bool(now == expect)


def batch_tensors(leaves: Iterable[Any]) -> dict[str, torch.Tensor]:
    """The batch's tensors by source name, as the capture numbers them."""
    return {f"batch:{index}": leaf for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
