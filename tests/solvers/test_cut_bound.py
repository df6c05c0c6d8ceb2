"""solvers.cut_bound: never above what a schedule takes."""

from dataclasses import replace

import pytest
from brute_force import optimum_us
from generators import Builder, layered, small, transformer

from solvers.bounds import roofline_us
from solvers.check import replay
from solvers.cut_bound import lower_bound_us
from solvers.problem import Choice, Problem
from solvers.solve import Infeasible, smallest, solve

TINY = replace(transformer(1, 16, 8), can_offload=False)
CHAINS = [replace(layered(seed, size), can_offload=False) for seed, size in ((2, 40), (1, 60), (5, 90))]
PROBLEMS = [*CHAINS, TINY, replace(CHAINS[1], can_offload=True, interference=0.5)]


@pytest.mark.parametrize("batch", range(4))
def test_bound_never_exceeds_the_optimum(batch: int) -> None:
    """On 240 random small problems no schedule is below the bound: neither solve's nor the optimum of exhaustive search."""
    tighter = 0
    for seed in range(batch, 240, 4):
        problem = small(seed)
        try:
            found = solve(problem, "fast").report.time_us
        except Infeasible:
            continue
        bound = lower_bound_us(problem)
        tighter += bound > roofline_us(problem)
        assert bound <= found, problem.name
        if bound > roofline_us(problem):
            assert optimum_us(problem, bound - 1) is None, problem.name
    assert tighter


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_bound_never_exceeds_a_checked_schedule(problem: Problem) -> None:
    """At every budget the bound is at least the roofline and at most the time of the schedule found; it falls as the budget grows."""
    least, fits = smallest(problem)[0], []
    for budget in (least, int(1.2 * least), 2 * least, 5 * least):
        tight = problem.with_budget(budget)
        solution = solve(tight, "fast")
        bound = lower_bound_us(tight)
        assert roofline_us(tight) <= bound <= replay(tight, solution.schedule).time_us
        fits.append(bound)
    assert fits[0] >= fits[-1]
    assert fits[0] > roofline_us(problem)


# --- what is in memory at the separator and at home ---


def test_what_only_one_way_of_the_separator_reads_may_be_kept_for_later() -> None:
    """A loss that reads either a dense weight or its packed form: with the dense one in memory for a later op, nothing is run again."""
    b = Builder()
    packed, dense = b.storage("packed", 10, persistent=True, movable=False), b.storage("dense", 100)
    hidden, loss, out = b.storage("hidden", 10), b.storage("loss", 10), b.storage("out", 10, output=True)
    b.op("dequantise", [packed], [dense], 50)
    b.op("layer", [dense], [hidden], 5)
    b.op("loss", [hidden, dense], [loss], 5)
    b.ops[-1] = replace(b.ops[-1], choices=(b.ops[-1].choices[0], Choice((hidden, packed), 0, 40)))
    b.op("use", [dense, loss], [out], 5, phase="backward")
    problem = b.problem(130, can_offload=False)
    assert lower_bound_us(problem) <= solve(problem, "fast").report.time_us == 65


def test_what_the_separator_reads_leaves_no_room() -> None:
    """A value that fits beside neither what the loss reads nor what it makes is made again, and the bound knows."""
    b = Builder()
    batch = b.storage("batch", 1, persistent=True, movable=False)
    hidden, logits, gradient = b.storage("hidden", 50), b.storage("logits", 100), b.storage("gradient", 100)
    b.op("layer", [batch], [hidden], 20)
    b.op("head", [hidden], [logits], 5)
    b.op("loss", [logits], [gradient], 5, phase="backward")
    b.op("back", [gradient, hidden], [b.storage("out", 1, output=True)], 10, phase="backward")
    problem = b.problem(211, can_offload=False)
    assert roofline_us(problem) == 40 < lower_bound_us(problem) <= optimum(problem) == 60


def test_homes_end_beside_the_outputs() -> None:
    """A persistent storage that fits beside what runs, but not beside the outputs, has its home on disk and is read, and the bound knows."""
    b = Builder()
    weight, value = b.storage("weight", 100, persistent=True), b.storage("value", 10)
    b.op("forward", [weight], [value], 10)
    b.op("loss", [value], [b.storage("loss", 1)], 10)
    b.op("back", [value, 2], [b.storage("out", 100, output=True)], 10, phase="backward")
    problem = b.problem(120, read_bytes_per_us=1.0, latency_us=0, interference=1.0)
    assert roofline_us(problem) < lower_bound_us(problem) <= solve(problem, "fast").report.time_us


def optimum(problem: Problem) -> int:
    """The least time of any schedule, by exhaustive search."""
    least = optimum_us(problem, 10**6)
    assert least is not None
    return least


def test_what_runs_at_any_time_needs_its_inputs() -> None:
    """An op of the backward that doesn't depend on the loss may run late, but then what it reads is kept or made again."""
    b = Builder()
    batch = b.storage("batch", 1, persistent=True, movable=False)
    hidden, logits, gradient, cube = (b.storage(name, size) for name, size in (("hidden", 50), ("logits", 100), ("gradient", 100), ("cube", 50)))
    b.op("layer", [batch], [hidden], 20)
    b.op("head", [hidden], [logits], 5)
    b.op("loss", [logits], [gradient], 5, phase="backward")
    b.op("cube", [hidden], [cube], 1, phase="backward")
    b.op("back", [gradient, cube], [b.storage("out", 1, output=True)], 9, phase="backward")
    problem = b.problem(211, can_offload=False)
    assert roofline_us(problem) == 40 < lower_bound_us(problem) <= optimum(problem)


def test_every_home_counts() -> None:
    """A persistent storage that neither the loss nor what follows it uses must be read too where it is not at home in memory."""
    b = Builder()
    weights = [b.storage(f"weight{k}", 100, persistent=True) for k in range(3)]
    outs = [b.storage(f"out{k}", 1, output=True) for k in range(3)]
    for k in range(3):
        b.op(f"use{k}", [weights[k]], [outs[k]], 10)
    b.op("loss", [outs[0]], [b.storage("loss", 1)], 10)
    problem = b.problem(150, read_bytes_per_us=1.0, latency_us=0, interference=1.0)
    assert roofline_us(problem) + 150 <= lower_bound_us(problem) <= solve(problem, "fast").report.time_us
