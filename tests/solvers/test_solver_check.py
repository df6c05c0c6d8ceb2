"""solvers.check: every rule, by 10,000 mutations of valid schedules, and against a second replay."""

import random
from functools import cache

import pytest
from generators import layered, small
from mutations import KINDS, Base, shuffled
from naive_replay import Broken, naive_replay

from solvers.check import ScheduleError, replay
from solvers.problem import Choice, Op, Problem, Storage
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait
from solvers.solve import Infeasible, smallest, solve

LEAST_PER_KIND = 200
MOST_PER_KIND = 600
SHUFFLED = 6000


@cache
def bases() -> tuple[Base, ...]:
    """Valid schedules with recompute, both directions of transfers, in-place writes and choices."""
    result = []
    problems = [small(seed) for seed in range(300)] + [layered(1, 16)]
    for problem in problems:
        try:
            result.append(Base(problem, solve(problem, "fast").schedule))
        except Infeasible:
            pass
        result.append(Base(problem, smallest(problem)[1]))
    return tuple(result)


@cache
def mutants_of(rule: str) -> tuple[tuple[Problem, Schedule], ...]:
    """Up to MOST_PER_KIND mutants, each breaking this rule."""
    every = [mutant for base in bases() for mutant in KINDS[rule](base)]
    return tuple(random.Random(rule).sample(every, min(len(every), MOST_PER_KIND)))


@pytest.mark.parametrize("rule", KINDS)
def test_named_mutations_are_rejected_under_their_name(rule: str) -> None:
    """Up to 600 mutants of each kind are rejected, each under the name of the rule it breaks."""
    assert len(mutants_of(rule)) >= (10 if rule == "rng-order" else LEAST_PER_KIND)
    for problem, schedule in mutants_of(rule):
        with pytest.raises(ScheduleError) as caught:
            replay(problem, schedule, enforce_budget=rule == "over-budget")
        assert caught.value.rule == rule, caught.value


def test_there_are_ten_thousand_named_mutations() -> None:
    """The kinds together make at least 10,000 mutants."""
    assert sum(len(mutants_of(rule)) for rule in KINDS) >= 10_000


def test_random_mutations_agree_with_the_naive_replay() -> None:
    """6,000 random edits: both replays accept or both reject, and agree on peak and time."""
    draw = random.Random(1)
    short = [base for base in bases() if len(base.steps) < 60]
    valid = 0
    for _ in range(SHUFFLED):
        problem, schedule = shuffled(draw.choice(short), draw)
        try:
            expected: tuple[int, int] | None = naive_replay(problem, schedule)
            valid += 1
        except Broken:
            expected = None
        try:
            report = replay(problem, schedule, enforce_budget=False)
            found: tuple[int, int] | None = (report.peak_bytes, report.time_us)
        except ScheduleError:
            found = None
        assert found == expected, (problem.name, schedule)
    assert 200 < valid < SHUFFLED - 200


def test_unmutated_schedules_agree_with_the_naive_replay() -> None:
    """Every base schedule is valid, and both replays give the same peak and time."""
    for base in bases():
        if len(base.steps) < 60:
            report = replay(base.problem, base.schedule, enforce_budget=False)
            assert naive_replay(base.problem, base.schedule) == (report.peak_bytes, report.time_us)


def tiny() -> Problem:
    """a -> x (100 bytes); b reads x -> out; the disk moves 10 bytes/us, latency 5."""
    ops = (Op("a", (Choice((), 7, 20),), (0,)), Op("b", (Choice((0,), 0, 30),), (1,)))
    return Problem(ops, (Storage("x", 100), Storage("out", 8, output=True)), 1000, 3, 10.0, 10.0, 5)


def test_report_counts_bytes_and_both_clocks() -> None:
    """Peak, timeline, stalls and moved bytes of a hand-computed schedule."""
    steps = (Run(0), Offload(0), Wait(0), Free(0), Prefetch(0), Wait(0), Run(1), Free(0))
    report = replay(tiny(), Schedule(steps))
    assert report.timeline == (110, 103, 103, 3, 103, 103, 111, 11)
    assert (report.peak_bytes, report.peak_step) == (111, 6)
    assert (report.time_us, report.stall_us) == (20 + 15 + 15 + 30, 30)
    assert (report.runs, report.recomputes, report.offloads, report.prefetches) == (2, 0, 1, 1)
    assert (report.written_bytes, report.read_bytes) == (100, 100)


def test_a_transfer_overlaps_compute() -> None:
    """A write that runs beside an op costs only what is left of it at the Wait."""
    problem = tiny()
    report = replay(problem, Schedule((Run(0), Offload(0), Run(1), Wait(0), Free(0))))
    assert (report.time_us, report.stall_us) == (50, 0)


def test_discarded_copies_count_only_during_their_run() -> None:
    """A rerun for one output of two counts the other's copy in its own step, and leaves the live one alone."""
    ops = (
        Op("pair", (Choice((), 0, 1),), (0, 1)),
        Op("bump", (Choice((), 0, 1),), (), (0,)),
        Op("use", (Choice((0, 1), 0, 1),), (2,)),
    )
    problem = Problem(ops, (Storage("x", 10), Storage("y", 20), Storage("out", 1, output=True)), 100)
    report = replay(problem, Schedule((Run(0), Free(1), Run(1), Run(0), Run(2), Free(0), Free(1))))
    assert report.timeline == (30, 10, 10, 40, 31, 21, 1)


def test_the_error_is_named_and_survives_pickling() -> None:
    """A ScheduleError carries rule, step and message through a process boundary."""
    import pickle

    with pytest.raises(ScheduleError) as caught:
        replay(tiny(), Schedule((Run(1),)))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.rule, copy.step, str(copy)) == ("not-live", 0, str(caught.value))
