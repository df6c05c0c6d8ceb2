"""What models add to the greedy paths of a solve: plans of the global model, and of what goes to disk, each repaired, refilled and replayed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

from solvers import disk_plan, milp
from solvers.course import Course, disk_share, offer_state, weights_of
from solvers.decode import Decisions, Tables
from solvers.disk_anneal import DiskAnnealing
from solvers.emit import emit
from solvers.evict import State
from solvers.greedy import first_decisions, repaired
from solvers.improve import placed_us, refill
from solvers.schedule import Run, Schedule

MODEL_SECONDS = 2.0  # with less time left the global model is not tried
MODEL_SHARE = 0.7  # of the time left
PLAN_PHASES = (32, 64, 32)  # of one disk plan after the other
FINER = (32, 64, 128)  # phases, tried one after the other from those on where a plan has no room with fewer
DISK_FULL = 1.4  # of the compute, that transfers take: then the paths that spare the disk first
REFILL_SECONDS = 3.0  # for one plan
ANNEALED = 8  # states


def offer_model(course: Course) -> None:
    """The global model's plans, each repaired, refilled and replayed."""
    tables, best = course.tables, course.best
    if best.schedule is None or best.report is None:
        return
    weight = weights_of(tables.problem)[0]
    for ways in (first_decisions(tables).choice, ways_of(tables, best.schedule)):
        left = course.deadline - time.monotonic()
        if course.settled() or left < MODEL_SECONDS:
            return
        found = False
        for decisions in _if_any(milp.plans(tables, ways, time.monotonic() + MODEL_SHARE * left)):
            state = repaired(tables, decisions, weight)
            if state is not None:
                course.states.append((refill(tables, state, weight, course.deadline), weight))
                offer_state(tables, best, course.states[-1][0], "model")
                course.tell("model")
                found = True
        if found:
            return


def offer_plans(course: Course) -> None:
    """For each new state that has transfers what goes to disk is decided anew, and again for the better half of what that leads to."""
    chains = [(state, weight) for state, weight in course.states if id(state) not in course.planned and state.profile.transfer_us]
    judge, disk_first = placed_us(course.tables), disk_share(course) >= DISK_FULL
    chains.sort(key=lambda chain: -chain[1] if disk_first else chain[1])  # by weight
    course.planned.update((id(state), state) for state, _ in chains)
    for phases in PLAN_PHASES:
        if course.settled():
            return
        planned = [(_planned(course, state, weight, phases), weight) for state, weight in chains]
        better = sorted(((state, weight) for state, weight in planned if state is not None), key=lambda chain: judge(chain[0]))
        chains = better[: (len(better) + 1) // 2]


def offer_annealed(course: Course, share: float = 1.0) -> None:
    """From the best states on, each of another time, what goes to disk and when is annealed: in rounds of equal time, after each of which the better
    half goes on, and the last one as long as it gets better; in a share of the time left."""
    deadline = time.monotonic() + share * (course.deadline - time.monotonic())
    judge = placed_us(course.tables)
    distinct = {judge(state): (state, weight) for state, weight in course.states}
    begun = ((DiskAnnealing(course.tables, state), weight) for _, (state, weight) in sorted(distinct.items(), key=lambda pair: pair[0]))
    chains = list(itertools.islice((chain for chain in begun if chain[0].possible()), ANNEALED))
    least_us, turn = math.inf, 0
    while chains:
        until = time.monotonic() + (deadline - time.monotonic()) / len(chains).bit_length()
        times = [_annealed_us(course, *chain, (until - time.monotonic()) / (len(chains) - k), turn) for k, chain in enumerate(chains)]
        found = sorted((us, k) for k, us in enumerate(times) if us is not None)
        if len(chains) == 1 and (not found or found[0][0] >= least_us):
            return
        least_us, turn = min((us for us, _ in found), default=math.inf), turn + 1
        chains = [chains[k] for _, k in found[: (len(chains) + 1) // 2]]


def _annealed_us(course: Course, annealing: DiskAnnealing, weight: float, seconds: float, turn: int) -> int | None:
    """Microseconds of what is found from the best so far on; None: nothing."""
    if seconds <= 0 or course.settled() or (found := annealing.run(seconds, course.seed + turn)) is None:
        return None
    course.best.offer(emit(course.tables, found.state.decisions, found.state.trace, found.moves), "disk annealing")
    course.states.append((found.state, weight))
    course.tell(f"disk annealing ({found.tried} candidates)")
    return found.time_us


def _planned(course: Course, start: State, weight: float, phases: int) -> State | None:
    """The best of the plans for the state, repaired and refilled by both clocks; None without one."""
    tables, judge = course.tables, placed_us(course.tables)
    found: list[State] = []
    for count in (each for each in FINER if each >= phases):  # what is used twice in a phase stays there: in shorter ones there may be room
        for decisions in _if_any(disk_plan.plans(tables, start, count, course.deadline)):
            state = repaired(tables, decisions, weight)
            found += [state] if state is not None else []
            if state is not None and state.decisions is decisions:  # it fits as it is: smaller shares of the budget are for those that don't
                break
        if found:
            break
    if not found:
        return None
    state = min(found, key=judge)
    offer_state(tables, course.best, state, "disk plan")
    planned, state = state, refill(tables, state, weight, min(course.deadline, time.monotonic() + REFILL_SECONDS), judge=judge)
    offer_state(tables, course.best, state, "disk plan", planned)
    course.states.append((state, weight))
    course.planned[id(state)] = state
    course.tell(f"disk plan (transfers x {weight}, {count} phases)")
    return state


def _if_any(plans: Iterator[Decisions]) -> Iterator[Decisions]:
    """The plans; none without ortools."""
    try:
        yield from plans
    except ImportError:
        return


def ways_of(tables: Tables, schedule: Schedule) -> list[int]:
    """How the schedule runs every op; the fastest way for those that it doesn't run."""
    result = list(first_decisions(tables).choice)
    for step in schedule.steps:
        if isinstance(step, Run):
            result[step.op] = step.choice
    return result
