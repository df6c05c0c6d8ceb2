"""Errors that say what to try next.

Every error that this package raises on purpose is a `MebpError`: a message (what happened, where) and a `fix` (what to try next).
"""

from __future__ import annotations

from typing import Any


class MebpError(Exception):
    """Base of all errors raised on purpose; `fix` says what to try next."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(f"{message}\n  try: {fix}" if fix else message)
        self.message = message
        self.fix = fix


class OptionError(MebpError, ValueError):
    """An unknown option, or a value that an option can't take."""


class BudgetError(OptionError):
    """A budget that is not a positive number of bytes."""


class CaptureError(MebpError):
    """The training step can't be captured; the message names the line of the user's code where one is known."""


class ClosureChanged(CaptureError):
    """Running the step changed Python state that the compiled step would not change (a scheduler, a counter, a random generator)."""


class DataDependentBranch(CaptureError):
    """The step branches in Python on the value of a tensor that is known only when it runs."""


class UndeclaredState(CaptureError):
    """A parameter or buffer turned up in the step that belongs to no module found in its closure or named in `state`."""


class Unsupported(CaptureError):
    """A construct that is known not to survive capture (a DDP wrapper, gradient checkpointing left on)."""


class GraphError(MebpError):
    """A graph that breaks a rule of `Graph.verify`: a bug in this package, or an edited file."""


class BudgetInfeasible(MebpError):
    """No schedule found fits the budget. `smallest_bytes` fits; nothing below `lower_bound_bytes` can.

    refused: (contract, graph) of the program, where a whole step was refused.
    """

    refused: Any = None

    def __init__(self, message: str, fix: str, smallest_bytes: int, lower_bound_bytes: int, binding_op: str) -> None:
        super().__init__(message, fix)
        self.smallest_bytes = smallest_bytes
        self.lower_bound_bytes = lower_bound_bytes
        self.binding_op = binding_op


class StepPoisoned(MebpError):
    """An earlier call failed in mid-step, so the model may be half updated."""


class LeanError(MebpError):
    """A saved step that can't run without the user's own objects, or not in this process or with this batch."""


class StoreError(MebpError):
    """A weight store is damaged, truncated, incomplete or does not match the model."""


class DiskError(MebpError):
    """The disk is full, failed, is not a disk (tmpfs), or can't be read or written."""


class OutOfMemory(MebpError, MemoryError):
    """The system gave no memory, although the plan is inside its budget."""


class MeasureError(MebpError):
    """Something could not be measured on this machine."""


class CacheError(MebpError):
    """The cache folder can't be read or written."""
