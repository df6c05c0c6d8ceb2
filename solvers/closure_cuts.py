"""Cuts for the global model at the border of forward and backward."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from solvers.linear import Expression, Variable, total

if TYPE_CHECKING:
    from solvers.milp import Residency


def add_closures(model: Residency) -> None:
    """Cuts: what is needed after the border and not kept across it comes from its group, whose inputs are kept or come from theirs.

    rho[g] <= sum r[g, q];  kept[i] + rho[maker(i)] + fetched[i] >= 1;  rho[g] <= kept[u] + rho[maker(u)] + fetched[u].
    They lift the relaxation: it can't run half of every group.
    """
    border = next((k for k, op in enumerate(model.problem.ops) if op.phase == "backward"), -1)
    ran: dict[int, Variable] = {}
    for root, runs in _runs_after(model, border).items():
        ran[root] = model.share()
        model.row(total(runs).add(ran[root], -1.0), 0.0)
    for s, item in model.blocks.items.items():
        kept = _across(model, s, border)
        if any(q > border and not ways for q, ways in item.needs.items()) and kept is not None:
            model.row(_came(model, s, border, kept, ran), 1.0)
    for root, rho in ran.items():
        for s in model.blocks.groups[root].inputs:
            kept = _across(model, s, border)
            if kept is not None:
                model.row(_came(model, s, border, kept, ran).add(rho, -1.0), 0.0)


def _runs_after(model: Residency, border: int) -> dict[int, list[Variable]]:
    """For the groups before the border: their runs after it."""
    runs: dict[int, list[Variable]] = {}
    for (root, q), variable in model.rerun.items():
        if root < border < q:
            runs.setdefault(root, []).append(variable)
    return runs


def _across(model: Residency, s: int, border: int) -> Variable | float | None:
    """The item is in memory at the border; None: it can't be, or must be."""
    points = model.points[s]
    k = bisect_left(points, border)
    if k == len(points):
        return model.home.get(s)
    if k == 0 and s not in model.home:
        return None
    kept = model.stay[s, points[k]]
    return None if isinstance(kept, float) or points[k] == border else kept


def _came(model: Residency, s: int, border: int, kept: Variable | float, ran: dict[int, Variable]) -> Expression:
    """How the item got past the border: kept, made again or read."""
    result = Expression().add(kept)
    if model.maker.get(s, -1) in ran:
        result.add(ran[model.maker[s]])
    fetches = [model.fetch[s, q] for q in model.points[s] if q > border and (s, q) in model.fetch]
    if s in model.spill and fetches:
        result.add(model.spill[s])
    else:
        result.add(total(fetches))
    return result
