"""Simple schedules with one number that is tuned until the budget holds: what the solvers are compared with, beside baselines.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from solvers.baselines import border_of, cut, interior, layer_of
from solvers.decode import Tables
from solvers.evict import State
from solvers.greedy import descend
from solvers.improve import score

KNAPSACKS = 24  # limits tried
TRANSFER_WEIGHT = 0.3


def greedy(tables: Tables) -> State | None:
    """The first state of the greedy descent that fits the budget."""
    return next((state for state in descend(tables, TRANSFER_WEIGHT) if fits(tables, state)), None)


def per_layer_tuned(tables: Tables) -> State | None:
    """As `baselines.per_layer`, but only the first layers run again, as few as the budget allows: the interior of the last ones is kept."""
    problem, border = tables.problem, border_of(tables.problem)
    layers = list(dict.fromkeys(layer for op in problem.ops if (layer := layer_of(op.module))))
    place = {layer: k for k, layer in enumerate(layers)}
    made_in = {s: place.get(layer_of(op.module), -1) for op in problem.ops for s in op.creates}
    inside = interior(problem)

    def again(count: int) -> State:
        return cut(tables, {s: (border,) for s in inside if made_in[s] < count or problem.ops[tables.created_by[s]].optional}, stream=True)

    return _fastest(tables, (again(count) for count in range(len(layers) + 1)))


def knapsack(tables: Tables) -> State | None:
    """What the forward makes for the backward, kept or made again by a 0/1 knapsack: the most microseconds of single ops kept in a number of
    bytes, as PyTorch's `activation_memory_budget` chooses (torch/_functorch/_activation_checkpointing/knapsack.py; values count as if they
    did not depend on each other). It limits what is kept at the border of forward and backward and doesn't know the peak, so here many limits
    are tried."""
    problem, border = tables.problem, border_of(tables.problem)
    later = {s for op in problem.ops[border:] for choice in op.choices for s in choice.reads}
    items = [s for op in problem.ops[:border] if op.rerunnable and not op.writes for s in op.creates if s in later and s not in tables.written]
    optional = [s for op in problem.ops if op.optional for s in op.creates]
    whole = sum(tables.size[s] for s in items)

    def kept_in(limit: int) -> State:
        kept = _chosen([tables.problem.ops[tables.created_by[s]].choices[0].time_us for s in items], [tables.size[s] for s in items], limit)
        left = [s for k, s in enumerate(items) if k not in kept]
        inner = [s for s in interior(problem) if s not in later]  # what only second runs need is not kept either
        return cut(tables, dict.fromkeys((*left, *inner, *optional), (border,)), stream=True)

    return _fastest(tables, (kept_in(whole * k // KNAPSACKS) for k in range(KNAPSACKS + 1)))


TUNED: dict[str, Callable[[Tables], State | None]] = {"greedy": greedy, "per_layer_tuned": per_layer_tuned, "knapsack": knapsack}


def fits(tables: Tables, state: State) -> bool:
    return state.profile.peak_bytes <= tables.problem.budget_bytes


def _fastest(tables: Tables, states: Iterator[State]) -> State | None:
    """The fastest that fits the budget, its transfers mostly hidden."""
    return min((state for state in states if fits(tables, state)), key=lambda state: score(state, TRANSFER_WEIGHT), default=None)


def _chosen(values: list[int], sizes: list[int], limit: int) -> set[int]:
    """Indices of a best choice of items within the limit."""
    from ortools.algorithms.python import knapsack_solver

    solver = knapsack_solver.KnapsackSolver(knapsack_solver.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER, "kept")
    solver.init(values, [sizes], [limit])
    solver.set_time_limit(1.0)
    solver.solve()
    return {k for k in range(len(values)) if solver.best_solution_contains(k)}
