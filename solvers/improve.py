"""Make a plan faster inside its budget: take evictions back where memory allows, and large-neighbourhood search."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from solvers.closure import Rates
from solvers.decode import RUN, Decisions, DecodeError, Tables, Trace
from solvers.evict import State
from solvers.greedy import SMALL_OPS, TINY_FRACTION, evaluate, next_state
from solvers.transfers import HORIZONS, best_walk

Judge = Callable[[State], float]  # less is better
JUDGED = (0.06,)  # horizons of transfers.py, for problems that aren't small
REFILL_OPS = 100_000  # ops decoded per refill round, roughly


@dataclass(frozen=True, slots=True)
class Undo:
    """One decision that could be taken back: bytes more in events first..last, microseconds saved. storage: that of a cut (at the boundary), a home
    or a spill; ways: (op, way) of each op that would run in another way."""

    kind: str  # "cut", "away", "spill" or "ways"
    size_bytes: int
    spans: tuple[tuple[int, int], ...]
    saved_us: float
    storage: int = -1
    boundary: int = -1
    ways: tuple[tuple[int, int], ...] = ()

    def apply(self, decisions: Decisions) -> None:
        """Take the decision back in place."""
        if self.kind == "cut":
            if self.boundary in decisions.cuts.get(self.storage, ()):
                decisions.uncut(self.storage, self.boundary)
        elif self.kind == "away":
            decisions.away.discard(self.storage)
        elif self.kind == "spill":
            decisions.spilled.discard(self.storage)
        for op, way in self.ways:
            decisions.choice[op] = way


def score(state: State, transfer_weight: float) -> float:
    """Estimated microseconds: compute, and the part of the transfers that isn't hidden."""
    profile = state.profile
    return profile.compute_us + transfer_weight * profile.transfer_us + 1e-3 * len(state.trace.kind)


def placed_us(tables: Tables) -> Judge:
    """Judges by both clocks: the microseconds with transfers placed. The state fits the budget."""
    horizons = HORIZONS if len(tables.problem.ops) <= SMALL_OPS else JUDGED
    return lambda state: best_walk(tables, state, horizons).time_us + 1e-3 * len(state.trace.kind)


def estimated_us(weight: float) -> Judge:
    return lambda state: score(state, weight)


def refill(tables: Tables, state: State, weight: float, deadline: float = float("inf"), rounds: int = 3, judge: Judge | None = None) -> State:
    """Take decisions back, most microseconds per byte first, as long as the peak stays within the budget and the judge (the estimate with this
    weight) says that it helps."""
    judge = judge or estimated_us(weight)
    for _ in range(rounds):
        fitting = _fitting(tables, state, undos(tables, state, weight))
        trials = _Trials(judge, judge(state), deadline, trials_of(tables))
        better = _try(tables, state, fitting, trials) if fitting else state
        if better is state:
            break
        state = better
    return state


def trials_of(tables: Tables) -> int:
    """How many trials a round may take without a clock: fewer where each takes longer."""
    return REFILL_OPS // (len(tables.reads) + 1) + 8


def undos(tables: Tables, state: State, weight: float) -> list[Undo]:
    """Every decision that could be taken back, by saved time per byte and event, best first."""
    found = [*_undo_cuts(tables, state, weight), *_undo_away(tables, state, weight), *_undo_choices(tables, state)]
    found += [*_undo_spills(tables, state, weight), *_undo_sharing(tables, state)]
    return sorted(found, key=lambda undo: -undo.saved_us / (undo.size_bytes + 1))


def _undo_cuts(tables: Tables, state: State, weight: float) -> list[Undo]:
    """A cut between two instances of a storage: the first would stay live until the second begins."""
    trace, cuts = state.trace, state.decisions.cuts
    previous: dict[int, int] = {}
    written = set(trace.writes)
    result = []
    for i, storage in enumerate(trace.inst_storage):
        before, birth = previous.get(storage), trace.inst_birth[i]
        previous[storage] = i
        if before is None or storage not in cuts:
            continue
        last, end = trace.inst_last[before], trace.group[birth]
        start = trace.group[last] if last >= 0 else -1
        saved = _rebirth_us(tables, state, birth) * (weight if trace.kind[birth] != RUN else 1.0)
        saved += weight * tables.write_us[storage] if before in written else 0
        for boundary in cuts[storage]:
            if start < boundary <= end:
                result.append(Undo("cut", tables.size[storage], ((last + 1, birth - 1),), saved, storage, boundary))
    return result


def _rebirth_us(tables: Tables, state: State, event: int) -> int:
    subject = state.trace.subject[event]
    if state.trace.kind[event] != RUN:
        return tables.read_us[subject]
    return tables.problem.ops[subject].choices[state.decisions.choice[subject]].time_us


def _undo_away(tables: Tables, state: State, weight: float) -> list[Undo]:
    """A persistent storage would be in memory before its first and after its last event."""
    trace, count = state.trace, len(state.trace.kind)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, storage in enumerate(trace.inst_storage):
        first.setdefault(storage, trace.inst_birth[i])
        last[storage] = trace.inst_last[i]
    result = []
    for storage in sorted(state.decisions.away):
        spans = ((0, first.get(storage, count) - 1), (last.get(storage, count) + 1, count - 1))
        saved = tables.read_us[storage] + (tables.write_us[storage] if storage in tables.written else 0)
        result.append(Undo("away", tables.size[storage], spans, weight * saved, storage))
    return result


def _undo_spills(tables: Tables, state: State, weight: float) -> list[Undo]:
    """A storage would be recomputed where it is read from disk now. What its inputs take shows only when it is tried."""
    result = []
    for storage in sorted(state.decisions.spilled):
        producer = tables.created_by[storage]
        if producer < 0 or not tables.problem.ops[producer].rerunnable:
            continue
        again = tables.problem.ops[producer].choices[state.decisions.choice[producer]].time_us
        saved = weight * (tables.read_us[storage] + tables.write_us[storage]) - again
        if saved > 0:
            result.append(Undo("spill", 0, (), saved, storage))
    return result


def _undo_choices(tables: Tables, state: State) -> list[Undo]:
    """An op would run in a faster way with more workspace, at all its events."""
    events: dict[int, list[int]] = {}
    slow = {op for op, k in enumerate(state.decisions.choice) if _faster(tables, op, k)}
    for event, (kind, subject) in enumerate(zip(state.trace.kind, state.trace.subject, strict=True)):
        if kind == RUN and subject in slow:
            events.setdefault(subject, []).append(event)
    result = []
    for op, at in events.items():
        choices, now = tables.problem.ops[op].choices, state.decisions.choice[op]
        for k in _faster(tables, op, now):
            more = choices[k].workspace_bytes - choices[now].workspace_bytes
            more += sum(tables.size[s] for s in choices[k].reads) - sum(tables.size[s] for s in choices[now].reads)
            saved = (choices[now].time_us - choices[k].time_us) * len(at)
            result.append(Undo("ways", max(0, more), tuple((e, e) for e in at), saved, ways=((op, k),)))
    return result


def _undo_sharing(tables: Tables, state: State) -> list[Undo]:
    """What an optional op makes would not be made here: those who read it have ways without it that together take less than the op."""
    trace, choice, ops = state.trace, state.decisions.choice, tables.problem.ops
    runs = [(event, op) for event, (kind, op) in enumerate(zip(trace.kind, trace.subject, strict=True)) if kind == RUN]
    readers: dict[int, list[tuple[int, int]]] = {}
    for event, op in runs:
        for storage in ops[op].choices[choice[op]].reads:
            if tables.created_by[storage] >= 0 and ops[tables.created_by[storage]].optional:
                readers.setdefault(storage, []).append((event, op))
    result = []
    for i, storage in enumerate(trace.inst_storage):
        maker, birth, last = tables.created_by[storage], trace.inst_birth[i], trace.inst_last[i]
        served = [(event, op) for event, op in readers.get(storage, ()) if birth < event <= last]
        ways = tuple((op, way) for _, op in served if (way := _without(tables, op, storage)) is not None)
        if not served or len(ways) < len(served):
            continue
        slower = sum(ops[op].choices[way].time_us - ops[op].choices[choice[op]].time_us for op, way in ways)
        saved = ops[maker].choices[choice[maker]].time_us - slower
        if saved > 0:
            more = max(ops[op].choices[way].workspace_bytes for op, way in ways) - tables.size[storage]
            result.append(Undo("ways", max(0, more), tuple((event, event) for event, _ in served), saved, ways=ways))
    return result


def _without(tables: Tables, op: int, storage: int) -> int | None:
    """The op's fastest way that does not read the storage."""
    choices = tables.problem.ops[op].choices
    others = [way for way, choice in enumerate(choices) if storage not in choice.reads]
    return min(others, key=lambda way: (choices[way].time_us, way), default=None)


def _faster(tables: Tables, op: int, now: int) -> list[int]:
    choices = tables.problem.ops[op].choices
    return [k for k, choice in enumerate(choices) if choice.time_us < choices[now].time_us]


def _fitting(tables: Tables, state: State, undos: list[Undo]) -> list[Undo]:
    """Those that fit together by the estimate, chosen in the given order."""
    slack = tables.problem.budget_bytes - state.profile.live_bytes
    chosen = []
    for undo in undos:
        if all(slack[a : b + 1].min(initial=undo.size_bytes) >= undo.size_bytes for a, b in undo.spans):
            for a, b in undo.spans:
                slack[a : b + 1] -= undo.size_bytes
            chosen.append(undo)
    return chosen


@dataclass(slots=True)
class _Trials:
    """How trials are judged, what the best state is worth, and how many more there may be."""

    judge: Judge
    least: float
    deadline: float
    left: int


def _try(tables: Tables, state: State, undos: list[Undo], trials: _Trials) -> State:
    """Take all back together; where that doesn't help, each half in turn."""
    if time.monotonic() > trials.deadline or trials.left <= 0:
        return state
    trials.left -= 1
    decisions = state.decisions.copy()
    for undo in undos:
        undo.apply(decisions)
    try:
        changed = evaluate(tables, decisions)
        if changed.profile.peak_bytes <= tables.problem.budget_bytes and (value := trials.judge(changed)) < trials.least:
            trials.least = value
            return changed
    except DecodeError:
        pass
    if len(undos) > 1:
        state = _try(tables, state, undos[: len(undos) // 2], trials)
        state = _try(tables, state, undos[len(undos) // 2 :], trials)
    return state


def search(
    tables: Tables,
    state: State,
    weight: float,
    deadline: float,
    rounds: int,
    seed: int,
    progress: Callable[[str], None] | None = None,
    judge: Judge | None = None,
) -> State:
    """Large-neighbourhood search: take back a random part of the decisions, evict again, refill; keep what the judge finds better."""
    draw, judge = random.Random(seed), judge or estimated_us(weight)
    least = judge(state)
    for number in range(rounds):
        if time.monotonic() > deadline:
            break
        candidate = _restart(tables, state, weight, deadline, draw, judge)
        if candidate is not None and (value := judge(candidate)) < least:
            state, least = candidate, value
            if progress:
                progress(f"search {number}: {least / 1e6:.4f} s")
    return state


def _restart(tables: Tables, state: State, weight: float, deadline: float, draw: random.Random, judge: Judge) -> State | None:
    """A neighbour within the budget, or None."""
    budget, small = tables.problem.budget_bytes, len(tables.problem.ops) <= SMALL_OPS
    rate = (state.profile.compute_us + 1) / (state.profile.peak_bytes + 1)
    rates = Rates(weight, 0 if small else int(budget * TINY_FRACTION), rate * draw.choice([1e-3, 0.1, 1.0, 10.0]))
    decisions = _perturbed(tables, state.decisions, state.trace, draw)
    try:
        current = evaluate(tables, decisions)
    except DecodeError:
        return None
    for _ in range(40):
        if current.profile.peak_bytes <= budget:
            return refill(tables, current, weight, deadline, 1, judge)
        if time.monotonic() > deadline:
            return None
        target = max(budget, current.profile.peak_bytes - 1 if small else int(current.profile.peak_bytes * 0.9))
        following = next_state(tables, current, target, rates)
        if following is None:
            return None
        current = following
    return None


def _perturbed(tables: Tables, decisions: Decisions, trace: Trace, draw: random.Random) -> Decisions:
    """Forget a random part: the cuts of a window of boundaries, or of some storages; some homes; some choices."""
    result = decisions.copy()
    count, share = len(tables.problem.ops), draw.choice([0.1, 0.3, 0.6])
    low = draw.uniform(-share, 1.0) * count
    window = draw.random() < 0.5
    for storage, boundaries in decisions.cuts.items():
        for boundary in boundaries:
            if (low <= boundary <= low + share * count) if window else draw.random() < share:
                result.uncut(storage, boundary)
    for storage in sorted(decisions.spilled):
        if draw.random() < share:
            result.spilled.discard(storage)
    for storage in sorted(decisions.away):
        if draw.random() < share:
            result.away.discard(storage)
    fastest = [min(range(len(op.choices)), key=lambda k: (op.choices[k].time_us, k)) for op in tables.problem.ops]
    result.choice = [best if draw.random() < share else now for best, now in zip(fastest, result.choice, strict=True)]
    return result
