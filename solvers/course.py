"""What the parts of one solve share: the best schedule so far, the states that paths and models ended with, and the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from solvers.bounding import CLOSE, Bounds
from solvers.check import Report, ScheduleError, replay
from solvers.decode import Tables
from solvers.emit import emit, synchronous
from solvers.evict import State
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.transfers import placed

TRANSFER_WEIGHTS = (0.3, 1.0)


@dataclass(slots=True)
class Best:
    """The fastest valid schedule so far. held: storages that the schedules which are offered take for such that don't move (held.py)."""

    problem: Problem
    held: frozenset[int] = frozenset()
    schedule: Schedule | None = None
    report: Report | None = None
    method: str = ""

    def offer(self, schedule: Schedule, method: str) -> None:
        """Replay the schedule; keep it if it is valid and faster (at equal time: smaller peak)."""
        schedule = replace(schedule, resident=schedule.resident | self.held)
        try:
            report = replay(self.problem, schedule)
        except ScheduleError:
            return
        if self.report is None or (report.time_us, report.peak_bytes) < (self.report.time_us, self.report.peak_bytes):
            self.schedule, self.report, self.method = schedule, report, method


@dataclass(slots=True)
class Course:
    """What the parts of one solve share. bounds: as far as they are known by now. modelled: models follow the greedy paths. states: what paths,
    plans and the model ended with, and the weight of transfers there. walked: the weight of each greedy path, and the seconds that it took."""

    tables: Tables
    best: Best
    deadline: float
    seed: int
    progress: Callable[[str], None] | None
    bounds: Bounds
    modelled: bool
    states: list[tuple[State, float]] = field(default_factory=list)
    walked: dict[float, float] = field(default_factory=dict)
    planned: dict[int, State] = field(default_factory=dict)  # by id: what has been, or is, a disk plan

    def settled(self) -> bool:
        """The best schedule so far is so near to the bound of base order that it is left as it is."""
        return self.best.report is not None and self.best.report.time_us <= CLOSE * self.bounds.ordered_us

    def tell(self, text: str) -> None:
        if self.progress and self.best.report:
            self.progress(f"{text}: {self.best.report.time_us / 1e6:.4f} s")


def disk_share(course: Course) -> float:
    """Of the states so far the most that transfers take, as a share of the compute."""
    return max((transfer_share(state) for state, _ in course.states), default=0.0)


def transfer_share(state: State) -> float:
    """What the state's transfers take, as a share of its compute."""
    return state.profile.transfer_us / (state.profile.compute_us + 1)


def weights_of(problem: Problem) -> list[float]:
    """What an overlapped transfer may count, as a fraction of its duration: never less than it delays compute."""
    return sorted({max(weight, problem.interference) for weight in TRANSFER_WEIGHTS})


def offer_state(tables: Tables, best: Best, state: State, method: str, before: State | None = None) -> None:
    """Offer the state's schedule with synchronous and with overlapped transfers. before: what it was made from, offered already; it may still be
    that."""
    if state is before:
        return
    decisions, trace = state.decisions, state.trace
    best.offer(emit(tables, decisions, trace, synchronous(trace)), method)
    if state.profile.transfer_us:
        best.offer(emit(tables, decisions, trace, placed(tables, state)[1]), method)
