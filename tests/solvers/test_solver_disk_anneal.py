"""solvers.disk_anneal: what goes to disk and when, annealed; the C walk's time is the replay's."""


import pytest
from generators import small, states_on_disk, transformer, with_room_for_all

from solvers import disk_anneal
from solvers.check import replay
from solvers.decode import Tables
from solvers.disk_anneal import DiskAnnealing
from solvers.emit import emit
from solvers.greedy import evaluate, first_decisions
from solvers.library import load_library
from solvers.problem import Choice, Op, Problem, Storage
from solvers.transfers import placed

needs_library = pytest.mark.skipif(load_library("disk_anneal") is None, reason="disk_anneal.c is not built (no C compiler)")
CANDIDATES, ENOUGH_SECONDS, BATCHES = 1000, 60.0, 4


def replayed_us(tables: Tables, found: disk_anneal.Annealed) -> int:
    return replay(tables.problem, emit(tables, found.state.decisions, found.state.trace, found.moves)).time_us


@needs_library
@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_is_annealed_is_valid_and_as_fast_as_said(batch: int) -> None:
    """Within the budget, and in the time of the walk: for walks alone and for what annealing finds, which is never slower."""
    seen = 0
    for seed in range(batch, 120, BATCHES):
        for tables, state in states_on_disk(small(50_000 + seed)):
            annealing = DiskAnnealing(tables, state)
            if not annealing.possible():
                continue
            as_it_is = annealing.run(0.0)
            found = annealing.run(ENOUGH_SECONDS, seed, CANDIDATES)
            if as_it_is is None or found is None:
                continue
            assert replayed_us(tables, as_it_is) == as_it_is.time_us
            assert replayed_us(tables, found) == found.time_us <= as_it_is.time_us
            seen += 1
    assert seen > 15


@needs_library
def test_a_step_with_streamed_weights() -> None:
    problem = with_room_for_all(transformer(2, 32, 16))
    gained = 0
    for tables, state in states_on_disk(problem)[::8]:
        annealing = DiskAnnealing(tables, state)
        assert annealing.possible()
        found = annealing.run(ENOUGH_SECONDS, 0, CANDIDATES)
        assert found is not None
        assert replayed_us(tables, found) == found.time_us
        gained += found.time_us < placed(tables, state)[0]
    assert gained


def wasteful() -> Problem:
    """Two weights of 100 bytes, read first and last, and between them ten ops beside which one of the two fits."""
    storages = [Storage("u", 100, persistent=True), Storage("v", 100, persistent=True), *(Storage(f"x{k}", 1) for k in range(10))]
    storages.append(Storage("end", 1, output=True))
    ops = [Op("first", (Choice((0, 1), time_us=10),), (2,))]
    ops += [Op(f"op{k}", (Choice((k + 1,), time_us=10, workspace_bytes=90),), (k + 2,)) for k in range(1, 10)]
    ops.append(Op("last", (Choice((0, 1, 11), time_us=10),), (12,)))
    return Problem(tuple(ops), tuple(storages), 210, read_bytes_per_us=10.0, write_bytes_per_us=10.0, latency_us=0)


@needs_library
def test_half_of_what_was_sent_away_stays() -> None:
    """Both weights away cost two transfers that the last op waits for; one may stay, and the other comes back beside an op."""
    problem = wasteful()
    tables, decisions = Tables(problem), first_decisions(Tables(problem))
    for weight in (0, 1):
        decisions.away.add(weight)
        decisions.cut(weight, 10)
    state = evaluate(tables, decisions)
    assert state.profile.peak_bytes <= problem.budget_bytes
    found = DiskAnnealing(tables, state).run(ENOUGH_SECONDS, 0, CANDIDATES)
    assert found is not None
    report = replay(problem, emit(tables, found.state.decisions, found.state.trace, found.moves))
    assert report.time_us == found.time_us < placed(tables, state)[0]
    assert report.prefetches == 1


@needs_library
def test_the_same_seed_gives_the_same_plan() -> None:
    problem = with_room_for_all(transformer(2, 32, 16))
    tables, state = states_on_disk(problem)[-1]
    first, second = (DiskAnnealing(tables, state).run(ENOUGH_SECONDS, 7, CANDIDATES) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.time_us, first.moves, first.tried) == (second.time_us, second.moves, second.tried)
    assert first.state.decisions == second.state.decisions


@needs_library
def test_a_second_run_goes_on_from_the_first() -> None:
    problem = with_room_for_all(transformer(2, 32, 16))
    tables, state = states_on_disk(problem)[-1]
    annealing = DiskAnnealing(tables, state)
    times = [found.time_us for seed in range(4) if (found := annealing.run(ENOUGH_SECONDS, seed, CANDIDATES))]
    assert len(times) == 4
    assert times == sorted(times, reverse=True)


def test_nothing_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, state = states_on_disk(small(50_000))[0]
    monkeypatch.setattr(disk_anneal, "load_library", lambda name: None)
    assert not DiskAnnealing(tables, state).possible()
