"""Holes of malloc's heap are closed: nothing fills them again."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from mebp_compile.measure import heap_holes
from mebp_compile.measure.child import run_child


def test_what_comes_after_does_not_fill_closed_holes() -> None:
    """400 blocks from 8 kB on lie in a heap's 100 MB of holes where those were only trimmed, and behind all that lived there before where they were
    closed. A second closing finds the same holes. What lives between them is as it was."""
    trimmed = run_child("measure_children", "holes", {"closed": 0})
    closed = run_child("measure_children", "holes", {"closed": 2})
    for answer in (trimmed, closed):
        assert answer["full"] - answer["trimmed"] > 80_000_000
        assert answer["intact"]
    assert trimmed["in_holes"] > 350
    assert closed["in_holes"] == 0
    first, second = closed["taken"]
    assert min(first, second) > 80_000_000
    assert abs(second - first) < 4_000_000


def test_a_thread_with_a_heap_of_its_own_closes_none() -> None:
    """Blocks that do not come from holes of the process's heap go back at once."""
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(heap_holes.close_holes()))
    thread.start()
    thread.join()
    assert taken == [0]
    assert not heap_holes._plugs


def test_without_glibc_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap_holes.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert heap_holes.close_holes() == 0
