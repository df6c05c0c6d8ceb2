"""Parametric cut: the least time of a set of needs when memory is short, as a Lagrangian bound.

Each need is met in one of several ways, which take time, keep bytes at one moment, or keep bytes at home. With a price for each byte, and a weight
for the disk's clock beside the compute clock, the least cost of all needs together is a minimum cut; Kelley's cutting planes find the prices at which
that cost less what the bytes may be is largest. It knows nothing of ops and storages: see `cut_bound`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Way:
    """One way to meet a need: microseconds of compute and of the disk, delay of compute by the disk, bytes at the separator and at home."""

    compute_us: float = 0.0
    delay_us: float = 0.0
    disk_us: float = 0.0
    kept_bytes: int = 0
    home_bytes: int = 0

    def price(self, prices: Prices) -> float:
        """(1 - mu) * (compute + delay) + mu * disk + lambda * kept + lambda_home * home: the step is at least as long as either stream."""
        time_us = (1 - prices.disk) * (self.compute_us + self.delay_us) + prices.disk * self.disk_us
        return time_us + prices.kept * self.kept_bytes + prices.home * self.home_bytes

    def plus(self, other: Way) -> Way:
        return Way(
            self.compute_us + other.compute_us,
            self.delay_us + other.delay_us,
            self.disk_us + other.disk_us,
            self.kept_bytes + other.kept_bytes,
            self.home_bytes + other.home_bytes,
        )


@dataclass(frozen=True, slots=True)
class Prices:
    """Multipliers: of a byte in memory at the separator, of a byte at home, and the weight of the disk's time."""

    kept: float = 0.0
    home: float = 0.0
    disk: float = 0.0


NOTHING = Way()
SCALE = 1000  # capacities are integers: rounding down keeps the bound a bound
ENDLESS = 1 << 50
ROUNDS = 40  # evaluations of the dual for each set of needs
CLOSE = 1e-5


@dataclass(slots=True)
class Needs:
    """What follows from one separator. arcs: (tail, head, ways; the cheapest is the capacity, none: endless). Node 0 is the source, 1 the
    sink. choices: (penalty, bytes free at the separator) for each of its ways that fits. loose: needs met on their own."""

    arcs: list[tuple[int, int, tuple[Way, ...]]] = field(default_factory=list)
    loose: list[tuple[Way, ...]] = field(default_factory=list)
    choices: list[tuple[int, int]] = field(default_factory=list)
    nodes: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def node(self, kind: str, a: int, b: int = 0) -> tuple[int, bool]:
        """The number of a node, and whether it is new."""
        key = (kind, a, b)
        fresh = key not in self.nodes
        return self.nodes.setdefault(key, len(self.nodes) + 2), fresh


@dataclass(frozen=True, slots=True)
class Limits:
    """time_us: what the step takes without the needs. kept_bytes, home_bytes: room for what they keep at the moment, and at home."""

    time_us: int
    kept_bytes: int
    home_bytes: int


def _cheapest(ways: tuple[Way, ...], prices: Prices) -> Way:
    return min(ways, key=lambda way: way.price(prices))


def _meet(needs: Needs, prices: Prices) -> tuple[float, Way]:
    """The least price of all needs, rounded down, and what attains it."""
    import numpy as np
    from ortools.graph.python import max_flow

    total, cost = NOTHING, 0.0
    for ways in needs.loose:
        way = _cheapest(ways, prices)
        total, cost = total.plus(way), cost + way.price(prices)
    if not needs.arcs:
        return cost, total
    best = [_cheapest(ways, prices) if ways else None for _, _, ways in needs.arcs]
    capacity = [ENDLESS if way is None else min(ENDLESS, int(SCALE * way.price(prices))) for way in best]
    tails, heads = (np.array([arc[k] for arc in needs.arcs], dtype=np.int32) for k in (0, 1))
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(tails, heads, np.array(capacity, dtype=np.int64))
    if flow.solve(0, 1) != flow.OPTIMAL:
        raise ArithmeticError("the maximum flow was not found")
    side = set(flow.get_source_side_min_cut())
    for (tail, head, _), taken in zip(needs.arcs, best, strict=True):
        if taken is not None and tail in side and head not in side:
            total = total.plus(taken)
    return cost + flow.optimal_flow() / SCALE, total


def _next_prices(limits: Limits, planes: list[Way], most: float) -> tuple[Prices, float]:
    """Where the planes seen so far allow the highest bound (Kelley's cutting planes)."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    unit = 1e6  # bytes
    kept, home = (model.add_variable(lb=0.0, ub=most * unit) for _ in range(2))
    disk = model.add_variable(lb=0.0, ub=0.95)
    top = model.add_variable(ub=1e15)
    for way in planes:
        time_us = limits.time_us + way.compute_us + way.delay_us
        slope = kept * ((way.kept_bytes - limits.kept_bytes) / unit) + home * ((way.home_bytes - limits.home_bytes) / unit)
        model.add_linear_constraint(top <= time_us + slope + disk * (way.disk_us - time_us))
    model.maximize(top)
    result = mathopt.solve(model, mathopt.SolverType.HIGHS)
    if not result.has_primal_feasible_solution():
        return Prices(), -math.inf
    x = result.variable_values()
    return Prices(max(0.0, x[kept]) / unit, max(0.0, x[home]) / unit, min(1.0, max(0.0, x[disk]))), float(x[top])


def least_us(needs: Needs, limits: Limits, most: float, planes: list[Way]) -> float:
    """The best bound of the step's time. most: microseconds a byte, far above any price that pays. planes: what calls with the same needs and
    other limits have found; this one adds to them."""
    best = float(limits.time_us)
    for _ in range(ROUNDS):
        prices, top = _next_prices(limits, planes, most) if planes else (Prices(), math.inf)
        if top <= best * (1 + CLOSE):
            break
        cost, plane = _meet(needs, prices)
        value = (1 - prices.disk) * limits.time_us + cost - prices.kept * limits.kept_bytes - prices.home * limits.home_bytes
        best = max(best, value)
        planes.append(plane)
    return best
