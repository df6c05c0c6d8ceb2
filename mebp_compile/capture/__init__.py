"""Capture: one call of the user's training step as one fx graph, with what it relied on as guards.

`capture` runs the step's Python once over fake tensors (`trace`), on the modules and optimizers that it reaches (`find`), with
hyper-parameters kept live (`hyper`, `lost`), Python values guarded (`facts`), branches on the batch asked of the real batch (`predicates`),
and refuses what would be silently wrong (`unchanged`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mebp_compile import torch_private
from mebp_compile.capture.facts import read_facts, tensor_places
from mebp_compile.capture.find import State, find_state
from mebp_compile.capture.lost import lost_number, may_lose
from mebp_compile.capture.optimizers import drop_unused_state, initialise_optimizer, optimizer_state_of
from mebp_compile.capture.trace import Input, Traced, trace_step
from mebp_compile.capture.unchanged import python_state_kept, where
from mebp_compile.errors import CaptureError, DataDependentBranch, MebpError, UndeclaredState, Unsupported

__all__ = ["Input", "State", "Traced", "capture", "find_state", "initialise_optimizer", "read_facts", "tensor_places"]


def capture(step_fn: Callable[..., Any], state: State, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """The whole step as one graph over `state` and the batch. Raises a CaptureError that names the line and the fix."""
    _check_parameters(state)
    _check_reads(step_fn, state)
    had = optimizer_state_of(state)
    with _put_back_on_failure(state, had) as undo:
        traced = _trace(step_fn, state, batch, kwargs, undo=undo)
        if undo:
            _check_settled(traced, _trace(step_fn, state, batch, kwargs))
        _check_constants(traced)
        if may_lose(state):
            _check_hyper_parameters(traced, _trace(step_fn, state, batch, kwargs, salt="again"))
        drop_unused_state(state, traced, had)
    return traced


def _trace(
    step_fn: Callable[..., Any],
    state: State,
    batch: tuple[Any, ...],
    kwargs: dict[str, Any],
    salt: str = "",
    undo: list[Callable[[], None]] | None = None,
) -> Traced:
    """One trace, after which Python state is what it was; plain attributes that modules filled in may stay if `undo` takes what reverts
    them.
    """
    with python_state_kept(step_fn, state, settling=undo is not None) as settled:
        try:
            traced = trace_step(step_fn, state, batch, kwargs, salt)
        except MebpError:
            raise
        except torch_private.data_dependent() as error:
            raise DataDependentBranch(
                f"the step branches on the value of a tensor at {torch_private.raising_line(error)}",
                "compute with torch.where, or take the decision outside the step from what it returns",
            ) from error
        except Exception as error:
            raise CaptureError(
                f"{type(error).__name__} at {torch_private.raising_line(error)} while the step was traced: {str(error).strip()[:500]}",
                "run the step once uncompiled: if it works there, name its modules and optimizers in state=[...]",
            ) from error
        finally:
            if undo is not None:
                undo.append(lambda: [revert() for revert in settled])  # type: ignore[func-returns-value]
    if undo is not None and not settled:
        undo.clear()
    return traced


def _check_settled(first: Traced, second: Traced) -> None:
    line = lost_number(first, second)
    if line is not None:
        raise Unsupported(
            f"the first call of the step computes something else than the next ones, because a module keeps Python state ({line})",
            "run the step once uncompiled, then optimize it",
        )


def _check_hyper_parameters(first: Traced, second: Traced) -> None:
    line = lost_number(first, second)
    if line is not None:
        raise Unsupported(
            f"a hyper-parameter of param_groups turns into a fixed number at {line}, so that a later change of it would be lost",
            "compute with Python's own float arithmetic and `math` rather than numpy, take the first step "
            "uncompiled, or pass the number in the batch",
        )


@contextlib.contextmanager
def _put_back_on_failure(state: State, had: set[tuple[str, int]]) -> Iterator[list[Callable[[], None]]]:
    """Inside, optimizers have the state of their first step; it is taken away again, and what is in the list undone, where the capture
    fails.
    """
    undo: list[Callable[[], None]] = []
    try:
        for optimizer in state.optimizers.values():
            initialise_optimizer(optimizer)
        yield undo
    except BaseException:
        for root, optimizer in state.optimizers.items():
            for parameter in [parameter for parameter in optimizer.state if (root, id(parameter)) not in had]:
                del optimizer.state[parameter]
        for revert in undo:
            revert()
        raise


def _check_reads(step_fn: Callable[..., Any], state: State) -> None:
    """A scheduler asked for its learning rate inside the step would answer once and for all."""
    asked = {"get_last_lr", "_last_lr"} & state.reach.names
    if asked and any(hasattr(item, "get_last_lr") for item in state.others.values()):
        raise Unsupported(
            f"the step at {where(step_fn)} asks a scheduler for its learning rate ({asked.pop()}), which would be read only once",
            "read optimizer.param_groups[0]['lr'] in the step, or ask the scheduler outside it",
        )


def _check_parameters(state: State) -> None:
    """Every parameter of every optimizer must belong to a module that was found."""
    known = {id(parameter) for _, _, parameter in state.parameters()}
    for root, optimizer in state.optimizers.items():
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise UndeclaredState(
                        f"parameter {position} of {root}.param_groups[{index}], of shape {tuple(parameter.shape)}, belongs to "
                        "no module that the step reaches",
                        "name its module: optimize(step_fn, ..., state=[model, optimizer])",
                    )


def _check_constants(traced: Traced) -> None:
    """A real tensor that turned up in the trace is a constant; a parameter among them is state that nobody declared."""
    for node in traced.module.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(traced.module, str(node.target), None)
            if isinstance(tensor, torch.nn.Parameter) or (isinstance(tensor, torch.Tensor) and tensor.requires_grad):
                raise UndeclaredState(
                    f"a parameter of shape {tuple(tensor.shape)} is used at {torch_private.node_line(node)} but belongs "
                    "to no module that the step reaches",
                    "name its module: optimize(step_fn, ..., state=[model, optimizer])",
                )
