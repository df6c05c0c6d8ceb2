"""optimize(): the whole pipeline on one screen. Read this first.

    step_fn -> capture -> lower -> cost -> plan (problem, solve, check, place) -> codegen -> run
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree

from mebp_compile import codegen
from mebp_compile.capture import State, capture, find_state
from mebp_compile.config import Options, parse_budget
from mebp_compile.cost import measure_costs
from mebp_compile.errors import MebpError, OptionError, StepPoisoned
from mebp_compile.graph import Graph
from mebp_compile.lower import lower
from mebp_compile.lower.stream import stream_weights
from mebp_compile.plan import Plan, build_problem, make_plan
from mebp_compile.runtime.bind import Streamed, bind_weights
from mebp_compile.runtime.guards import signature
from mebp_compile.runtime.program import Program, load
from mebp_compile.runtime.setup import make_engine
from mebp_compile.runtime.weights import WeightStore


def optimize(
    step_fn: Callable[..., Any],
    budget: int | float | str,
    *,
    example: tuple[Any, ...] | None = None,
    state: Iterable[Any] | None = None,
    weights: str | WeightStore | None = None,
    offload: str | Path | None = None,
    numerics: str = "exact",
    grads: str = "keep",
    effort: str = "balanced",
    time_limit_s: float = 20.0,
    cache: bool = True,
) -> CompiledStep:
    """A step with the signature and the results of `step_fn` that never needs more memory than `budget`.

    `step_fn` does forward, backward and update in any order; its modules and optimizers are found in its closure or named in `state`. It is
    captured at the first call, or now if `example` gives a batch. `weights` names a scheme for the frozen weights, or is a WeightStore
    that has them; `offload` is a folder on disk for activations. Raises BudgetError, OptionError, CaptureError, BudgetInfeasible.
    """
    options = Options(parse_budget(budget), Path(offload) if offload is not None else None, numerics, grads, effort, time_limit_s, cache)
    if not callable(step_fn):
        raise OptionError(f"step_fn is a {type(step_fn).__name__}, not a callable", "pass the function that does forward, backward and update")
    found = find_state(step_fn, state)
    step = CompiledStep(step_fn, found, options, bind_weights(found, weights, options.offload_dir))
    if example is not None:
        step.prepare(*example)
    return step


class CompiledStep:
    """A training step inside a budget: call it as the original. One program is kept for each batch geometry and set of guards."""

    def __init__(self, step_fn: Callable[..., Any], state: State, options: Options, streamed: Streamed | None = None) -> None:
        self.step_fn, self.state, self.options, self.streamed = step_fn, state, options, streamed
        self.programs: dict[Any, list[Program]] = {}
        self.current: Program | None = None
        self.poisoned = ""
        self.ignored_gradients: frozenset[str] = frozenset()

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        if self.poisoned:
            raise StepPoisoned(f"an earlier call failed in mid-step ({self.poisoned}); the model may be half updated", "load a checkpoint, then optimize again")
        program = self.prepare(*batch, **kwargs)
        try:
            return program.run(pytree.tree_leaves((batch, kwargs)))
        except BaseException as error:
            self.poisoned = f"{type(error).__name__}: {error}"
            raise

    def prepare(self, *batch: Any, **kwargs: Any) -> Program:
        """The program for this batch: a known one whose guards hold, or a new one. Runs nothing."""
        leaves = pytree.tree_leaves((batch, kwargs))
        known = self.programs.get(signature(self.state, (batch, kwargs), self.ignored_gradients), [])
        self.current = next((program for program in known if program.applies(leaves)), None)
        if self.current is None:
            self.current = build(self.step_fn, self.state, self.options, batch, kwargs, self.streamed)
            self.ignored_gradients |= frozenset(self.current.traced.cleared)
            self.programs.setdefault(signature(self.state, (batch, kwargs), self.ignored_gradients), []).append(self.current)
        return self.current

    @property
    def program(self) -> Program:
        if self.current is None:
            raise MebpError("the step has not been captured yet", "call it once, or give optimize an example batch")
        return self.current

    @property
    def code(self) -> str:
        return self.program.code

    @property
    def graph(self) -> Graph:
        return self.program.graph

    @property
    def plan(self) -> Plan:
        return self.program.plan


def build(
    step_fn: Callable[..., Any], state: State, options: Options, batch: tuple[Any, ...], kwargs: dict[str, Any], streamed: Streamed | None = None
) -> Program:
    """Capture, lower, cost, plan, generate, load: one program for one batch geometry."""
    records = streamed.records if streamed else {}
    traced = capture(step_fn, state, batch, kwargs)
    graph = stream_weights(lower(traced), records)
    costs, graph = measure_costs(graph, options, records)
    problem = build_problem(graph, costs, options.budget_bytes, options.offload_dir is not None, options.grads)
    plan = make_plan(graph, problem, options.effort, options.time_limit_s)
    code = codegen.generate(graph, plan)
    function, _ = load(code)
    return Program(traced, graph, plan, code, make_engine(graph, plan, state, traced, options, streamed), function)
