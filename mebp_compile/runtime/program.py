"""A program: one generated step, loaded and ready to run on the live state, with the graph and the plan that it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mebp_compile.capture.contract import Contract
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.runner import Runner, load
from mebp_compile.runtime.setup import batch_sources, result_paths

__all__ = ["Program", "load"]


@dataclass
class Program(Runner):
    """One captured, planned and generated variant of the step."""

    contract: Contract
    graph: Graph
    plan: Plan
    code: str
    engine: Engine
    function: Callable[..., tuple[Any, ...]]

    def __post_init__(self) -> None:
        self.batch, self.results = batch_sources(self.graph), result_paths(self.graph)
