"""Running a generated step: bind its arguments and results to the state, whichever kind of state that is."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture.contract import Contract
from mebp_compile.errors import CaptureError
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.guards import batch_tensors, holds
from mebp_compile.runtime.memory import memory_errors

_numbers = itertools.count(1)


class Runner:
    """A loaded step and its engine. `batch`: sources of the function's arguments; `results`: where each of its results belongs."""

    contract: Contract
    engine: Engine
    function: Callable[..., tuple[Any, ...]]
    batch: tuple[str, ...]
    results: tuple[str, ...]

    def applies(self, leaves: list[Any]) -> bool:
        return holds(self.contract, self.engine.live.hyper, batch_tensors(leaves))

    def arrange(self) -> None:
        """Before a step, which then finds in memory and on disk what it expects there. A failure here changes no value."""
        self._clear_gradients()
        with memory_errors("before the step"):
            self.engine.arrange()

    def materialise(self) -> None:
        """Everything that lies on disk comes into memory, until the next `arrange`."""
        if self.engine.homes is not None:
            self.engine.homes.homes.materialise()

    @property
    def restorable(self) -> bool:
        """Whether a failed step leaves nothing changed: all that the program updates lies on disk, where the old generation is intact."""
        return self.engine.restorable

    def run(self, leaves: list[Any]) -> Any:
        """One step, after `arrange`: run the function, bind what outlives it, give back what the user's step returns."""
        given = batch_tensors(leaves)
        live = self.engine.live
        self._clear_gradients()
        made = self._made([given[source] for source in self.batch])
        returned: dict[int, Any] = {}
        kept: set[str] = set()
        for path, value in zip(self.results, made, strict=True):
            if path.startswith("return:"):
                returned[int(path.split(":")[1])] = value
            else:
                live.put(path, value)
                kept.add(path)
        self._drop_gradients(kept)
        returned |= self.contract.return_constants
        returned |= {index: live.hyper(expression) for index, expression in self.contract.return_hypers.items()}
        flat = [returned[index] for index in range(self.contract.return_spec.num_leaves)]
        return pytree.tree_unflatten(flat, self.contract.return_spec)

    def _clear_gradients(self) -> None:
        """The step would drop these before anything else."""
        for name in self.contract.cleared:
            self.engine.live.forget(f"gradient:{name}")

    def _made(self, batch: list[torch.Tensor]) -> tuple[Any, ...]:
        """What the function returns; homes on disk change all together at its end, or not at all."""
        self.engine.begin()
        try:
            with memory_errors("in the step"), torch.no_grad():
                made = self.function(self.engine, *batch)
        except BaseException:
            self.engine.abandon()
            raise
        self.engine.commit()
        return made

    def _drop_gradients(self, kept: set[str]) -> None:
        """A parameter whose gradient the step took away (zero_grad at its end) has none afterwards."""
        for name in self.contract.gradients_given:
            if f"gradient:{name}" not in kept:
                self.engine.live.forget(f"gradient:{name}")


def load(code: str) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """The `train_step` of a program text, registered with linecache so that tracebacks show its lines; and its file name."""
    filename = f"<mebp_compile step {next(_numbers)}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    try:
        return step_of(compile(code, filename, "exec")), filename
    except SyntaxError as error:
        raise CaptureError(f"the program does not define a train_step: {error}", "start from the text of `step.code`") from error


def step_of(code: Any) -> Callable[..., tuple[Any, ...]]:
    """The `train_step` of a compiled program. Raises CaptureError where it defines none."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    if not callable(scope.get("train_step")):
        raise CaptureError("the program does not define a train_step", "start from the text of `step.code`")
    function: Callable[..., tuple[Any, ...]] = scope["train_step"]
    return function
