"""solvers.eject: what it places is placed rightly, it says how many are left, and it goes on where it stopped."""

from collections.abc import Callable

import numpy as np
import pytest

from solvers import eject
from solvers.eject import Ejection
from solvers.library import load_library

needs_library = pytest.mark.skipif(load_library("eject") is None, reason="eject.c is not built (no C compiler)")
WORK = 1 << 22


def blocks(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    starts = draw.integers(0, 100, count)
    return starts, starts + draw.integers(1, 40, count), draw.integers(1, 30, count)


def most(starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> int:
    return max(int(sizes[(starts <= step) & (ends > step)].sum()) for step in range(140))


def assert_right(search: Ejection, height: int) -> None:
    """Pair by pair: what is placed lies below the height, and no two share a byte at a step."""
    placed = np.flatnonzero(search.offsets >= 0)
    low, high = search.offsets, search.offsets + search.sizes
    assert (high[placed] <= height).all()
    for k in placed:
        others = placed[(search.starts[placed] < search.ends[k]) & (search.ends[placed] > search.starts[k])]
        assert ((low[others] < high[k]) & (high[others] > low[k])).sum() == 1


@needs_library
@pytest.mark.parametrize("seed", range(30))
def test_all_or_nearly_all_are_placed(seed: int) -> None:
    """Below the most bytes at once not all can be; a little above all are."""
    columns = blocks(seed, 80)
    height = most(*columns)
    search = Ejection(*columns)
    assert 0 < search.run(height - 1, WORK, seed) < 20
    assert_right(search, height - 1)
    left = search.run(int(1.1 * height), WORK, seed)  # with what it has learnt
    assert left == (search.offsets < 0).sum() == 0
    assert_right(search, int(1.1 * height))


@needs_library
def test_the_same_seed_gives_the_same_offsets() -> None:
    def found(seed: int, change: Callable[[Ejection], None] = lambda search: None) -> list[int]:
        search = Ejection(*blocks(3, 80))
        change(search)
        search.run(most(*blocks(3, 80)), WORK, seed)
        return search.offsets.tolist()

    assert found(1) == found(1)
    assert found(1) != found(2)

    def shortened(search: Ejection) -> None:
        search.ends[:] = search.starts + 1

    assert found(1) != found(1, shortened)


@needs_library
def test_a_block_higher_than_the_arena_stays_without_a_place() -> None:
    search = Ejection(np.array([0, 0]), np.array([5, 5]), np.array([100, 7]))
    assert search.run(50, WORK) == 1
    assert search.offsets.tolist() == [-1, 0]
    assert Ejection(*(np.zeros(0, np.int64) for _ in range(3))).run(10, WORK) == 0


def test_without_the_library_nothing_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eject, "load_library", lambda name: None)
    search = Ejection(*blocks(0, 10))
    assert search.run(1000, WORK) == 10
    assert (search.offsets < 0).all()
