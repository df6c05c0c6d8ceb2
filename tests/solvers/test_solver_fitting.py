"""solvers.fitting: transfers that keep clear of what lies in the arena, in Python and in C, and the schedules made of them."""

from dataclasses import replace

import pytest
from generators import layered, small, states_on_disk, transformer, with_room_for_all

from solvers import fitting as module
from solvers.arena import Arena
from solvers.arrange import arranged
from solvers.check import replay
from solvers.decode import Tables
from solvers.emit import emit, moves_of
from solvers.evict import State
from solvers.fitting import NEAR, fit_arena
from solvers.library import load_library
from solvers.offsets import check_offsets, lifespans, max_load_bytes, place
from solvers.problem import Problem
from solvers.retrace import retraced
from solvers.schedule import Run, Schedule
from solvers.transfers import HORIZONS, ArenaPlacement, NativePlacement, Placement

needs_library = pytest.mark.skipif(load_library("transfers") is None, reason="no C compiler")


def arena_of(tables: Tables, state: State, margin: float) -> tuple[State, Arena]:
    """The state, read off its schedule, and its shortest lives in so much more than they need."""
    schedule = emit(tables, state.decisions, state.trace, moves_of(Placement(tables, state, 1.0).run().record))
    found = retraced(tables, schedule)
    assert found is not None
    lives = module._lives(tables, *found)
    placed = arranged(lives.needed(), 0, 1 << 32, 0)
    return found[0], Arena(lives.begin.copy(), lives.end.copy(), placed.offsets, lives.size, int(placed.arena * margin) // 64 * 64)


def assert_apart(arena: Arena) -> None:
    """No two share a byte in an event, and none is above the height."""
    high = arena.low + arena.size
    assert high.max(initial=0) <= arena.height
    for k in range(len(arena.low)):
        together = (arena.begin < arena.end[k]) & (arena.end > arena.begin[k]) & (arena.low < high[k]) & (high > arena.low[k])
        assert together.sum() == (arena.size[k] > 0 and arena.begin[k] < arena.end[k])


@needs_library
@pytest.mark.parametrize("margin", [1.0, 1.2])
def test_c_walks_alike_and_keeps_everything_apart(margin: float) -> None:
    """Microsecond for microsecond and byte for byte; as the replay says; and never faster than without an arena at the same horizon."""
    seen = slower = 0
    problems = [*(small(70_000 + seed) for seed in range(40)), with_room_for_all(transformer(2, 32, 16)), layered(1, 120)]
    for problem in problems:
        for tables, decoded in states_on_disk(replace(problem, interference=0.2)):
            state, whole = arena_of(tables, decoded, margin)
            native = NativePlacement(tables, state)
            for horizon in HORIZONS[::2]:
                one, other = (replace(whole, begin=whole.begin.copy(), end=whole.end.copy(), low=whole.low.copy()) for _ in range(2))
                walk = ArenaPlacement(tables, state, horizon, one).run()
                assert native.run(horizon, other) == walk
                for column in ("begin", "end", "low"):
                    assert getattr(one, column).tolist() == getattr(other, column).tolist()
                assert_apart(one)
                assert replay(tables.problem, emit(tables, state.decisions, state.trace, moves_of(walk.record))).time_us == walk.time_us
                seen, slower = seen + 1, slower + (walk.time_us > native.run(horizon).time_us)
    assert seen > 150
    assert slower


def crowded() -> tuple[Problem, Schedule]:
    """A step that streams its weights, and fills the memory beside what it needs with those to come."""
    tables, state = max(states_on_disk(with_room_for_all(transformer(3, 48, 24))), key=lambda pair: pair[1].profile.transfer_us)
    problem = tables.problem.with_budget(int(1.3 * state.profile.peak_bytes))
    return problem, emit(tables, state.decisions, state.trace, moves_of(Placement(Tables(problem), state, 1.0).run().record))


@needs_library
def test_a_schedule_that_does_not_pack_is_made_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an arena by first-fit far above the most bytes at once: the fitted one is valid, runs the same, and lies in at most 1 % more than its own
    most bytes at once; where only the given one's count, it is faster, and here its own are fewer."""
    problem, schedule = crowded()
    most_bytes = max_load_bytes(lifespans(problem, schedule))
    monkeypatch.setattr(module, "place", lambda items, seed, enough: place(items, work=0))
    assert place(lifespans(problem, schedule), work=0).arena_bytes > (1 + NEAR) * most_bytes
    fitted = fit_arena(problem, schedule)
    assert fitted.schedule != schedule
    assert replay(problem, fitted.schedule).time_us == fitted.time_us
    assert [step for step in fitted.schedule.steps if isinstance(step, Run)] == [step for step in schedule.steps if isinstance(step, Run)]
    assert fitted.schedule.resident == schedule.resident
    items = lifespans(problem, fitted.schedule)
    check_offsets(items, fitted.placement)
    assert fitted.placement.lower_bound_bytes == max_load_bytes(items) <= fitted.placement.arena_bytes <= (1 + NEAR) * most_bytes
    assert fitted.placement.arena_bytes <= (1 + NEAR) * fitted.placement.lower_bound_bytes
    assert fit_arena(problem, schedule) == fitted
    faster = fit_arena(problem, schedule, own=False)
    assert replay(problem, faster.schedule).time_us == faster.time_us < fitted.time_us
    assert (1 + NEAR) * faster.placement.lower_bound_bytes < faster.placement.arena_bytes <= (1 + NEAR) * most_bytes


def test_a_schedule_that_packs_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, schedule = crowded()
    found = place(lifespans(problem, schedule), work=0)
    monkeypatch.setattr(module, "_others", None)
    monkeypatch.setattr(module, "place", lambda items, seed, enough: replace(found, arena_bytes=enough))
    fitted = fit_arena(problem, schedule)
    assert fitted.schedule is schedule
    assert fitted.time_us == replay(problem, schedule).time_us


def test_without_the_library_the_given_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, schedule = crowded()
    for name in ("solvers.eject.load_library", "solvers.pack.load_library"):
        monkeypatch.setattr(name, lambda name: None)
    monkeypatch.setattr(module, "place", lambda items, seed, enough: place(items, work=0))
    assert fit_arena(problem, schedule).schedule is schedule
