"""The bounds of one solve. Those of a large problem take as long as the search for a schedule: a process of its own finds them meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from solvers.bounds import roofline_us
from solvers.cut_bound import bound_and_moments
from solvers.order_bound import base_order_bounds
from solvers.problem import Problem

ASIDE_OPS = 1000  # from which on starting a process pays
IN_LINE_SHARE = 0.25  # of the time, where there is no such process
ENDING_SECONDS = 0.3  # for what the process does after its own deadline
CLOSE = 1.001  # times the bound: neither a better schedule nor a better bound is looked for
POLL_SECONDS = 0.02


@dataclass(slots=True)
class Bounds:
    """What is known by now. any_us: no schedule is faster. ordered_us: none whose first runs come in base order is (at least any_us). deadline:
    until when they get better (time.monotonic); child: the process that does it, if any."""

    any_us: int
    ordered_us: int
    deadline: float = 0.0
    child: subprocess.Popen[str] | None = None

    def wait(self, time_us: int) -> None:
        """Until no better ones come, or they are close to a schedule's time."""
        while self.child is not None and self.child.poll() is None and time.monotonic() < self.deadline and time_us > CLOSE * self.ordered_us:
            time.sleep(POLL_SECONDS)


@contextmanager
def bounding(problem: Problem, time_limit_s: float) -> Iterator[Bounds]:
    """Bounds that get better inside of the context, until `time_limit_s` from now. For a problem of less than ASIDE_OPS ops, and where there is but
    one processor, they are found in this process, before anything else."""
    roofline = roofline_us(problem)
    known = Bounds(roofline, roofline, time.monotonic() + time_limit_s)
    if len(problem.ops) < ASIDE_OPS or _processors() < 2:
        for any_us, ordered_us in improving(problem, known.deadline - (1 - IN_LINE_SHARE) * time_limit_s):
            known.any_us, known.ordered_us = any_us, ordered_us
        yield known
        return
    known.child = child = _started(problem, known.deadline - ENDING_SECONDS)
    listener = threading.Thread(target=_listen, args=(child, known), name="bounds", daemon=True)
    listener.start()
    try:
        yield known
    finally:
        child.kill()
        child.wait()
        listener.join()


def improving(problem: Problem, deadline: float) -> Iterator[tuple[int, int]]:
    """Pairs of a bound for any order and one for base order, those after the first as long as the deadline (time.monotonic) allows."""
    any_us, moments = bound_and_moments(problem)
    yield any_us, any_us
    for ordered_us in base_order_bounds(problem, moments, deadline):
        yield any_us, max(any_us, ordered_us)


def _started(problem: Problem, deadline: float) -> subprocess.Popen[str]:
    """The process that finds them; it reads a file, since a pipe would keep this one waiting for its imports."""
    with tempfile.TemporaryFile("w+") as text:
        text.write(problem.to_json())
        text.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(deadline)],
            stdin=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )


def _listen(child: subprocess.Popen[str], known: Bounds) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            known.any_us, known.ordered_us = map(int, line.split())


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _main() -> None:
    """The process: a problem on standard input and a deadline as argument, pairs of bounds on standard output, where nothing else may go: HiGHS
    prints a warning now and then."""
    with open(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for pair in improving(Problem.from_json(sys.stdin.read()), float(sys.argv[1])):
            print(*pair, file=output, flush=True)


if __name__ == "__main__":
    _main()
