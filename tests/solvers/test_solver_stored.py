"""solvers: storages of which a copy is always on disk (packed weights)."""

from dataclasses import replace

import pytest

from solvers.check import ScheduleError, replay
from solvers.problem import Choice, Op, Problem, ProblemError, Storage
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait
from solvers.solve import solve


def two_uses(stored: bool, links: int = 0) -> Problem:
    """A weight of 60 bytes that the first and the last op use; the one between them needs 80 of the budget's 100. A read takes 60 us, a write 120.
    links: more ops at the start, for the global model."""
    storages = [Storage("w", 60, persistent=True, stored=stored), Storage("x", 10), Storage("wide", 80, movable=False), Storage("y", 10)]
    ops = [Op("f", (Choice((0,), time_us=100),), (1,)), Op("wide", (Choice((1,), time_us=500),), (2,)), Op("sum", (Choice((2,), time_us=100),), (3,))]
    ops.append(Op("b", (Choice((0, 3), time_us=100),), phase="backward"))
    for k in range(links):
        storages.append(Storage(f"link{k}", 1))
        ops.append(Op(f"link{k}", (Choice((), time_us=1),), (len(storages) - 1,)))
    problem = Problem(tuple(ops), tuple(storages), 100, read_bytes_per_us=1.0, write_bytes_per_us=0.5, latency_us=0)
    problem.validate()
    return problem


def test_it_may_leave_memory_and_come_back_by_one_read() -> None:
    """With its home in memory: nothing is written, and all is where it was at the end."""
    schedule = Schedule((Run(0), Free(0), Run(1), Free(1), Run(2), Free(2), Prefetch(0), Wait(0), Run(3), Free(3)), frozenset({0}))
    report = replay(two_uses(True), schedule)
    assert (report.time_us, report.read_bytes, report.written_bytes, report.away_bytes) == (860, 60, 0, 60)
    with pytest.raises(ScheduleError, match="prefetch-no-copy"):
        replay(two_uses(False), schedule)
    with pytest.raises(ScheduleError, match="offload-stored"):
        replay(two_uses(True), Schedule((Offload(0), Wait(0), *schedule.steps), frozenset({0})))


@pytest.mark.parametrize("links", [0, 60])
def test_solve_keeps_it_at_home_and_reads_it_once(links: int) -> None:
    """The optimum, by the exact model and by the global one; without the copy there is none so fast."""
    found = solve(two_uses(True, links), "balanced")
    assert found.report.time_us == 860 + links
    assert found.schedule.resident == {0}
    assert found.order_bound_us is not None
    assert found.bound_us <= found.order_bound_us <= 860 + links
    assert solve(two_uses(False, links), "balanced").report.time_us > 860 + links


def test_what_can_not_be_stored() -> None:
    problem = two_uses(True)
    written = Op("update", (Choice((3,)),), (), (0,))
    for wrong, message in (
        (replace(problem, ops=(*problem.ops, written)), "stored, but an op writes it"),
        (replace(problem, storages=(replace(problem.storages[0], movable=False), *problem.storages[1:])), "only persistent movable"),
        (replace(problem, storages=(*problem.storages[:3], Storage("y", 10, stored=True))), "only persistent movable"),
    ):
        with pytest.raises(ProblemError, match=message):
            wrong.validate()


def test_files_without_the_mark_and_problems_that_move_less() -> None:
    problem = two_uses(True)
    assert Problem.from_json(problem.to_json()) == problem
    assert Problem.from_json(problem.to_json().replace(',"stored":true', "").replace(',"stored":false', "")) == two_uses(False)
    fixed = problem.moving_only({1, 2, 3})
    fixed.validate()
    assert not fixed.storages[0].movable
    assert not fixed.storages[0].stored
    assert problem.moving_only({0}).storages[0] == problem.storages[0]
