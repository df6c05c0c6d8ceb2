"""solvers.native_decode: decode.c says what decode.py says, of traces, of what they take, and of what has none."""

import random

import pytest
from generators import layered, small, transformer

from solvers import library, native_decode
from solvers.decode import Decisions, DecodeError, Tables, Trace, decode
from solvers.emit import Profile, profile
from solvers.greedy import descend, evaluate, first_decisions
from solvers.library import NATIVE_OPS, load_library
from solvers.native_decode import NativeDecoder
from solvers.problem import Problem

needs_library = pytest.mark.skipif(load_library("decode") is None, reason="decode.c is not built (no C compiler)")
STATES = 12


def changed(tables: Tables, decisions: Decisions, draw: random.Random, changes: int) -> Decisions:
    """A copy with so many random changes: cuts, homes, spills, ways; sensible or not."""
    result, problem = decisions.copy(), tables.problem
    for _ in range(changes):
        storage, op = draw.randrange(len(problem.storages)), draw.randrange(len(problem.ops))
        what = draw.randrange(5)
        if what == 0:
            result.cut(storage, draw.randrange(len(problem.ops) + 1))
        elif what == 1:
            result.spilled ^= {storage}
        elif what == 2:
            result.away ^= {storage} if tables.may_leave[storage] else set()
        elif what == 3:
            result.choice[op] = draw.randrange(len(problem.ops[op].choices))
        elif result.cuts:
            cut = draw.choice(sorted(result.cuts))
            result.uncut(cut, draw.choice(result.cuts[cut]))
    return result


def in_python(tables: Tables, decisions: Decisions) -> tuple[Trace, Profile] | int:
    """As decode.py has it; the storage of an error."""
    try:
        trace = decode(tables, decisions)
        return trace, profile(tables, decisions, trace)
    except DecodeError as error:
        return error.storage


def in_c(native: NativeDecoder, decisions: Decisions) -> tuple[Trace, Profile] | int:
    """As decode.c has it."""
    try:
        return native.run(decisions)
    except DecodeError as error:
        return error.storage


def same(one: tuple[Trace, Profile] | int, other: tuple[Trace, Profile] | int) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    assert one[1].live_bytes.tolist() == other[1].live_bytes.tolist()
    numbers = [(p.peak_bytes, p.compute_us, p.transfer_us) for p in (one[1], other[1])]
    return vars(one[0]) == vars(other[0]) and numbers[0] == numbers[1]


def compare(problem: Problem, seed: int, repeats: int) -> tuple[int, int]:
    """How many decisions along the greedy path, changed at random, have a trace, and how many have none."""
    tables, draw, counts = Tables(problem), random.Random(seed), [0, 0]
    native = NativeDecoder(tables)
    for _, state in zip(range(STATES), descend(tables, 0.3), strict=False):
        for changes in (0, *(draw.randrange(1, 40) for _ in range(repeats))):
            decisions = changed(tables, state.decisions, draw, changes)
            expected = in_python(tables, decisions)
            assert same(expected, in_c(native, decisions))
            counts[isinstance(expected, int)] += 1
    return counts[0], counts[1]


@needs_library
def test_random_problems() -> None:
    """Errors too, of the same storage."""
    counts = [compare(small(seed), seed, 4) for seed in range(200)]
    assert min(map(sum, zip(*counts, strict=True))) > 300


@needs_library
@pytest.mark.parametrize("problem", [transformer(2), transformer(1, splits=4), layered(1, 250)], ids=["transformer", "chains", "layered"])
def test_larger_problems(problem: Problem) -> None:
    made, none = compare(problem, 1, 8)
    assert made > 10
    assert made + none > 50


@needs_library
def test_room_grows() -> None:
    tables = Tables(transformer(2))
    native, decisions = NativeDecoder(tables), first_decisions(tables)
    native.grow(3)
    assert same(in_python(tables, decisions), in_c(native, decisions))
    assert native.room > len(tables.problem.ops)


def test_what_is_lost_is_named() -> None:
    """A weight that can't leave memory is cut before the end."""
    tables = Tables(transformer(2))
    assert len(tables.problem.ops) >= NATIVE_OPS
    storage, decisions = tables.pinned.index(True), first_decisions(tables)
    decisions.cut(storage, len(tables.problem.ops))
    with pytest.raises(DecodeError, match=f"storage {storage} can't be brought back at version 0") as error:
        evaluate(tables, decisions)
    assert error.value.storage == storage


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same state."""
    tables = Tables(transformer(2))
    one = evaluate(tables, first_decisions(tables))
    monkeypatch.setattr(library, "load_library", lambda name: None)
    monkeypatch.setattr(native_decode, "NativeDecoder", None)
    other = evaluate(tables, first_decisions(tables))
    assert same((one.trace, one.profile), (other.trace, other.profile))
