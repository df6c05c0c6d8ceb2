"""A lower bound of the time of every schedule whose first runs come in base order, whatever it recomputes and moves.

One moment cuts the step in two, the first run of some op z, and a linear program says what any schedule must do on both sides (order_program.py).
It knows what cut_bound.py can't know for lack of an order: what else has run by then, and that each way of each op needs its inputs on its own
side. Each side takes as long as the slower of its clocks. Several moments in one program say more: where there is a disk, since transfers can't be
done before what they move is there; without one, since what runs again for one moment may have to run again for another. Which moments those
are no rule tells: they are tried. Solved in whole numbers, which a schedule's are, the best moment alone says a little more.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

from solvers.bounds import least_alone_bytes, roofline_us
from solvers.order_program import Facts, Program
from solvers.problem import Problem

LEAST_SECONDS = 0.01
TINY_SHARES = (1 / 100, 1 / 1000)  # of the budget: what is no larger counts as nothing where there are several moments; quick and loose first
PARTS = 4  # of the step
BEST_MOMENTS = 2
NEEDY = 40  # ops that need most bytes alone, tried as moments
TRIED = 16  # of the best moments, tried beside others
PATIENCE = 3  # moments in a row that add nothing: the first ones are the best, and with a disk it's their whole numbers that say more
WORTH = 2e-4  # of the bound: what a further moment has to add
FAR_SHORT = 0.98  # of the bound of the best moment: several moments, loosely; then they seldom say more when asked closely
WHOLE = ((3e-3, math.inf), (3e-3, 0.0), (1e-4, 0.0))  # gap and `large`: the ways, then everything. Cuts come first, then a long search for solutions
CHAIN_GAP = 1e-3
LARGE = 1 / 20  # of the budget: half of such a storage says less than the bound could
SAFE = 1e-6  # of the bound: what the linear program may be wrong by


def base_order_bound_us(problem: Problem, moments: Sequence[int], deadline: float) -> int:
    """No schedule with its first runs in base order is faster: the best of `base_order_bounds`."""
    return max(base_order_bounds(problem, moments, deadline))


def base_order_bounds(problem: Problem, moments: Sequence[int], deadline: float) -> Iterator[int]:
    """Better and better bounds: the roofline; those of as many of the moments (ops that aren't optional; without a disk the ops that need most
    too) as are solved before the deadline (time.monotonic), with a disk until PATIENCE of them add nothing; those of the best of them with others;
    where those say no more, of the best again in whole numbers. The roofline alone without ortools."""
    best = roofline_us(problem)
    yield best
    facts, until = Facts(problem), (time.monotonic() + deadline) / 2  # half of the time for the moments
    alone, leader = dict[int, int](), 0
    for number, z in enumerate(moments if facts.disk else dict.fromkeys((*moments, *needy(facts)))):
        alone[z] = _bound_us(facts, [z], until)
        if alone[z] > best:
            best, leader = alone[z], number
            yield best
        if facts.disk and number - leader >= PATIENCE:
            break
    ranked = sorted((z for z in alone if alone[z]), key=lambda z: -alone[z])
    if not ranked:
        return
    together, whole = best, (_bound_us(facts, ranked[:1], deadline, *each) for each in _whole(facts))  # each solved when it is asked for
    several = _chained_us(facts, ranked, best, whole, deadline) if facts.disk else _together_us(facts, ranked[:TRIED], alone[ranked[0]], deadline)
    for bound in several:
        if bound > together:
            together = bound
            yield bound
    if together == best:
        for bound in whole:
            best = max(best, bound)
            yield best


def _whole(facts: Facts) -> tuple[tuple[float, float], ...]:
    """What is whole, one after the other: the ways alone first, where an op has several."""
    return WHOLE if any(len(op.choices) > 1 for op in facts.problem.ops) else WHOLE[1:]


def needy(facts: Facts) -> list[int]:
    """The ops that need most bytes alone in the way that needs least, first the one that needs most."""
    least = {o: least_alone_bytes(facts.problem, op, facts.pinned) for o, op in enumerate(facts.problem.ops) if not op.optional}
    return sorted(least, key=lambda o: (-least[o], o))[:NEEDY]


def _chained_us(facts: Facts, ranked: Sequence[int], best: int, whole: Iterator[int], deadline: float) -> Iterator[int]:
    """Bounds of the best moments, or of those with the ops that follow them, together with some over the whole step, first loosely. Where that falls
    far short of `best`, what is small matters: then the first of `whole`, the best moment's own with whole ways, and all together with everything
    that there is, last with whole ways too."""
    loose, close = (int(share * facts.problem.budget_bytes) for share in TINY_SHARES)
    fast = Facts(facts.problem, loose)
    chains = [chain(facts, best_moments) for best_moments in (ranked[:BEST_MOMENTS], _followed(facts, ranked[:BEST_MOMENTS]))]
    bound, moments = max((_bound_us(fast, moments, deadline), moments) for moments in chains)
    yield bound
    if bound < FAR_SHORT * best:
        yield next(whole)
        yield _bound_us(facts, moments, deadline)
        yield _bound_us(facts, moments, deadline, *_whole(facts)[0])
    else:
        yield _bound_us(Facts(facts.problem, close), moments, deadline)
        yield _bound_us(fast, moments, deadline, CHAIN_GAP, LARGE)


def _together_us(facts: Facts, ranked: Sequence[int], best: int, deadline: float) -> Iterator[int]:
    """Bounds of the first moment, whose own is `best`, with others: as long as one of them adds something, the one that adds most."""
    chosen = [ranked[0]]
    while True:
        tried = [(_bound_us(facts, sorted([*chosen, z]), deadline), z) for z in ranked if z not in chosen]
        bound, moment = max(tried, default=(0, -1))
        if bound <= best * (1 + WORTH):
            return
        yield bound
        best = bound
        chosen.append(moment)


def chain(facts: Facts, best: Sequence[int]) -> list[int]:
    """The best moments and those between equal parts of the step, of each part but the first the op that needs most alone."""
    times = [0 if op.optional else min(choice.time_us for choice in op.choices) for op in facts.problem.ops]
    chosen, whole, before = dict[int, tuple[int, int]](), sum(times) + 1, 0
    for o, op in enumerate(facts.problem.ops):
        part = PARTS * before // whole
        before += times[o]
        if part and not op.optional:
            chosen[part] = max(chosen.get(part, (-1, o)), (least_alone_bytes(facts.problem, op, facts.pinned), o))
    return sorted({*best, *(o for _, o in chosen.values())})


def _followed(facts: Facts, moments: Sequence[int]) -> list[int]:
    """The moments, each with the op that follows: what is asked for between the two moves after the first has run, which may be long."""
    following = dict(itertools.pairwise(o for o, op in enumerate(facts.problem.ops) if not op.optional))
    return [*moments, *(following[z] for z in moments if z in following)]


def _bound_us(facts: Facts, moments: Sequence[int], deadline: float, gap: float | None = None, large: float = 0.0) -> int:
    """The bound for these moments; 0 where it is not solved before the deadline. With a `gap` in whole numbers, which a schedule gives, until the
    bound is as near to their optimum; with `large` only the ways are whole, and what is kept of storages above that share of the budget."""
    try:
        from ortools.math_opt.python import mathopt  # noqa: F401
    except ImportError:
        return 0
    if time.monotonic() > deadline:
        return 0
    program = Program(facts, moments)
    program.build()
    whole = program.large(large * facts.problem.budget_bytes) if large else program.binaries if gap is not None else []
    answer = program.answer(max(deadline - time.monotonic(), LEAST_SECONDS), gap, whole)
    if answer is None or (gap is None and not answer.optimal):
        return 0
    proven = answer.objective if gap is None else answer.bound
    return math.floor(proven * (1 - SAFE)) if math.isfinite(proven) else 0
