"""The matrix of laws 1 and 2: a family with an optimizer, trained under budgets from the smallest that works to keep-all, in its own child.

`run_row` is called in a child that has the malloc meter preloaded. It captures the step once, and for each budget makes a fresh training,
plans, and runs CALLS steps: plain ones, one under the storage meter and one under the malloc meter, each compared in raw bytes with
eager's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from law1 import assert_same, describe, raw, snapshot
from models import Recipe, Training

import solvers
from mebp_compile import codegen
from mebp_compile.capture import find_state, initialise_optimizer
from mebp_compile.compiler import CompiledStep, build
from mebp_compile.config import Options
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.graph import Graph
from mebp_compile.measure.child import run_child
from mebp_compile.measure.process import limit_data, malloc_trim, rss
from mebp_compile.planning import Plan, make_plan
from mebp_compile.runtime.metering import ProcessReading, kept_storage_bytes, meter_process, meter_storages
from solvers.baselines import keep_all

FRACTIONS = (0.0, 0.2, 0.55, 1.0)  # of the way from the smallest budget found to keep-all
OPTIMIZERS = ("adamw", "sgd-momentum", "adamw-foreach")
PLAIN, STORAGES, PROCESS = "plain", "storages", "process"
CALLS = (PLAIN, STORAGES, PLAIN, PROCESS)
LARGE = 1 << 50

# Large enough that kilobytes of bookkeeping do not decide, small enough for seconds on two cores.
RECIPES = {
    "qwen2": Recipe("qwen2", sequence=64, config=(("hidden_size", 128), ("intermediate_size", 256), ("vocab_size", 512)), lora="float32"),
    "llama": Recipe("llama", sequence=64, config=(("hidden_size", 128), ("intermediate_size", 256), ("vocab_size", 512))),
    "gemma3": Recipe("gemma3", sequence=64, config=(("hidden_size", 128), ("intermediate_size", 256), ("vocab_size", 512))),
    "gpt2": Recipe("gpt2", sequence=64, batch_size=8, mask=None, dropout=0.1),
    "vit": Recipe("vit", batch_size=32, dropout=0.1),
    "resnet": Recipe("resnet", batch_size=32),
}
LIMITED = (("hidden_size", 128), ("intermediate_size", 384), ("num_hidden_layers", 4))  # many activations, few weights


@dataclass(frozen=True)
class Cell:
    """What was promised and measured for one family, optimizer and budget. Bytes; predicted time in microseconds."""

    family: str
    optimizer: str
    budget_bytes: int
    tensor_bytes: int
    measured_tensor_bytes: int
    peak_bytes: int
    malloc_bytes: int
    anon_bytes: int
    arena_bytes: int
    recomputes: int
    offloads: int
    time_us: int


def row(family: str, optimizer: str, folder: Path, fractions: tuple[float, ...] = FRACTIONS) -> tuple[dict[str, Any], list[Cell]]:
    """Facts about the refusal below the smallest budget, and one Cell per fraction, smallest budget first."""
    request = {"family": family, "optimizer": optimizer, "folder": str(folder), "fractions": list(fractions)}
    answer = run_child("matrix", "run_row", request, preload_malloc=True)
    return answer["refusal"], [Cell(**cell) for cell in answer["cells"]]


def run_row(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: capture once, then every budget."""
    recipe = RECIPES[request["family"]].but(optimizer=request["optimizer"])
    folder = Path(request["folder"])
    shared = Shared(folder)
    problems = shared.problems(recipe)
    refusal = max((refusal_below(*pair) for pair in problems), key=lambda item: item["smallest_bytes"])
    smallest, largest = refusal["smallest_bytes"], max(keep_all_bytes(problem) for _, problem in problems)
    eager = eager_calls(recipe)
    budgets = [int(smallest + (largest - smallest) * fraction) for fraction in request["fractions"]]
    return {"refusal": refusal, "cells": [asdict(run_cell(recipe, shared, budget, eager)) for budget in budgets]}


class Shared:
    """Captures by guards' signature, shared by the trainings of one row, for only budgets differ between them; and the schedules of the
    budgets so far, which a larger budget may use too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captured: dict[str, Any] = {}
        self.hints: dict[str, list[Plan]] = {}

    def options(self, budget_bytes: int) -> Options:
        return Options(budget_bytes, self.folder, effort="fast", cache=False)

    def problems(self, recipe: Recipe) -> list[tuple[Graph, solvers.Problem]]:
        """Graph and problem of every program that a training needs: momentum buffers make the first step of SGD differ from the others."""
        training = recipe.build()
        step = PlannedAgain(self, training, LARGE)
        for call in range(2):
            step(*training.batch(call))
        self.hints.clear()
        return [(graph, nominal(plan.problem)) for _, graph, plan, _ in self.captured.values()]


class PlannedAgain(CompiledStep):
    """A compiled step that takes captures from `Shared` and plans them for its own budget."""

    def __init__(self, shared: Shared, training: Training, budget_bytes: int) -> None:
        super().__init__(training.step, find_state(training.step, None), shared.options(budget_bytes))
        self.shared = shared

    def _planned(self, batch: Any, kwargs: Any) -> Any:
        key = str(self._signature(batch, kwargs))
        if key not in self.shared.captured:
            self.shared.captured[key] = build(self.step_fn, self.state, self.shared.options(LARGE), (batch, kwargs), None, self.tell)
        contract, graph, loose, _ = self.shared.captured[key]
        for optimizer in self.state.optimizers.values():
            initialise_optimizer(optimizer)
        hints = self.shared.hints.setdefault(key, [])
        plan = make_plan(graph, nominal(loose.problem).with_budget(self.options.budget_bytes), self.options.effort, hints=tuple(hints))
        hints.append(plan)
        return contract, graph, plan, codegen.generate(graph, plan)


def nominal(problem: solvers.Problem) -> solvers.Problem:
    """The same problem with times that follow from sizes alone: what is chosen must not depend on how busy the machine was when it measured."""

    def timed(op: solvers.Op) -> solvers.Op:
        touched = sum(problem.storages[storage].size_bytes for storage in (*op.creates, *op.writes))
        choices = (replace(c, time_us=5 + (touched + sum(problem.storages[s].size_bytes for s in c.reads)) // 10_000) for c in op.choices)
        return replace(op, choices=tuple(choices))

    ops = tuple(timed(op) for op in problem.ops)
    return replace(problem, ops=ops, read_bytes_per_us=1000.0, write_bytes_per_us=500.0, latency_us=60)


def keep_all_bytes(problem: solvers.Problem) -> int:
    return solvers.replay(problem, keep_all(problem), enforce_budget=False).peak_bytes


def refusal_below(graph: Graph, problem: solvers.Problem) -> dict[str, Any]:
    """What the refusal of an impossible budget says, and whether the byte below the smallest budget that it names is refused too."""

    def refuse(budget_bytes: int) -> BudgetInfeasible | None:
        try:
            make_plan(graph, problem.with_budget(budget_bytes), "fast")
        except BudgetInfeasible as error:
            return error
        return None

    first = refuse(1)
    assert first is not None
    again = refuse(first.smallest_bytes - 1)
    return {
        "smallest_bytes": first.smallest_bytes,
        "lower_bound_bytes": first.lower_bound_bytes,
        "binding_op": first.binding_op,
        "message": str(first),
        "refused_below": again is not None,
        "ops": [op.name for op in graph.ops],
    }


def eager_calls(recipe: Recipe) -> list[tuple[Any, Any, bytes]]:
    """For each call of the user's own training: what it returned, the state after it, and the generator's state."""
    training = recipe.build()
    torch.manual_seed(7)
    result = []
    for call in range(len(CALLS)):
        returned = describe(training.step(*training.batch(call)))
        result.append((returned, snapshot(training), raw(torch.get_rng_state())))
        training.between(call)
    return result


def run_cell(recipe: Recipe, shared: Shared, budget_bytes: int, eager: list[Any]) -> Cell:
    """Train under one budget, comparing every call with eager and metering two of them."""
    training = recipe.build()
    step = PlannedAgain(shared, training, budget_bytes)
    readings: dict[str, Any] = {}
    torch.manual_seed(7)
    for call, kind in enumerate(CALLS):
        batch = training.batch(call)
        drawn = torch.get_rng_state()
        program = step.prepare(*batch)
        torch.set_rng_state(drawn)
        leaves = pytree.tree_leaves((batch, {}))
        if kind == PLAIN:
            returned = step(*batch)
        else:
            readings[kind] = (meter_storages if kind == STORAGES else meter_process)(program, leaves)
            returned = readings[kind].result
            readings[kind] = replace(readings[kind], result=None)
        step.materialise()
        where = f"{recipe.family} {recipe.optimizer} {budget_bytes} call {call}"
        assert_same(f"{where}: returned", eager[call][0], describe(returned))
        assert_same(where, eager[call][1], snapshot(training))
        assert raw(torch.get_rng_state()) == eager[call][2], f"{where}: the generator is in another state"
        del returned
        training.between(call)
    return cell_of(recipe, step.plan, readings[STORAGES].peak_bytes, readings[PROCESS])


def cell_of(recipe: Recipe, plan: Plan, tensor_bytes: int, process: ProcessReading) -> Cell:
    assert process.malloc_bytes is not None
    return Cell(
        recipe.family, recipe.optimizer, plan.problem.budget_bytes, plan.tensor_bytes, tensor_bytes, plan.peak_bytes,
        process.malloc_bytes, process.anon_bytes, plan.placement.arena_bytes, plan.report.recomputes, plan.report.offloads, plan.time_us,
    )  # fmt: skip


def limited_steps(request: dict[str, Any]) -> dict[str, str]:
    """In the child: what becomes of a compiled and of a plain step where the process may grow by the budget, a share of it and some
    slack."""
    recipe = Recipe("llama", optimizer="sgd", sequence=256, batch_size=8, config=LIMITED)
    training = recipe.build()
    shared = Shared(Path(request["folder"]))
    step = PlannedAgain(shared, training, LARGE)
    _, _, loose, _ = step._planned(training.batch(0), {})
    budget_bytes = int(solvers.smallest(nominal(loose.problem))[0] * 1.3)  # as the plan: not from times of a busy machine
    step = PlannedAgain(shared, training, budget_bytes)
    step(*training.batch(0))
    program = step.prepare(*training.batch(1))
    program.arrange()
    malloc_trim()
    kept_bytes = kept_storage_bytes(program, list(training.batch(1))) + program.engine.arena.nbytes
    room_bytes = int(budget_bytes * (1 + request["share"])) + int(request["slack"]) - kept_bytes
    with limit_data(rss().data_bytes + room_bytes):
        compiled = _outcome(lambda: step(*training.batch(1)))
    step.materialise()
    with limit_data(rss().data_bytes + room_bytes):
        plain = _outcome(lambda: training.step(*training.batch(2)))
    return {"compiled": compiled, "plain": plain, "budget": str(budget_bytes), "keep_all": str(loose.keep_all_bytes)}


def _outcome(call: Any) -> str:
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "completed"
