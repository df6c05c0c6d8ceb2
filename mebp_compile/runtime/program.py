"""A program: one generated step, loaded and ready to run on the live state."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture.contract import Contract
from mebp_compile.errors import CaptureError
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.guards import batch_tensors, holds

_numbers = itertools.count(1)


@dataclass
class Program:
    """One captured, planned and generated variant of the step."""

    contract: Contract
    graph: Graph
    plan: Plan
    code: str
    engine: Engine
    function: Callable[..., tuple[Any, ...]]

    def applies(self, leaves: list[Any]) -> bool:
        return holds(self.contract, self.engine.live.hyper, batch_tensors(leaves))

    def arrange(self) -> None:
        """Before a step, which then finds in memory and on disk what it expects there. A failure here changes no value."""
        self._clear_gradients()
        self.engine.arrange()

    def materialise(self) -> None:
        """Everything that lies on disk comes into memory, until the next `arrange`."""
        if self.engine.homes is not None:
            self.engine.homes.homes.materialise()

    @property
    def restorable(self) -> bool:
        """Whether a failed step leaves nothing changed: all that the program updates lies on disk, where the old generation is intact."""
        return self.engine.homes is not None and self.engine.homes.restorable and not self.engine.committed

    def run(self, leaves: list[Any]) -> Any:
        """One step, after `arrange`: run the function, bind what outlives it, give back what the user's step returns."""
        given = batch_tensors(leaves)
        names = [self.graph.storages[self.graph.storage_of(name)] for name in self.graph.inputs]
        batch = [given[storage.source] for storage in names if storage.role == "batch"]
        live = self.engine.live
        self._clear_gradients()
        made = self._made(batch)
        returned: dict[int, Any] = {}
        kept: set[str] = set()
        for (path, _), value in zip(self.graph.results, made, strict=True):
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
            self.engine.live.parameters[name].grad = None

    def _made(self, batch: list[torch.Tensor]) -> tuple[Any, ...]:
        """What the function returns; homes on disk change all together at its end, or not at all."""
        self.engine.begin()
        try:
            with torch.no_grad():
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
                self.engine.live.parameters[name].grad = None


def load(code: str) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """The `train_step` of a program text, registered with linecache so that tracebacks show its lines; and its file name."""
    filename = f"<mebp_compile step {next(_numbers)}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    try:
        exec(compile(code, filename, "exec"), scope)
        return scope["train_step"], filename
    except (SyntaxError, KeyError) as error:
        raise CaptureError(f"the program does not define a train_step: {error}", "start from the text of `step.code`") from error
