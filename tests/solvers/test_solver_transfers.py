"""solvers.transfers: transfers beside the runs, timed as the replay times them."""

from dataclasses import replace

import pytest
from generators import layered, small, states_on_disk, transformer, with_room_for_all

from solvers import library, transfers
from solvers.check import replay
from solvers.decode import Tables
from solvers.emit import emit, moves_of, synchronous
from solvers.greedy import descend
from solvers.library import NATIVE_OPS, load_library
from solvers.problem import Choice, Op, Problem, Storage
from solvers.transfers import HORIZONS, NativePlacement, Placement, placed

needs_library = pytest.mark.skipif(load_library("transfers") is None, reason="transfers.c is not built (no C compiler)")
BATCHES = 4


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_walk_is_the_replay(batch: int) -> None:
    """Valid within the budget, and as long as the walk says, at every horizon."""
    seen = 0
    for seed in range(batch, 120, BATCHES):
        for tables, state in states_on_disk(small(50_000 + seed)):
            for horizon in HORIZONS:
                walk = Placement(tables, state, horizon).run()
                report = replay(tables.problem, emit(tables, state.decisions, state.trace, moves_of(walk.record)))
                assert report.time_us == walk.time_us
                seen += 1
    assert seen > 60


@needs_library
@pytest.mark.parametrize("interference", [0.0, 0.37])
def test_transfers_c_walks_alike(interference: float) -> None:
    """Microsecond for microsecond, transfer for transfer, and as far as the horizon matters."""
    seen = held_back = 0
    problems = [*(small(60_000 + seed) for seed in range(60)), with_room_for_all(transformer(2, 32, 16)), layered(1, 120)]
    for problem in problems:
        for tables, state in states_on_disk(replace(problem, interference=interference)):
            native = NativePlacement(tables, state)
            for horizon in HORIZONS:
                walk = Placement(tables, state, horizon).run()
                assert native.run(horizon) == walk
                seen, held_back = seen + 1, held_back + walk.held_back
    assert seen > 300
    assert 0 < held_back < seen


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same time and transfers."""
    tables, state = states_on_disk(with_room_for_all(transformer(2, 32, 16)))[-1]
    assert len(tables.problem.ops) >= NATIVE_OPS
    one = placed(tables, state)
    monkeypatch.setattr(library, "load_library", lambda name: None)
    monkeypatch.setattr(transfers, "NativePlacement", None)
    assert placed(tables, state) == one


def test_a_step_with_streamed_weights_overlaps() -> None:
    problem = with_room_for_all(transformer(2, 32, 16))
    for tables, state in states_on_disk(problem)[::8]:
        time_us, moves = placed(tables, state)
        assert replay(tables.problem, emit(tables, state.decisions, state.trace, moves)).time_us == time_us
        one_by_one = replay(tables.problem, emit(tables, state.decisions, state.trace, synchronous(state.trace)))
        assert time_us <= one_by_one.time_us


def streamed(budget_bytes: int) -> Problem:
    """Two weights of 100 bytes, on disk, read in 100 us each, for two ops of 100 us."""
    storages = (Storage("u", 100, persistent=True), Storage("v", 100, persistent=True), Storage("y", 10), Storage("end", 10, output=True))
    ops = (Op("first", (Choice((0,), time_us=100),), (2,)), Op("second", (Choice((1, 2), time_us=100),), (3,)))
    return Problem(ops, storages, budget_bytes, read_bytes_per_us=1.0, write_bytes_per_us=1.0, latency_us=0)


@pytest.mark.parametrize(("budget_bytes", "time_us"), [(130, 400), (230, 300)])
def test_a_read_begins_when_memory_allows(budget_bytes: int, time_us: int) -> None:
    """With room for both the second is read while the first is used."""
    tables = Tables(streamed(budget_bytes))
    state = next(state for state in descend(tables, 0.0) if state.decisions.away == {0, 1})
    assert placed(tables, state)[0] == time_us
