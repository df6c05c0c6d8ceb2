"""Pages of an arena that go back to the system: never one in use, never too few, and those that are needed again last."""

from __future__ import annotations

import numpy as np
import pytest

from mebp_compile.overhead import PAGE_BYTES
from mebp_compile.pages import Decommit, Spans, decommits, resident

Life = tuple[int, int, int, int]  # start, end, low, high


def spans(lives: list[Life]) -> Spans:
    return Spans(*np.array(lives, np.int64).reshape(-1, 4).T)


def pages(life: Life) -> set[int]:
    return set(range(life[2] // PAGE_BYTES, -(-life[3] // PAGE_BYTES)))


def counted(lives: list[Life], given_back: tuple[Decommit, ...], steps: int, rounds: int = 3) -> list[int]:
    """Bytes of pages in memory at each step of the last of some steps in a row, page by page."""
    inside: set[int] = set()
    for _ in range(rounds):
        result = []
        for step in range(steps):
            for item in given_back:
                if item.step == step:
                    inside -= set(range(item.low // PAGE_BYTES, item.high // PAGE_BYTES))
            for life in lives:
                if max(life[0], 0) == step:
                    inside |= pages(life)
            result.append(len(inside) * PAGE_BYTES)
    return result


def random_lives(seed: int) -> tuple[list[Life], np.ndarray, int]:
    """Lives of 30 steps at offsets where they don't meet, what is beside them at each step, and the least budget for both."""
    draw = np.random.default_rng(seed)
    lives: list[Life] = []
    for _ in range(40):
        start = int(draw.integers(-1, 29))
        end, low = int(min(30, start + 1 + draw.integers(1, 12))), 64 * int(draw.integers(0, 3000))
        high = low + 64 * int(draw.integers(1, 600))
        if all(life[1] <= start or end <= life[0] or life[3] <= low or high <= life[2] for life in lives):
            lives.append((start, end, low, high))
    rest = draw.integers(0, 40, 30) * PAGE_BYTES
    alive = [len(set().union(*(pages(life) for life in lives if life[0] <= step < life[1]))) * PAGE_BYTES for step in range(30)]
    return lives, rest, int(max(rest + np.array(alive)))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("more", [0, 7])
def test_pages_and_the_rest_fit_the_budget(seed: int, more: int) -> None:
    """Random lives at the least budget and above it: a count page by page agrees with `resident`, stays within the budget, and nothing is given
    back that is in use. With less there is no answer."""
    lives, rest, least_bytes = random_lives(seed)
    budget_bytes = least_bytes + more * PAGE_BYTES
    given_back = decommits(spans(lives), rest, budget_bytes)
    assert given_back is not None
    assert [item.step for item in given_back] == sorted(item.step for item in given_back)
    found = resident(spans(lives), given_back, len(rest))
    assert found.tolist() == counted(lives, given_back, len(rest))
    assert int((found + rest).max()) <= budget_bytes
    for item in given_back:
        gone = set(range(item.low // PAGE_BYTES, item.high // PAGE_BYTES))
        assert gone
        assert not any(gone & pages(life) for life in lives if life[0] <= item.step < life[1])
    assert decommits(spans(lives), rest, least_bytes - PAGE_BYTES) is None


@pytest.mark.parametrize("seed", range(10))
def test_the_first_step_needs_no_more(seed: int) -> None:
    """It finds an untouched arena."""
    lives, rest, least_bytes = random_lives(seed)
    given_back = decommits(spans(lives), rest, least_bytes)
    assert given_back is not None
    first, later = (counted(lives, given_back, len(rest), rounds) for rounds in (1, 2))
    assert all(a <= b for a, b in zip(first, later, strict=True))


def test_with_room_nothing_is_given_back() -> None:
    lives, rest, _ = random_lives(0)
    everything = len(set().union(*map(pages, lives))) * PAGE_BYTES
    assert decommits(spans(lives), rest, everything + int(rest.max())) == ()


def test_what_is_needed_again_last_goes_first() -> None:
    """Three idle pages, room for one of them fewer: the one goes whose next use is the latest, be that in the next step."""
    page = PAGE_BYTES
    lives = [(0, 1, 0, page), (0, 1, page, 2 * page), (0, 1, 2 * page, 3 * page), (3, 4, 0, page), (2, 3, 2 * page, 3 * page)]
    rest = np.array([0, 2 * page, 0, 0])
    assert decommits(spans(lives), rest, 4 * page) == (Decommit(1, page, 2 * page),)
    again = [*lives, (2, 3, page, 2 * page)]
    assert decommits(spans(again), rest, 4 * page) == (Decommit(1, 0, page),)


def test_neighbours_go_together() -> None:
    """Idle pages side by side are one range, and no more of a large idle block goes than has to."""
    page = PAGE_BYTES
    lives = [(0, 1, 0, 100 * page), (2, 3, 0, 100 * page)]
    found = decommits(spans(lives), np.array([0, 20 * page, 0]), 100 * page)
    assert found is not None
    assert len(found) == 1
    assert 20 * page <= found[0].high - found[0].low < 40 * page
