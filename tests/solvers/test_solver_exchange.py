"""solvers.exchange: groups of like decisions that are taken back together, never for the worse."""

import time

import pytest
from generators import small, transformer

from solvers.check import replay
from solvers.course import weights_of
from solvers.decode import Tables
from solvers.emit import emit
from solvers.evict import State
from solvers.exchange import exchanged
from solvers.greedy import descend, evaluate, first_decisions
from solvers.improve import placed_us, refill
from solvers.problem import Choice, Op, Problem, Storage
from solvers.transfers import placed

LAYERS = 6


def layers(budget_bytes: int, again_us: int = 400) -> Problem:
    """Equal layers: from a narrow value a wide one of 100 bytes in `again_us`, which the next narrow value and the backward read. To write and to
    read a wide one delays compute by 100 us."""
    storages = [Storage("layers.0.narrow", 1)]
    ops = [Op("layers.0.begin", (Choice((), time_us=1),), (0,))]
    wide = []
    for k in range(LAYERS):
        storages += [Storage(f"layers.{k}.wide", 100), Storage(f"layers.{k + 1}.narrow", 1)]
        wide.append(len(storages) - 2)
        ops.append(Op(f"layers.{k}.up", (Choice((wide[k] - 1,), time_us=again_us),), (wide[k],)))
        ops.append(Op(f"layers.{k}.down", (Choice((wide[k],), time_us=300),), (wide[k] + 1,)))
    before = len(storages) - 1
    for k in reversed(range(LAYERS)):
        storages.append(Storage(f"layers.{k}.grad", 1, output=k == 0))
        ops.append(Op(f"layers.{k}.backward", (Choice((wide[k], before), time_us=300),), (len(storages) - 1,), phase="backward"))
        before = len(storages) - 1
    return Problem(tuple(ops), tuple(storages), budget_bytes, read_bytes_per_us=1.0, write_bytes_per_us=1.0, latency_us=0, interference=0.5)


def recomputed(problem: Problem) -> tuple[Tables, State]:
    """Every wide value made again for the backward."""
    tables = Tables(problem)
    decisions = first_decisions(tables)
    for op, info in enumerate(problem.ops):
        if info.phase == "backward":
            decisions.cut(info.choices[0].reads[0], op)
    return tables, evaluate(tables, decisions)


def test_recomputes_of_all_layers_become_spills() -> None:
    """Where a refill has no more bytes: what is taken back is evicted again, in the cheaper way."""
    tables, first = recomputed(layers(150))
    judge = placed_us(tables)
    state = refill(tables, first, 0.5, judge=judge)
    again = [op for op in range(len(tables.problem.ops)) if state.trace.subject.count(op) > 1]
    assert len(again) >= LAYERS - 2
    better = exchanged(tables, state, 0.5)
    assert better.profile.compute_us == sum(op.choices[0].time_us for op in tables.problem.ops)
    assert judge(better) <= judge(state) - (400 - 200) * len(again)  # a write and a read, wholly waited for
    assert better.profile.peak_bytes <= 150


def test_what_is_cheaper_to_make_again_stays_so() -> None:
    """Made again in 20 us, a wide value is not worth 100 us of transfers."""
    tables, state = recomputed(layers(230, again_us=20))
    better = exchanged(tables, state, 0.5)
    assert not better.trace.writes


def test_no_time_changes_nothing() -> None:
    tables, state = recomputed(layers(230))
    assert exchanged(tables, state, 0.5, time.monotonic() - 1) is state


def greedy(problem: Problem, share: float) -> tuple[Tables, State]:
    """The end of the greedy path at a budget between the least found and keep-all's."""
    path = list(descend(Tables(problem), weights_of(problem)[0]))
    low, high = min(s.profile.peak_bytes for s in path), path[0].profile.peak_bytes
    tables = Tables(problem.with_budget(int(low + share * (high - low))))
    return tables, next(state for state in path if state.profile.peak_bytes <= tables.problem.budget_bytes)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("problem", [*(small(seed) for seed in range(20)), transformer(3)], ids=lambda problem: str(len(problem.ops)))
def test_valid_never_slower_and_the_same_again(problem: Problem, share: float) -> None:
    """The checker replays what comes out, in exactly the time that was judged, within the budget."""
    tables, state = greedy(problem, share)
    judge, weight = placed_us(tables), weights_of(problem)[0]
    better = exchanged(tables, state, weight)
    assert judge(better) <= judge(state)
    clock, moves = placed(tables, better)
    report = replay(tables.problem, emit(tables, better.decisions, better.trace, moves))
    assert report.time_us == clock
    assert report.peak_bytes <= tables.problem.budget_bytes
    assert exchanged(tables, state, weight).decisions == better.decisions


def test_what_is_taken_back_is_not_evicted_again() -> None:
    """A hundred bytes too many: the slow way of the head frees three hundred, for fewer microseconds a byte than a recompute, but for more in all."""
    storages = [Storage("kept", 100, movable=False), Storage("other", 100, movable=False), Storage("loss", 1), Storage("grad", 1, output=True)]
    ops = [
        Op("kept", (Choice((), time_us=100),), (0,)),
        Op("other", (Choice((), time_us=500),), (1,)),
        Op("head", (Choice((1,), time_us=1000, workspace_bytes=300), Choice((1,), time_us=1150)), (2,)),
        Op("backward", (Choice((0, 1, 2), time_us=300),), (3,), phase="backward"),
    ]
    problem = Problem(tuple(ops), tuple(storages), 450)
    tables = Tables(problem)
    first = next(state for state in descend(tables, 0.5) if state.profile.peak_bytes <= 450)
    assert first.decisions.choice[2] == 1
    better = exchanged(tables, first, 0.5)
    assert better.decisions.choice[2] == 0
    assert better.profile.compute_us == 1900 + 100
