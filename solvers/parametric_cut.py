"""Parametric cut: the least time of a set of needs when memory is short, as a Lagrangian bound.

Each need is met in one of several ways, which take time, keep bytes at one moment, or keep bytes at home. With a price for each byte, and a weight
for the disk's clock beside the compute clock, the least cost of all needs together is a minimum cut; Kelley's cutting planes find the prices at which
that cost less what the bytes may be is largest. It knows nothing of ops and storages: see `cut_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Way:
    """One way to meet a need: microseconds of compute and of the disk, delay of compute by the disk, bytes at the separator and at home."""

    compute_us: float = 0.0
    delay_us: float = 0.0
    disk_us: float = 0.0
    kept_bytes: int = 0
    home_bytes: int = 0

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


class _Table:
    """The ways of some needs, one row after the other, for whole-array arithmetic: a row's time, disk time, bytes kept and at home."""

    def __init__(self, needs: Sequence[tuple[Way, ...]]) -> None:
        import numpy as np

        rows = [(way.compute_us, way.delay_us, way.disk_us, way.kept_bytes, way.home_bytes) for ways in needs for way in ways]
        self.columns = np.array(rows, dtype=np.float64).reshape(-1, 5).T
        counts = np.array([len(ways) for ways in needs], dtype=np.int64)
        self.starts = np.cumsum(counts) - counts
        self.owner = np.repeat(np.arange(len(needs)), counts)

    def cheapest(self, prices: Prices) -> tuple[NDArray[Any], NDArray[Any]]:
        """For each need the price of its cheapest way, and that way's row (of equal ones the first). A way's price is (1 - mu) * (compute + delay)
        + mu * disk + lambda * kept + lambda_home * home: the step is at least as long as either stream."""
        import numpy as np

        compute, delay, disk, kept, home = self.columns
        price = (1 - prices.disk) * (compute + delay) + prices.disk * disk + prices.kept * kept + prices.home * home
        least = np.minimum.reduceat(price, self.starts)
        rows = np.where(price == least[self.owner], np.arange(len(price)), len(price))
        return least, np.minimum.reduceat(rows, self.starts)

    def total(self, rows: NDArray[Any]) -> Way:
        """Those rows together."""
        compute, delay, disk, kept, home = self.columns[:, rows].sum(axis=1).tolist()
        return Way(compute, delay, disk, int(kept), int(home))


class Network:
    """The needs, laid out once for all prices."""

    def __init__(self, needs: Needs) -> None:
        import numpy as np

        self.loose = _Table(needs.loose) if needs.loose else None
        self.tails, self.heads = (np.array([arc[k] for arc in needs.arcs], dtype=np.int32) for k in (0, 1))
        self.priced = np.array([bool(ways) for _, _, ways in needs.arcs], dtype=bool)
        self.arcs = _Table([ways for _, _, ways in needs.arcs if ways]) if self.priced.any() else None
        self.nodes = int(max(self.tails.max(), self.heads.max())) + 1 if needs.arcs else 0

    def meet(self, prices: Prices) -> tuple[float, Way]:
        """The least price of all needs, rounded down, and what attains it."""
        import numpy as np
        from ortools.graph.python import max_flow

        total, cost = NOTHING, 0.0
        if self.loose is not None:
            least, rows = self.loose.cheapest(prices)
            total, cost = self.loose.total(rows), float(least.sum())
        if not self.nodes:
            return cost, total
        capacity = np.full(len(self.tails), ENDLESS, dtype=np.int64)
        if self.arcs is not None:
            least, rows = self.arcs.cheapest(prices)
            capacity[self.priced] = np.minimum(ENDLESS, (SCALE * least).astype(np.int64))
        flow = max_flow.SimpleMaxFlow()
        flow.add_arcs_with_capacity(self.tails, self.heads, capacity)
        if flow.solve(0, 1) != flow.OPTIMAL:
            raise ArithmeticError("the maximum flow was not found")
        if self.arcs is not None:
            source_side = np.zeros(self.nodes, dtype=bool)
            source_side[np.array(flow.get_source_side_min_cut(), dtype=np.int64)] = True
            cut = (source_side[self.tails] & ~source_side[self.heads])[self.priced]
            total = total.plus(self.arcs.total(rows[cut]))
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


def least_us(network: Network, limits: Limits, most: float, planes: list[Way]) -> float:
    """The best bound of the step's time. most: microseconds a byte, far above any price that pays. planes: what calls with the same network and
    other limits have found; this one adds to them."""
    best = float(limits.time_us)
    for _ in range(ROUNDS):
        prices, top = _next_prices(limits, planes, most) if planes else (Prices(), math.inf)
        if top <= best * (1 + CLOSE):
            break
        cost, plane = network.meet(prices)
        value = (1 - prices.disk) * limits.time_us + cost - prices.kept * limits.kept_bytes - prices.home * limits.home_bytes
        best = max(best, value)
        planes.append(plane)
    return best
