"""Simple schedules: what the solvers are compared with, and where they start."""

from __future__ import annotations

import re

from solvers.check import replay
from solvers.decode import Decisions, DecodeError, Tables
from solvers.emit import emit, synchronous
from solvers.evict import State
from solvers.greedy import descend, evaluate, first_decisions
from solvers.problem import Problem
from solvers.schedule import Schedule

_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks|block|layer)\.\d+)(?:\.|$)")


def layer_of(module: str) -> str:
    """The layer that a module path belongs to: 'model.layers.3.mlp' -> 'layers.3'; '' if there is none."""
    match = _LAYER.search(module)
    return match.group(1) if match else ""


def keep_all(problem: Problem) -> Schedule:
    """Every storage is live from its creation to its last need, persistent ones always; choice 0 everywhere."""
    tables = Tables(problem)
    return _schedule(tables, evaluate(tables, Decisions([0] * len(problem.ops))))


def per_layer(problem: Problem) -> Schedule:
    """Only what passes from layer to layer is kept from the forward; the interior of a layer is recomputed when its
    backward begins; frozen weights are read from disk where they are used, each op runs in its fastest way
    (memory-efficient backpropagation, arXiv 2510.03425). What can't be recomputed is kept."""
    layers = [layer_of(op.module) for op in problem.ops]
    kept: set[int] = set()
    created_in = {s: layers[k] for k, op in enumerate(problem.ops) for s in op.creates}
    for k, op in enumerate(problem.ops[: _border(problem)]):
        kept.update(s for choice in op.choices for s in choice.reads if created_in.get(s, "") != layers[k])
    inner = [s for s, layer in created_in.items() if layer and s not in kept]
    made_at_will = [s for op in problem.ops if op.optional for s in op.creates]
    return _cut_at_border(problem, [*inner, *made_at_will], stream=True)


def recompute_all(problem: Problem) -> Schedule:
    """Nothing made in the forward is kept for the backward, save what can't be recomputed."""
    return _cut_at_border(problem, [s for op in problem.ops for s in op.creates])


def greedy(problem: Problem, transfer_weight: float = 0.3) -> Schedule:
    """The first state of the greedy descent that fits the budget, or its smallest one, with synchronous transfers."""
    tables = Tables(problem)
    best = None
    for state in descend(tables, transfer_weight):
        if best is None or state.profile.peak_bytes < best.profile.peak_bytes:
            best = state
        if state.profile.peak_bytes <= problem.budget_bytes:
            break
    assert best is not None
    return _schedule(tables, best)


def _border(problem: Problem) -> int:
    """Index of the first backward op."""
    return next((k for k, op in enumerate(problem.ops) if op.phase == "backward"), len(problem.ops))


def _cut_at_border(problem: Problem, storages: list[int], stream: bool = False) -> Schedule:
    """Cut the storages where the backward begins, except those that turn out not to be recomputable. stream: what no op
    writes has its home on disk and is read at each of the two uses."""
    tables, border = Tables(problem), _border(problem)
    cut = dict.fromkeys(storages)
    choice, frozen = [0] * len(problem.ops), set[int]()
    if stream:
        choice = first_decisions(tables).choice
        frozen = {s for s, may in enumerate(tables.may_leave) if may and s not in tables.written}
    while True:
        decisions = Decisions(list(choice), {storage: [border] for storage in (*cut, *frozen)}, away=set(frozen))
        try:
            return _schedule(tables, evaluate(tables, decisions))
        except DecodeError as error:
            if error.storage not in cut:
                return keep_all(problem)
            del cut[error.storage]


def _schedule(tables: Tables, state: State) -> Schedule:
    """The synchronous schedule of a state, replayed."""
    schedule = emit(tables, state.decisions, state.trace, synchronous(state.trace))
    replay(tables.problem, schedule, enforce_budget=False)
    return schedule
