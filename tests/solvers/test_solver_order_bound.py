"""solvers.order_bound: below everything that base order allows, and above what no order can know."""

import time

import pytest
from brute_force import optimum_us
from generators import layered, small, transformer

from solvers.baselines import keep_all
from solvers.bounds import roofline_us
from solvers.check import replay
from solvers.cut_bound import bound_and_moments, lower_bound_us
from solvers.order_bound import _bound_us, base_order_bound_us, needy
from solvers.order_program import Facts
from solvers.problem import Choice, Op, Problem, Storage
from solvers.solve import Infeasible, solve

BATCHES = 4


def bound_of(problem: Problem, *chosen: int) -> int:
    return base_order_bound_us(problem, chosen or bound_and_moments(problem)[1], time.monotonic() + 100.0)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_below_every_optimum_at_every_moment(batch: int) -> None:
    """160 small problems: each op as the moment, against exhaustive search and against overlapped transfers."""
    tight = 0
    for seed in range(batch, 160, BATCHES):
        problem = small(30_000 + seed)
        try:
            found = solve(problem, "balanced", time_limit_s=50.0)
        except Infeasible:
            continue
        optimum = optimum_us(problem, found.report.time_us)
        most = min(found.report.time_us, optimum or found.report.time_us)
        bound = bound_of(problem, *(z for z, op in enumerate(problem.ops) if not op.optional))
        assert bound <= most, problem.name
        assert found.order_bound_us is not None
        assert found.bound_us <= found.order_bound_us <= most
        tight += bound > roofline_us(problem)
    assert tight > 160 / BATCHES / 8


@pytest.mark.parametrize("batch", range(BATCHES))
def test_below_every_optimum_with_every_moment_at_once(batch: int) -> None:
    """As many phases as ops: in fractions, in whole numbers, and with large storages whole."""
    for seed in range(batch, 100, BATCHES):
        problem = small(40_000 + seed)
        try:
            found = solve(problem, "fast").report.time_us
        except Infeasible:
            continue
        most = min(found, optimum_us(problem, found) or found)
        moments = [z for z, op in enumerate(problem.ops) if not op.optional]
        bounds = [_bound_us(Facts(problem), moments, time.monotonic() + 100.0, *how) for how in ((), (1e-4, 0.3), (1e-4,))]
        assert bounds == sorted(bounds), problem.name  # each knows more than the one before it
        assert bounds[-1] <= most, problem.name


def test_the_disk_waits_for_what_it_moves() -> None:
    """A state of 100 bytes, for which two ops in a row leave no room, and an update of it: it is written before them and read after them, or read
    after them and then written. The second op's moment knows that it moves again after that op, and believes that it moves during the first."""
    storages = (Storage("state", 100, persistent=True), Storage("end", 1, output=True))
    ops = (
        Op("wide", (Choice((), workspace_bytes=199, time_us=100),), (1,)),
        Op("again", (Choice((1,), workspace_bytes=199, time_us=100),)),
        Op("update", (Choice((1,), time_us=1),), (), (0,)),
    )
    problem = Problem(ops, storages, 200, read_bytes_per_us=1.0, write_bytes_per_us=1.0, latency_us=0)
    assert solve(problem).report.time_us == 401
    assert 299 <= bound_of(problem, 1) <= 301
    assert 399 <= bound_of(problem, 0, 1) <= 401


STEPS = [
    pytest.param(layered(1, 40), id="40"),
    pytest.param(layered(2, 60), id="60"),
    pytest.param(transformer(1, 32, 16), id="transformer"),
    pytest.param(transformer(3, 32, 16), id="layers", marks=pytest.mark.slow),  # in whole numbers HiGHS takes all the time that it is given
]


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("problem", STEPS)
def test_below_what_is_found(problem: Problem, share: float) -> None:
    """Whole steps, with recomputes, transfers and homes on disk."""
    problem = problem.with_budget(int(share * replay(problem, keep_all(problem), False).peak_bytes))
    found = solve(problem, "fast")
    assert bound_of(problem) <= found.report.time_us


def test_an_order_says_more_than_none() -> None:
    """A value made before the moment from one input only, which is not needed by it: any order may make it later, base order must keep it or
    make it twice."""
    storages = (Storage("x", 10), Storage("side", 80), Storage("big", 80), Storage("y", 10), Storage("end", 10, output=True))
    ops = (
        Op("x", (Choice((), time_us=10),), (0,)),
        Op("side", (Choice((0,), time_us=50),), (1,)),
        Op("big", (Choice((0,), time_us=10),), (2,)),
        Op("y", (Choice((2,), time_us=10),), (3,)),
        Op("end", (Choice((1, 3), time_us=10),), (4,)),
    )
    problem = Problem(ops, storages, 120, can_offload=False)
    assert lower_bound_us(problem) == roofline_us(problem) == 90
    assert bound_of(problem, 2) == 139  # 30 of its 80 bytes may stay, so none; a microsecond is left for the solver's tolerance
    assert solve(problem).report.time_us == 140
    assert solve(problem, "proof").report.time_us == 90


def test_what_runs_again_for_one_moment_may_run_again_for_another() -> None:
    """A value that fits beside neither of two wide ops and is needed after both: one moment sees one recompute, both together see two. Nothing is
    known of the wide ops but that they need most."""
    storages = (Storage("x", 10), Storage("big", 90), Storage("y", 10), Storage("end", 10, output=True))
    ops = (
        Op("x", (Choice((), time_us=10),), (0,)),
        Op("big", (Choice((0,), time_us=50),), (1,)),
        Op("wide", (Choice((0,), workspace_bytes=110, time_us=10),)),
        Op("y", (Choice((0, 1), time_us=10),), (2,)),
        Op("wide again", (Choice((0, 2), workspace_bytes=100, time_us=10),)),
        Op("end", (Choice((1, 2), time_us=10),), (3,)),
    )
    problem = Problem(ops, storages, 120, can_offload=False)
    assert solve(problem).report.time_us == 200
    facts = Facts(problem)
    assert [_bound_us(facts, [z], time.monotonic() + 100.0) for z in (2, 4)] == [149, 149]
    assert bound_of(problem, 3) == 199
    assert set(needy(facts)[:2]) == {2, 4}


def test_what_is_read_from_disk_was_made_once() -> None:
    """A weight that is dequantised if somebody needs it: reading it from disk takes less, but something has to write it there first."""
    storages = (Storage("packed", 10, persistent=True, movable=False), Storage("dense", 80), Storage("y", 10), Storage("end", 10, output=True))
    ops = (
        Op("dequantise", (Choice((0,), time_us=50),), (1,), optional=True),
        Op("y", (Choice((1,), time_us=10),), (2,)),
        Op("end", (Choice((1, 2), time_us=10),), (3,)),
    )
    problem = Problem(ops, storages, 1000, read_bytes_per_us=1000.0, write_bytes_per_us=1000.0, latency_us=1)
    for moment in (1, 2):
        assert bound_of(problem, moment) == 69  # of 70
    assert solve(problem).report.time_us == 70


def test_no_time_and_no_ortools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roofline, then."""
    problem = layered(1, 40).with_budget(400)
    assert base_order_bound_us(problem, bound_and_moments(problem)[1], time.monotonic() - 1.0) == roofline_us(problem)
    monkeypatch.setitem(__import__("sys").modules, "ortools.math_opt.python", None)
    assert bound_of(problem, 5) == roofline_us(problem)
