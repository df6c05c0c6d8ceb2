"""solvers.retrace: the trace of a schedule leads back to the schedule, and to the time that the replay says."""

from dataclasses import replace

import pytest
from generators import small, states_on_disk, transformer, with_room_for_all

from solvers.check import replay
from solvers.decode import READ, Tables
from solvers.emit import emit, moves_of, synchronous
from solvers.problem import Choice, Op, Problem, Storage
from solvers.retrace import retraced
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait
from solvers.transfers import Placement, placed


@pytest.mark.parametrize("batch", range(4))
def test_the_same_events_and_instances(batch: int) -> None:
    """As decoding left them, whatever the transfers were; and transfers placed anew take the same time."""
    problems = [small(90_000 + seed) for seed in range(batch, 80, 4)] + ([with_room_for_all(transformer(2, 32, 16))] if not batch else [])
    seen = 0
    for problem in problems:
        for tables, state in states_on_disk(problem):
            for moves in (synchronous(state.trace), placed(tables, state)[1]):
                schedule = emit(tables, state.decisions, state.trace, moves)
                found = retraced(tables, schedule)
                assert found is not None
                again, spans = found
                assert (again.trace.kind, again.trace.subject) == (state.trace.kind, state.trace.subject)
                assert again.profile.live_bytes.tolist() == state.profile.live_bytes.tolist()
                assert placed(tables, again)[0] == placed(tables, state)[0]
                seen += 1
                for i, birth in enumerate(again.trace.inst_birth):
                    assert spans.asked[i] <= max(0, birth)
                    assert spans.freed[i] > again.trace.inst_last[i] or again.trace.inst_last[i] == len(again.trace.kind)
    assert seen > 20


@pytest.mark.parametrize("seed", range(12))
def test_when_transfers_are_asked_for_and_done(seed: int) -> None:
    """`asked` and `freed` are where the walk put them."""
    for tables, state in states_on_disk(small(91_000 + seed)):
        walk = Placement(tables, state, 0.06).run()
        found = retraced(tables, emit(tables, state.decisions, state.trace, moves_of(walk.record)))
        assert found is not None
        again, spans = found
        reads = [i for i, birth in enumerate(again.trace.inst_birth) if birth >= 0 and again.trace.kind[birth] == READ]
        assert sorted(spans.asked[i] for i in reads) == sorted(event for event, what, _ in walk.record if what == 0)
        assert sorted(spans.freed[i] for i in again.trace.writes) == sorted(event for event, what, _ in walk.record if what == 2)


def written_twice() -> Problem:
    storages = (Storage("moment", 10, persistent=True), Storage("end", 10, output=True))
    ops = (Op("update", (Choice((), time_us=5),), (), (0,)), Op("again", (Choice((), time_us=5),), (1,), (0,)))
    return Problem(ops, storages, 100, read_bytes_per_us=1.0, write_bytes_per_us=1.0)


def test_what_no_trace_says_has_none() -> None:
    """A storage that is written and changed afterwards, and an op that runs in two ways."""
    problem = written_twice()
    steps = (Prefetch(0), Wait(0), Run(0), Offload(0), Wait(0), Run(1), Offload(0), Wait(0), Free(0))
    assert replay(problem, Schedule(steps)).time_us > 0
    assert retraced(Tables(problem), Schedule(steps)) is None
    ways = Op("make", (Choice((), time_us=5), Choice((), time_us=7)), (0,))
    twice = Problem((ways, Op("use", (Choice((0,), time_us=5),), (1,))), (Storage("x", 10), Storage("end", 10, output=True)), 100)
    two = Schedule((Run(0, 0), Free(0), Run(0, 1), Run(1), Free(0)))
    assert replay(twice, two).recomputes == 1
    assert retraced(Tables(twice), two) is None
    assert retraced(Tables(twice), replace(two, steps=(Run(0, 1), Run(1), Free(0)))) is not None
