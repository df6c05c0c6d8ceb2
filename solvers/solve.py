"""The one front door: a problem in, the fastest schedule found within its budget out, checked, with a proven gap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from solvers import anneal
from solvers.away_limit import fewer_movable, within_limit, without_limit
from solvers.bounding import CLOSE, Bounds, bounding
from solvers.bounds import roofline_us, working_set
from solvers.check import Report, replay
from solvers.course import TRANSFER_WEIGHTS, Best, Course, disk_share, offer_state, transfer_share, weights_of
from solvers.cut_bound import bound_and_moments
from solvers.decode import Tables
from solvers.emit import emit, synchronous
from solvers.evict import State
from solvers.exchange import exchanged
from solvers.from_models import offer_annealed, offer_model, offer_plans, ways_of
from solvers.greedy import descend, first_decisions
from solvers.held import with_held
from solvers.improve import placed_us, refill, score, search
from solvers.problem import Problem
from solvers.schedule import Schedule, format_bytes

EFFORTS = ("fast", "balanced", "proof")
TIGHTEST = 0.0  # transfers cost nothing: the path that goes lowest whatever the times are; walked where the others end too high
SEARCH_ROUNDS = 400
GOOD_ENOUGH = 1.005  # times the bound: no second greedy path
EXACT_OPS = 40
EXCHANGE_SHARE = 0.5  # of the time for a search, before it
PLAN_SHARE = 0.75  # of the time left, for plans of what goes to disk where the disk decides
FIRST_ANNEAL_SHARE = 0.15  # of the time left, before plans
ANNEAL_SHARE = 0.3  # of the time left, to anneal what goes to disk; where the disk decides, all of it
FINISHED_BY = 0.92  # of the time limit: what is begun by then has to be placed and replayed
ANSWERED_BY = 0.98  # of the time limit: no better bound is waited for
ALL_USED = 0.9  # of the budget
BASE_ORDER_SHARE = 0.5  # of the time, where the order is free as well
DISK_MATTERS = 0.02  # of the compute, that transfers take: then what goes to disk is planned
DISK_BOUND = 0.5  # likewise: then instead of the global model, and greedy paths end without an exchange
DISK_WEIGHTS = (3.0,)  # more greedy paths then
QUICK_WEIGHTS = (8.0, 20.0)  # and more of them, where the slowest so far took less than this part of the time left
QUICK = 0.05


class Infeasible(ValueError):
    """No schedule within the budget was found.

    smallest_found_bytes: a budget at which `solve` succeeds. lower_bound_bytes: no schedule exists below it;
    binding_op: the op that needs so much.
    """

    def __init__(self, smallest_found_bytes: int, lower_bound_bytes: int, binding_op: str) -> None:
        super().__init__(
            f"no schedule fits the budget; the smallest budget found is {smallest_found_bytes} bytes "
            f"({format_bytes(smallest_found_bytes)}), and {binding_op} alone needs {lower_bound_bytes} bytes: "
            "raise the budget, or give the ops cheaper choices"
        )
        self.smallest_found_bytes = smallest_found_bytes
        self.lower_bound_bytes = lower_bound_bytes
        self.binding_op = binding_op

    def __reduce__(self) -> tuple[type[Infeasible], tuple[int, int, str]]:
        return (Infeasible, (self.smallest_found_bytes, self.lower_bound_bytes, self.binding_op))


@dataclass(frozen=True, slots=True)
class Solution:
    """A checked schedule. bound_us holds for every schedule of the problem, in any order and with overlapped
    transfers. order_bound_us, but for effort "fast", holds for those whose first runs come in base order (order_bound.py).
    exact_bound_us, where the exact model ran, holds only for its space: base order, each op at most twice, synchronous transfers. method: what
    found the schedule."""

    schedule: Schedule
    report: Report
    bound_us: int
    method: str
    exact_bound_us: int | None = None
    order_bound_us: int | None = None

    @property
    def gap(self) -> float:
        """time / bound - 1."""
        return self.report.time_us / self.bound_us - 1 if self.bound_us else 0.0


def solve(
    problem: Problem,
    effort: str = "balanced",
    time_limit_s: float = 20.0,
    seed: int = 0,
    hints: Sequence[Schedule] = (),
    progress: Callable[[str], None] | None = None,
) -> Solution:
    """The fastest schedule found within the budget.

    effort: "fast" (greedy), "balanced" (and a tighter bound, the global model, search from the best; on problems of up to EXACT_OPS ops the
    exact model instead of the global one) or "proof" (on problems of up to anneal.MOST_OPS ops half of the time for other orders of the ops; the
    same otherwise). The limit cuts only what comes after the greedy answer.
    hints: schedules to start from.
    Raises ProblemError for a malformed problem, Infeasible if nothing fits, ValueError for an unknown effort.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort {effort!r} is unknown: take one of {', '.join(EFFORTS)}")
    problem.validate()
    if problem.away_limit_bytes is not None:
        return _solve_limited(problem, effort, time_limit_s, seed, progress)
    best, roofline = Best(problem), roofline_us(problem)
    for hint in hints:
        best.offer(hint, "hint")
    deadline, modelled = time.monotonic() + FINISHED_BY * time_limit_s, effort != "fast" and len(problem.ops) > EXACT_OPS
    with nullcontext(Bounds(roofline, roofline)) if effort == "fast" else bounding(problem, ANSWERED_BY * time_limit_s) as bounds:
        course = Course(Tables(problem), best, deadline, seed, progress, bounds, modelled)
        smallest_found, exact_bound = _pursue(course, effort, time_limit_s)
        if best.schedule is None or best.report is None:
            raise Infeasible(min(smallest_found), *working_set(problem))  # no path was skipped without a schedule
        bounds.wait(best.report.time_us)
    ordered_us = None if effort == "fast" else bounds.ordered_us
    return Solution(best.schedule, best.report, bounds.any_us, best.method, exact_bound, ordered_us)


def _pursue(course: Course, effort: str, time_limit_s: float) -> tuple[list[int], int | None]:
    """What the effort asks for; the smallest peak of each greedy path, and the exact model's bound."""
    problem = course.tables.problem
    free_order = effort == "proof" and len(problem.ops) <= anneal.MOST_OPS
    in_base_order = replace(course, deadline=course.deadline - time_limit_s * (1 - BASE_ORDER_SHARE)) if free_order else course
    smallest_found, in_base_order = _offer_paths_and_models(in_base_order)
    if effort != "fast":
        _offer_search(in_base_order)
    if in_base_order.best.schedule is not None:  # where storages were held, it is another's
        course.best.offer(in_base_order.best.schedule, in_base_order.best.method)
    if free_order:
        _offer_reordered(course)
    return smallest_found, _offer_exact(problem, course.best, effort, course.deadline)


def _offer_paths_and_models(course: Course) -> tuple[list[int], Course]:
    """Greedy paths and, where they are asked for, models; the smallest peak of each path, and the course that they ended with."""
    before = time.monotonic()
    smallest_found = _offer_greedy(course, first_only=course.modelled)
    if course.modelled and disk_share(course) >= DISK_BOUND:  # what goes to disk decides: that, and not the global model
        smallest_found += _offer_greedy(course)
        course = with_held(course, _offer_greedy)
        quick = max(course.walked.values(), default=0.0) < QUICK * (course.deadline - time.monotonic())
        smallest_found += _offer_greedy(course, (*DISK_WEIGHTS, *(QUICK_WEIGHTS if quick else ())))
        now = time.monotonic()
        offer_plans(replace(course, deadline=now + PLAN_SHARE * (course.deadline - now)))
        offer_annealed(course)
        return smallest_found, course
    if course.modelled:  # the model leaves as much time to the second path as the first one took, if there is so much
        taken = time.monotonic() - before
        second_fits = time.monotonic() + taken < course.deadline
        offer_model(replace(course, deadline=course.deadline - taken) if second_fits else course)
        smallest_found += _offer_greedy(course)
    if course.modelled and disk_share(course) >= DISK_MATTERS:
        fastest = course.best.report
        offer_annealed(course, FIRST_ANNEAL_SHARE)
        if course.best.report is not fastest:  # then exchange finds more, and in less time, than plans
            _offer_exchanged(course)
        offer_plans(course)
        offer_annealed(course, ANNEAL_SHARE)
    return smallest_found, course


def _solve_limited(problem: Problem, effort: str, time_limit_s: float, seed: int, progress: Callable[[str], None] | None) -> Solution:
    """Where what lies outside of memory has a limit too: planned without it, and again with as much of that movable as fits. The bound is that
    without a limit. Hints are not taken: they may be above it."""
    free = without_limit(problem)
    try:
        first = solve(free, "fast", time_limit_s, seed, progress=progress)
    except Infeasible:
        narrowed = fewer_movable(problem, smallest(free)[1])
        raise Infeasible(smallest(narrowed)[0], *working_set(free)) from None
    if effort == "fast" and within_limit(problem, first.schedule):
        return first
    narrowed = fewer_movable(problem, first.schedule)
    try:
        found = solve(narrowed, effort, time_limit_s, seed, progress=progress)
    except Infeasible as error:
        raise Infeasible(error.smallest_found_bytes, *working_set(free)) from None
    pinned = (s for s, info in enumerate(narrowed.storages) if info.persistent and not info.movable)
    schedule = replace(found.schedule, resident=found.schedule.resident.union(pinned))
    report, bound = replay(problem, schedule), roofline_us(free) if effort == "fast" else bound_and_moments(free)[0]
    return Solution(schedule, report, bound, found.method)


def smallest(problem: Problem) -> tuple[int, Schedule]:
    """The smallest budget found, and a schedule with that peak (time comes second)."""
    problem.validate()
    tables = Tables(problem)
    states = [min(descend(tables, weight), key=_tightness) for weight in (*TRANSFER_WEIGHTS, TIGHTEST)]
    best = min(states, key=_tightness)
    schedule = emit(tables, best.decisions, best.trace, synchronous(best.trace))
    return replay(problem, schedule, enforce_budget=False).peak_bytes, schedule


def _tightness(state: State) -> tuple[int, int]:
    return state.profile.peak_bytes, state.profile.time_us


def _offer_greedy(course: Course, more: tuple[float, ...] = (), first_only: bool = False) -> list[int]:
    """Walk down each greedy path not yet walked to the budget, and refill; returns the smallest peak of each. first_only: end with the
    first that fits."""
    tables, best, smallest_found = course.tables, course.best, list[int]()
    bound = roofline_us(tables.problem)
    for walked in (*weights_of(tables.problem), *more, TIGHTEST):
        before = time.monotonic()
        late = before + max(course.walked.values(), default=0.0) * course.modelled > course.deadline  # another would take as long
        if best.report and (walked == TIGHTEST or best.report.time_us <= GOOD_ENOUGH * bound or late or course.settled()):
            break
        if walked in course.walked:
            continue
        course.walked[walked] = 0.0
        weight = walked or weights_of(tables.problem)[0]
        path = list(_until_fit(tables, walked))
        smallest_found.append(min(state.profile.peak_bytes for state in path))
        if smallest_found[-1] > tables.problem.budget_bytes:
            continue
        state = min(_filled(tables, best, path[-1], weight, not course.modelled), key=lambda state: score(state, weight))
        if not course.settled() and transfer_share(state) < DISK_BOUND:
            before_exchange, state = state, exchanged(tables, state, weight)
            offer_state(tables, best, state, "exchange", before_exchange)
        course.states.append((state, weight))
        course.walked[walked] = time.monotonic() - before
        course.tell(f"greedy (transfers x {weight})")
        if first_only:
            break
    return smallest_found


def _offer_exchanged(course: Course) -> None:
    """What exchange makes of the best state, in its share of the time left."""
    if course.settled() or time.monotonic() >= course.deadline:
        return
    judge = placed_us(course.tables)
    state, weight = min(course.states, key=lambda pair: judge(pair[0]))
    changed = _exchange(course, state, weight, course.deadline)
    if changed is not state:
        course.states.append((changed, weight))
        course.tell("exchange")


def _exchange(course: Course, state: State, weight: float, until: float) -> State:
    """The state exchanged, and offered, in exchange's share of the time until then."""
    now = time.monotonic()
    changed = exchanged(course.tables, state, weight, now + EXCHANGE_SHARE * (until - now))
    offer_state(course.tables, course.best, changed, "exchange", state)
    return changed


def _offer_search(course: Course) -> None:
    """Search from the best states, one for each weight of transfers, half of the time left for each but the last."""
    tables, best = course.tables, course.best
    starts: dict[float, State] = {}
    judge = placed_us(tables) if len(tables.problem.ops) > EXACT_OPS and disk_share(course) >= DISK_MATTERS else None
    for state, weight in sorted(course.states, key=lambda pair: judge(pair[0]) if judge else score(pair[0], pair[1])):
        starts.setdefault(weight, state)
    for number, (weight, state) in enumerate(starts.items(), 1):
        left = course.deadline - time.monotonic()
        if best.report is None or best.report.time_us <= course.bounds.ordered_us or left <= 0:
            return
        until = time.monotonic() + (left if number == len(starts) else left / 2)
        changed = _exchange(course, state, weight, until)
        found = search(tables, changed, weight, until, SEARCH_ROUNDS, course.seed, course.progress, judge)
        offer_state(tables, best, found, f"{best.method} and search" if best.method == "model" else "search", changed)


def _offer_reordered(course: Course) -> None:
    """Order free: what annealing finds, as it is and as the order from which the solvers start again."""
    problem, best = course.tables.problem, course.best
    if best.report is not None and best.report.time_us <= CLOSE * course.bounds.any_us:
        return
    ways = first_decisions(course.tables).choice if best.schedule is None else ways_of(course.tables, best.schedule)
    resident = frozenset[int]() if best.schedule is None else best.schedule.resident
    setting = anneal.Setting(ways, frozenset(s for s, may in enumerate(course.tables.may_leave) if may) - resident)
    sequence = anneal.sequence_of(problem, setting, course.seed)
    if not sequence:
        return
    schedule = anneal.schedule_of(problem, setting, sequence)
    if schedule is not None:
        best.offer(schedule, "annealing")
        course.tell("annealing")
    order = anneal.base_order(problem, sequence)
    left = course.deadline - time.monotonic()
    if best.report is not None and (best.report.time_us <= CLOSE * course.bounds.any_us or left < 0):
        return
    try:
        found = solve(anneal.reordered(problem, order), "balanced", left, course.seed, progress=course.progress)
    except Infeasible:
        return
    best.offer(anneal.renamed(found.schedule, order), f"annealed order, {found.method}")


def _filled(tables: Tables, best: Best, state: State, weight: float, final: bool) -> Iterator[State]:
    """The state, refilled; and, where it leaves much of the budget unused (an op run in another way freed more at once than was asked
    for), the end of a second path, which begins with the ways that the first one ended with."""
    offer_state(tables, best, state, "greedy")
    refilled, judge = refill(tables, state, weight), placed_us(tables)
    if final and state.profile.transfer_us and judge(refilled) > judge(state):  # it took the bytes in which transfers overlapped
        refilled = refill(tables, state, weight, judge=judge)
    offer_state(tables, best, refilled, "greedy", state)
    yield refilled
    if refilled.profile.peak_bytes < ALL_USED * tables.problem.budget_bytes:
        *_, again = _until_fit(tables, weight, state.decisions.choice)
        if again.profile.peak_bytes <= tables.problem.budget_bytes:
            again = refill(tables, again, weight)
            offer_state(tables, best, again, "greedy")
            yield again


def _until_fit(tables: Tables, weight: float, choice: list[int] | None = None) -> Iterator[State]:
    """The greedy path up to its first state within the budget."""
    for state in descend(tables, weight, choice):
        yield state
        if state.profile.peak_bytes <= tables.problem.budget_bytes:
            return


def _offer_exact(problem: Problem, best: Best, effort: str, deadline: float) -> int | None:
    """The exact model, on small problems; returns its bound."""
    if effort == "fast" or len(problem.ops) > EXACT_OPS:
        return None
    from solvers.cp_sat import solve_exact

    answer = solve_exact(problem, max(1.0, deadline - time.monotonic()))
    if answer.schedule is not None:
        best.offer(answer.schedule, "exact")
    return answer.bound_us
