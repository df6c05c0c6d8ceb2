"""Ways to break a valid schedule. Each kind is named after the rule that it breaks, and yields
(position-independent) mutants: (problem, schedule) pairs that check must reject under exactly that name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from solvers.check import replay
from solvers.problem import Problem
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Step, Wait

Mutant = tuple[Problem, Schedule]


class Base:
    """A valid schedule and, before every step, what is live and which transfers are pending."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem, self.schedule, self.steps = problem, schedule, schedule.steps
        self.live: list[set[int]] = []
        self.pending: list[set[int]] = []
        self.copied: list[set[int]] = []
        homes = {
            s for s, i in enumerate(problem.storages) if i.persistent and (not i.movable or s in schedule.resident)
        }
        live, pending = set(homes), set[int]()
        copied = {s for s, i in enumerate(problem.storages) if i.persistent and (i.stored or s not in homes)}
        for step in (*self.steps, None):
            self.live.append(set(live))
            self.pending.append(set(pending))
            self.copied.append(set(copied))
            if isinstance(step, Run):
                live.update(problem.ops[step.op].creates)
            elif isinstance(step, Free):
                live.discard(step.storage)
            elif isinstance(step, Wait):
                pending.discard(step.storage)
            elif step is not None:
                live.add(step.storage)
                copied.add(step.storage)
                pending.add(step.storage)

    def insert(self, at: int, *steps: Step) -> Mutant:
        return self.problem, replace(self.schedule, steps=(*self.steps[:at], *steps, *self.steps[at:]))

    def delete(self, at: int) -> Mutant:
        return self.problem, replace(self.schedule, steps=(*self.steps[:at], *self.steps[at + 1 :]))

    def runs(self) -> Iterator[tuple[int, Run]]:
        return ((k, step) for k, step in enumerate(self.steps) if isinstance(step, Run))

    def uses(self, step: Step, storage: int) -> bool:
        if not isinstance(step, Run):
            return False
        op = self.problem.ops[step.op]
        return storage in op.choices[step.choice].reads or storage in op.writes

    def may_be_written(self, storage: int) -> bool:
        info = self.problem.storages[storage]
        return info.movable and self.problem.can_offload and not info.stored

    def pinned(self, storage: int) -> bool:
        info = self.problem.storages[storage]
        return info.persistent and not info.movable


def not_live(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        for s in b.problem.ops[step.op].choices[step.choice].reads:
            if not b.pinned(s) and s not in b.pending[at]:
                yield b.insert(at, Free(s))


def in_flight(b: Base) -> Iterator[Mutant]:
    for at, step in enumerate(b.steps):
        if isinstance(step, Wait) and step.storage in b.pending[at]:
            issued = max(k for k in range(at) if b.steps[k] in (Offload(step.storage), Prefetch(step.storage)))
            rest = [
                s for s in b.steps[at + 1 :] if b.uses(s, step.storage) or getattr(s, "storage", -1) == step.storage
            ]
            if isinstance(b.steps[issued], Prefetch) and rest and isinstance(rest[0], Run):
                yield b.delete(at)


def stale_version(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        op = b.problem.ops[step.op]
        if op.writes and op.rerunnable:
            yield b.insert(at + 1, step)


def write_in_flight(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        for s in b.problem.ops[step.op].writes:
            if b.may_be_written(s) and s not in b.pending[at]:
                yield b.insert(at, Offload(s))


def useless_run(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        op = b.problem.ops[step.op]
        if op.rerunnable and not op.writes and op.creates:
            yield b.insert(at + 1, step)


def rerun_forbidden(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        if not b.problem.ops[step.op].rerunnable:
            yield b.insert(at + 1, step)


def rng_order(b: Base) -> Iterator[Mutant]:
    first: dict[int, int] = {}
    for at, step in b.runs():
        if b.problem.ops[step.op].rng:
            first.setdefault(step.op, at)
    for early, late in zip(list(first), list(first)[1:], strict=False):
        op, between = b.problem.ops[early], b.steps[first[early] + 1 : first[late] + 1]
        made, read = {*op.creates, *op.writes}, {r for c in op.choices for r in c.reads}
        calm = not any(
            getattr(step, "storage", -1) in made | read
            or (isinstance(step, Run) and made & {r for c in b.problem.ops[step.op].choices for r in c.reads})
            or (isinstance(step, Run) and made & set(b.problem.ops[step.op].writes))
            for step in between
        )
        if calm:
            problem, shorter = b.delete(first[early])
            steps, at = shorter.steps, first[late]
            yield problem, replace(shorter, steps=(*steps[:at], b.steps[first[early]], *steps[at:]))


def missing_op(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        op = b.problem.ops[step.op]
        if not op.creates and not op.writes:
            yield b.delete(at)


def unknown_id(b: Base) -> Iterator[Mutant]:
    far = len(b.problem.storages) + len(b.problem.ops)
    for at in range(len(b.steps) + 1):
        for step in (Run(far), Run(-1), Free(far), Offload(-1), Prefetch(far), Wait(far)):
            yield b.insert(at, step)


def bad_choice(b: Base) -> Iterator[Mutant]:
    for at, step in b.runs():
        yield b.insert(at, Run(step.op, len(b.problem.ops[step.op].choices)))
        yield b.insert(at, Run(step.op, -1))


def free_not_live(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        for s in set(range(len(b.problem.storages))) - b.live[at]:
            yield b.insert(at, Free(s))


def free_in_flight(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        yield from (b.insert(at, Free(s)) for s in b.pending[at])


def free_pinned(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        yield from (b.insert(at, Free(s)) for s in b.live[at] if b.pinned(s))


def offload_not_live(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        yield from (b.insert(at, Offload(s)) for s in set(range(len(b.problem.storages))) - b.live[at])


def offload_not_movable(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        for s in b.live[at] - b.pending[at]:
            if not b.problem.storages[s].movable or not b.problem.can_offload:
                yield b.insert(at, Offload(s))


def offload_stored(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        for s in b.live[at] - b.pending[at]:
            if b.problem.storages[s].stored and b.problem.can_offload:
                yield b.insert(at, Offload(s))


def transfer_pending(b: Base) -> Iterator[Mutant]:
    if b.problem.can_offload:
        for at in range(len(b.steps) + 1):
            yield from (b.insert(at, Offload(s)) for s in b.pending[at] if b.may_be_written(s))


def prefetch_live(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        yield from (b.insert(at, Prefetch(s)) for s in b.live[at])


def prefetch_no_copy(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        for s in set(range(len(b.problem.storages))) - b.live[at] - b.copied[at]:
            yield b.insert(at, Prefetch(s))


def wait_nothing(b: Base) -> Iterator[Mutant]:
    for at in range(len(b.steps) + 1):
        for s in set(range(len(b.problem.storages))) - b.pending[at]:
            yield b.insert(at, Wait(s))


def end_in_flight(b: Base) -> Iterator[Mutant]:
    for s in b.live[-1]:
        if b.may_be_written(s):
            yield b.insert(len(b.steps), Offload(s))


def bad_resident(b: Base) -> Iterator[Mutant]:
    for s, info in enumerate(b.problem.storages):
        if not info.persistent:
            yield b.problem, replace(b.schedule, resident=b.schedule.resident | {s})


def end_output(b: Base) -> Iterator[Mutant]:
    for s in b.live[-1]:
        if b.problem.storages[s].output:
            yield b.insert(len(b.steps), Free(s))


def end_home(b: Base) -> Iterator[Mutant]:
    for s in b.schedule.resident:
        yield b.insert(len(b.steps), Free(s))
    for s, info in enumerate(b.problem.storages):
        if info.persistent and s not in b.live[-1]:
            yield b.insert(len(b.steps), Prefetch(s), Wait(s))


def end_leak(b: Base) -> Iterator[Mutant]:
    for s, info in enumerate(b.problem.storages):
        frees = [k for k, step in enumerate(b.steps) if step == Free(s)]
        if frees and not info.persistent and not info.output:
            yield b.delete(frees[-1])


def over_budget(b: Base) -> Iterator[Mutant]:
    peak = replay(b.problem, b.schedule, enforce_budget=False).peak_bytes
    if peak:
        yield b.problem.with_budget(peak - 1), b.schedule
        yield b.problem.with_budget(peak // 2), b.schedule


KINDS: dict[str, Callable[[Base], Iterator[Mutant]]] = {
    kind.__name__.replace("_", "-"): kind
    for kind in (
        not_live, in_flight, stale_version, write_in_flight, useless_run, rerun_forbidden, rng_order, missing_op,
        unknown_id, bad_choice, free_not_live, free_in_flight, free_pinned, offload_not_live, offload_not_movable,
        offload_stored,
        transfer_pending, prefetch_live, prefetch_no_copy, wait_nothing, end_in_flight, bad_resident, end_output,
        end_home, end_leak, over_budget,
    )
}  # fmt: skip


def shuffled(base: Base, draw: random.Random) -> Mutant:
    """A random edit that may or may not break something: delete, swap, repeat, or insert a random step."""
    steps, kind = list(base.steps), draw.randrange(4)
    a, b = draw.randrange(len(steps)), draw.randrange(len(steps))
    if kind == 0:
        del steps[a]
    elif kind == 1:
        b = min(len(steps) - 1, a + draw.randint(1, 3))
        steps[a], steps[b] = steps[b], steps[a]
    elif kind == 2:
        steps.insert(b, steps[a])
    else:
        storage = draw.randrange(len(base.problem.storages))
        steps.insert(b, draw.choice([Free, Offload, Prefetch, Wait])(storage))
        if draw.random() < 0.5:
            steps.insert(b + 1, Wait(storage))
    return base.problem, replace(base.schedule, steps=tuple(steps))
