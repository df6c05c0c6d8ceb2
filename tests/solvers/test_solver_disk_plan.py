"""solvers.disk_plan: what stays and what goes to disk, by a linear program over phases with both clocks."""

import itertools
import time

import pytest
from generators import small, transformer

from solvers.baselines import keep_all
from solvers.check import replay
from solvers.decode import Tables
from solvers.disk_plan import DiskPlan, plans
from solvers.emit import emit
from solvers.evict import State
from solvers.gaps import movable_gaps
from solvers.greedy import descend, evaluate, first_decisions
from solvers.problem import Choice, Op, Problem, Storage
from solvers.transfers import placed


def soon() -> float:
    return time.monotonic() + 20.0


def updates(count: int, budget_bytes: int) -> Problem:
    """`count` weights of 100 bytes that the forward reads and the backward, from the last to the first, reads and updates; a transfer takes as
    long as an op."""
    storages = [Storage(f"w{k}", 100, persistent=True) for k in range(count)]
    storages += [Storage(f"x{k}", 1) for k in range(count)] + [Storage(f"g{k}", 1) for k in range(count)]
    x, g = (lambda k: count + k), (lambda k: 2 * count + k)
    ops = [Op(f"f{k}", (Choice((k, *((x(k - 1),) if k else ())), time_us=100),), (x(k),)) for k in range(count)]
    for k in reversed(range(count)):
        ops.append(Op(f"b{k}", (Choice((k, x(k)), time_us=100),), (g(k),), phase="backward"))
        ops.append(Op(f"u{k}", (Choice((g(k),), time_us=1),), (), (k,), phase="update"))
    return Problem(tuple(ops), tuple(storages), budget_bytes, read_bytes_per_us=1.0, write_bytes_per_us=1.0, latency_us=0)


def planned(problem: Problem, phases: int) -> State:
    """The best plan that fits, from a state that keeps all."""
    tables = Tables(problem)
    found = [evaluate(tables, d) for d in plans(tables, evaluate(tables, first_decisions(tables)), phases, soon())]
    return min((state for state in found if state.profile.peak_bytes <= problem.budget_bytes), key=lambda state: placed(tables, state)[0])


def test_what_fits_stays() -> None:
    state = planned(updates(6, 1000), 8)
    assert not state.decisions.away
    assert not state.decisions.cuts
    assert not state.profile.transfer_us


def test_the_last_weights_of_the_forward_stay_for_the_backward() -> None:
    """Twelve weights, room for six: no more goes to disk than must, and what the backward needs last."""
    problem = updates(12, 640)
    state, tables = planned(problem, 24), Tables(problem)
    assert 6 * 200 <= state.profile.transfer_us <= 9 * 300
    assert replay(problem, emit(tables, state.decisions, state.trace, placed(tables, state)[1])).time_us == placed(tables, state)[0]
    greedy = [s for s in descend(tables, 0.3) if s.profile.peak_bytes <= problem.budget_bytes]
    assert placed(tables, state)[0] <= min(placed(tables, s)[0] for s in greedy[:1])
    last = {gap.storage for gaps in movable_gaps(tables, state, 1).values() for gap in gaps if gap.storage in (10, 11)}
    assert last == {10, 11}
    assert not last & set(state.decisions.cuts)


@pytest.mark.parametrize("seed", range(5))
def test_plans_decode(seed: int) -> None:
    """Whatever the state, its runs stay: a plan is a state that can be decoded, with the same compute."""
    for number in range(seed, 60, 5):
        tables = Tables(small(60_000 + number))
        for state in list(descend(tables, 0.3))[::3]:
            planner = DiskPlan(Tables(tables.problem.with_budget(state.profile.peak_bytes)), state, 4)
            for gaps in planner.gaps.values():
                assert all(gap.b == following.a for gap, following in itertools.pairwise(gaps))
            for decisions in plans(planner.tables, state, 4, soon()):
                assert evaluate(tables, decisions).profile.compute_us == state.profile.compute_us


def test_a_step_with_streamed_weights() -> None:
    problem = transformer(2, 32, 16)
    problem = problem.with_budget(int(0.6 * replay(problem, keep_all(problem), False).peak_bytes))
    tables = Tables(problem)
    state = next(s for s in descend(tables, 0.3) if s.profile.peak_bytes <= problem.budget_bytes)
    found = [evaluate(tables, decisions) for decisions in plans(tables, state, 16, soon())]
    assert all(s.profile.compute_us == state.profile.compute_us for s in found)


def test_no_time() -> None:
    tables = Tables(updates(6, 400))
    assert not list(plans(tables, evaluate(tables, first_decisions(tables)), 8, time.monotonic() - 1.0))


@pytest.mark.parametrize("phases", [1, 2, 4, 24])
def test_what_has_to_stay_says_where_no_plan_fits(phases: int) -> None:
    """Below it the program has no solution; with enough room it has one. In one phase everything that is used twice stays."""
    kept = 0
    for budget in (90, 250, 640, 1300, 2600):
        problem = updates(12, budget)
        tables = Tables(problem)
        plan = DiskPlan(tables, evaluate(tables, first_decisions(tables)), phases)
        plan.build()
        if plan.least_bytes() > budget:
            kept += 1
            assert plan.solve(1.0, 20.0) is None
        elif budget >= 1300:
            assert plan.solve(1.0, 20.0) is not None
    assert kept >= (3 if phases == 1 else 1)
