"""solvers.bounding: the bounds of a solve, in this process or in one of their own."""

import subprocess
import time
from typing import Any

import pytest
from generators import layered, transformer

from solvers import bounding as module
from solvers.bounding import Bounds, bounding, improving
from solvers.bounds import roofline_us
from solvers.cut_bound import lower_bound_us
from solvers.problem import Problem
from solvers.solve import Infeasible, smallest, solve


def tight(problem: Problem) -> Problem:
    return problem.with_budget(int(1.05 * smallest(problem)[0]))


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any problem's bounds come from a process, also on a machine with one processor."""
    monkeypatch.setattr(module, "ASIDE_OPS", 0)
    monkeypatch.setattr(module, "_processors", lambda: 2)


def at_end(problem: Problem, seconds: float) -> tuple[Bounds, bool]:
    """What is known where the context ends after waiting, and whether a process found it."""
    with bounding(problem, seconds) as known:
        beside = known.child is not None
        known.wait(1 << 60)
    return known, beside


def test_a_process_finds_the_same(aside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, with time enough for all; the process is gone afterwards."""
    problem = tight(layered(3, 60))
    *_, last = improving(problem, time.monotonic() + 100.0)
    known, beside = at_end(problem, 100.0)
    assert beside
    assert known.child is not None
    assert known.child.poll() is not None
    assert (known.any_us, known.ordered_us) == last
    assert roofline_us(problem) <= known.any_us == lower_bound_us(problem) < known.ordered_us
    monkeypatch.setattr(module, "_processors", lambda: 1)
    known, beside = at_end(problem, 100.0)
    assert not beside
    assert (known.any_us, known.ordered_us) == last


def test_no_time_for_it(aside: None) -> None:
    """The roofline is known at once, and nothing is waited for."""
    problem = tight(layered(3, 60))
    known, _ = at_end(problem, 0.0)
    assert known.any_us == known.ordered_us == roofline_us(problem)
    assert known.child is not None
    assert known.child.returncode


def test_what_a_library_prints_is_no_bound(aside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS prints warnings from C; the process's output stays pairs of numbers."""
    problem = tight(layered(3, 60))
    noise = "import os, runpy, solvers.order_bound as o; f = o.base_order_bounds; "
    noise += "o.base_order_bounds = lambda *a: (os.write(1, b'noise\\n'), f(*a))[1]; "
    start = subprocess.Popen

    def noisy(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "solvers.bounding"]
        run = f"{noise}import sys; sys.argv = ['', {command[3]!r}]; runpy.run_module('solvers.bounding', run_name='__main__')"
        return start([command[0], "-c", run], **options)

    monkeypatch.setattr(module.subprocess, "Popen", noisy)
    *_, last = improving(problem, time.monotonic() + 100.0)
    known, _ = at_end(problem, 100.0)
    assert (known.any_us, known.ordered_us) == last


def test_a_good_schedule_needs_no_better_bound(aside: None) -> None:
    """Whoever has a schedule near to what is known waits for no more."""
    problem = tight(layered(3, 60))
    with bounding(problem, 1000.0) as known:
        known.wait(roofline_us(problem))
        assert known.child is not None
        assert known.child.poll() is None


def test_a_failure_ends_the_process(aside: None) -> None:
    with pytest.raises(Infeasible), bounding(layered(3, 60), 1000.0) as known:
        raise Infeasible(2, 1, "an op")
    assert known.child is not None
    assert known.child.poll() is not None


def test_solve_takes_them(aside: None) -> None:
    """The answer's bounds are those of the process, below its time."""
    problem = tight(transformer(2))
    *_, (any_us, ordered_us) = improving(problem, time.monotonic() + 100.0)
    found = solve(problem, "balanced", 6.0)
    assert found.order_bound_us is not None
    assert roofline_us(problem) <= found.bound_us <= found.order_bound_us <= found.report.time_us
    assert found.bound_us <= any_us
    assert found.order_bound_us <= ordered_us
