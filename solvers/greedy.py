"""The greedy descent: from keep-all towards less memory, one round of evictions after the other.

The path doesn't depend on the budget: a smaller budget only means walking further down the same path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from solvers.bounds import working_set
from solvers.closure import Rates
from solvers.decode import Decisions, DecodeError, Tables
from solvers.evict import Round, State
from solvers.native_decode import traced
from solvers.problem import Choice, Op

SMALL_OPS = 200
TINY_FRACTION = 1 / 20_000
REPAIRS = 30
SHARING_ROUNDS = 4  # in which ops choose by what others chose before


def evaluate(tables: Tables, decisions: Decisions) -> State:
    """Decode and measure. Raises DecodeError."""
    return State(decisions, *traced(tables, decisions))


def first_decisions(tables: Tables) -> Decisions:
    """Keep everything, run every op in its fastest way; persistent storages in memory. What a way reads of an optional op's counts with that op's
    time, shared among those who read it: a way without it may be faster than the op alone says."""
    ops = tables.problem.ops
    made = {s: min(choice.time_us for choice in op.choices) for op in ops if op.optional for s in op.creates}
    fastest = [_fastest(op, op.choices[0], {}, Counter()) for op in ops]
    choosing = [o for o, op in enumerate(ops) if any(s in made for choice in op.choices for s in choice.reads)]
    for _ in range(SHARING_ROUNDS):
        readers = Counter(s for op, k in zip(ops, fastest, strict=True) for s in set(op.choices[k].reads) if s in made)
        before = list(fastest)
        for o in choosing:
            fastest[o] = _fastest(ops[o], ops[o].choices[before[o]], made, readers)
        if fastest == before:
            break
    return Decisions(fastest)


def _fastest(op: Op, now: Choice, made: Mapping[int, int], readers: Counter[int]) -> int:
    """The op's fastest way with its share of what makes what it reads; `now` is the way in which it was counted among the readers."""

    def whole_us(k: int) -> tuple[float, int]:
        choice = op.choices[k]
        return choice.time_us + sum(made[s] / (readers[s] + (s not in now.reads)) for s in set(choice.reads) if s in made), k

    return min(range(len(op.choices)), key=whole_us)


def descend(tables: Tables, transfer_weight: float, choice: list[int] | None = None, patience: int = 12) -> Iterator[State]:
    """States of falling peak, from keep-all on; ends where nothing helps for `patience` rounds.

    transfer_weight: what an overlapped transfer counts, as a fraction of its duration. choice: for every op the way to begin with; the
    fastest without it.
    """
    small = len(tables.problem.ops) <= SMALL_OPS
    state = evaluate(tables, Decisions(list(choice)) if choice else first_decisions(tables))
    yield state
    rates = Rates(transfer_weight, 0 if small else int(state.profile.peak_bytes * TINY_FRACTION))
    rates.price_us_per_byte = 0.01 * (state.profile.compute_us + 1) / (state.profile.peak_bytes + 1)
    best, idle = state.profile.peak_bytes, 0
    least = working_set(tables.problem)[0]
    while idle < patience and best > least:
        peak = state.profile.peak_bytes
        target = peak - 1 if small else int(peak * (0.96 if idle == 0 else 0.99))
        following = next_state(tables, state, target, rates)
        if following is None and rates.tiny_bytes:
            rates.tiny_bytes = rates.tiny_bytes // 30 if rates.tiny_bytes > 1000 else 0
            continue
        if following is None:
            break
        state = following
        idle = 0 if state.profile.peak_bytes < best else idle + 1
        best = min(best, state.profile.peak_bytes)
        yield state


def next_state(tables: Tables, state: State, target_bytes: int, rates: Rates) -> State | None:
    """One round. Storages that turn out not to be recomputable are noted in rates.lost, and the round is repeated."""
    while True:
        decisions = Round(tables, state, target_bytes, rates).run()
        if decisions is None:
            return None
        try:
            return evaluate(tables, decisions)
        except DecodeError as error:
            if error.storage in rates.lost:
                return None
            rates.lost.add(error.storage)


def repaired(
    tables: Tables, decisions: Decisions, weight: float, storages: frozenset[int] = frozenset(), ops: frozenset[int] = frozenset()
) -> State | None:
    """The state of the decisions, with evictions where it exceeds the budget; None if that fails. weight: of transfers. What is evicted is none of
    the storages, and none of the ops runs in another way."""
    budget_bytes = tables.problem.budget_bytes
    try:
        current = evaluate(tables, decisions)
    except DecodeError:
        return None
    tiny_bytes = 0 if len(tables.problem.ops) <= SMALL_OPS else int(budget_bytes * TINY_FRACTION)
    rates = Rates(weight, tiny_bytes, kept_storages=storages, kept_ops=ops)
    for _ in range(REPAIRS):
        if current.profile.peak_bytes <= budget_bytes:
            return current
        following = next_state(tables, current, budget_bytes, rates)
        if following is None:
            return None
        current = following
    return None
