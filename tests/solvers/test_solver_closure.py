"""solvers.closure: closure.c finds what `Closures` finds, and greedy paths are the same with both."""

import random

import numpy as np
import pytest
from generators import layered, small, transformer

from solvers import closure, evict, library
from solvers.closure import Closures, NativeClosures, Question, Rates
from solvers.decode import Tables
from solvers.evict import CLOSURE_LIMITS, Round
from solvers.greedy import descend
from solvers.library import NATIVE_OPS, load_library
from solvers.problem import Problem

built = load_library("closure") is not None and load_library("decode") is not None
needs_library = pytest.mark.skipif(not built, reason="closure.c is not built (no C compiler)")
PRICES = (0.0, 1e-3, 1.0, float("inf"))


def compare(problem: Problem, seed: int) -> tuple[int, int]:
    """How many closures were found, and how many not, along a greedy path, after some evictions as after none."""
    tables, draw, counts = Tables(problem), random.Random(seed), [0, 0]
    for number, state in enumerate(descend(tables, 0.3)):
        if number % 4 or not state.profile.live_bytes.size:
            continue
        rates = Rates(0.3, draw.choice([0, 20]), lost={draw.randrange(len(tables.size))})
        round_ = Round(tables, state, 0, rates)
        kinds = [made(tables, state.trace, round_.decisions, rates) for made in (Closures, NativeClosures)]
        for _ in range(6):
            event = draw.randrange(state.profile.live_bytes.size)
            round_.look(event)
            for each in kinds:
                each.present[:] = round_.closures.present
            inside = np.flatnonzero((round_.start < event) & (round_.end > event)).tolist()
            for segment in draw.sample(inside, min(12, len(inside))):
                use, price, limit = round_.group_of(int(round_.end[segment])), draw.choice(PRICES), draw.choice((2, *CLOSURE_LIMITS))
                one, other = (each.find(Question(int(round_.storage[segment]), use, price, limit)) for each in kinds)
                assert one == other
                counts[one is None] += 1
            op, storage = draw.randrange(len(tables.reads)), draw.randrange(len(tables.size))
            round_.decisions.choice[op] = draw.randrange(len(problem.ops[op].choices))
            round_.decisions.spilled.add(storage)
            for each in kinds:
                each.chosen(op)
                each.gone(storage)
                each.add_rerun(op, event)
    return counts[0], counts[1]


@needs_library
def test_random_problems() -> None:
    counts = [compare(small(70_000 + seed), seed) for seed in range(120)]
    assert min(map(sum, zip(*counts, strict=True))) > 200


@needs_library
@pytest.mark.parametrize("problem", [transformer(2), layered(1, 250)], ids=["transformer", "layered"])
def test_larger_problems(problem: Problem) -> None:
    assert sum(compare(problem, 1)) > 200


@needs_library
def test_many_reruns_are_added() -> None:
    """More than there was room for at first: an op that runs again near the use costs nothing."""
    tables = Tables(transformer(2))
    state = next(iter(descend(tables, 0.3)))
    rates = Rates(0.3, 0)
    kinds = [made(tables, state.trace, state.decisions, rates) for made in (Closures, NativeClosures)]
    questions = (Question(s, len(tables.reads), 0.0, 40) for s, op in enumerate(tables.created_by) if op > 40)
    question = next(question for question in questions if kinds[0].find(question) is not None)
    before = [each.find(question) for each in kinds]
    for each in kinds:
        for op in range(len(tables.reads)):
            for group in (0, len(tables.reads)):
                each.add_rerun(op, group)
    one, other = (each.find(question) for each in kinds)
    assert before[0] == before[1]
    assert one is not None
    assert one == other
    assert one.cost_us == 0


def test_the_same_path_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = transformer(2)
    assert len(problem.ops) >= NATIVE_OPS

    def path() -> list[tuple[int, int]]:
        return [(state.profile.peak_bytes, state.profile.time_us) for state in descend(Tables(problem), 0.3)]

    with_c = path()
    monkeypatch.setattr(library, "load_library", lambda name: None)
    monkeypatch.setattr(closure, "NativeClosures", None)
    monkeypatch.setattr(evict, "closures", Closures)
    assert path() == with_c
