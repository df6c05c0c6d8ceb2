"""Plan: Graph and costs -> Problem -> schedule -> offsets. Torch-free; costs come as a plain table.

The footprint that the budget bounds is  arena + allocator(t) + workspace(t) + constant  at every step t of the schedule: storages placed in
the arena cost its whole size all the time, the others their bytes while they live. `solvers.check` proves the storages, `place` the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import solvers
from mebp_compile.config import format_bytes
from mebp_compile.errors import BudgetError, BudgetInfeasible, GraphError
from mebp_compile.graph import CHUNKS, PERSISTENT, Graph, Op, Value
from mebp_compile.nondeterministic import same_again
from mebp_compile.overhead import MAPPED_BYTES, charged_sizes, constant_overhead, fault_us, mapped_bytes
from mebp_compile.place import Placement, lives, place_under
from solvers import Problem, Report, Schedule, Solution, baselines
from solvers.bounds import roofline_us, working_set

MANY_FAULTS = 0.02  # of a step's time, from which on schedules with fewer of them are looked for
ROOM_SHARES = (0.97, 0.9, 0.8)
ROOMY = 1.25

MOVABLE = ("weight", "parameter", "optimizer")  # roles whose home may be the disk, see `homes`
SMALLEST_HOME_BYTES = 1024  # a transfer of less costs more than it frees


@dataclass(frozen=True)
class OpCost:
    """Measured cost of one op on this machine."""

    time_us: int
    workspace_bytes: int = 0


@dataclass(frozen=True)
class Costs:
    """Costs by op name, and the speed of the disk. `measured` is False where they are estimates.

    kernel_bytes: what the ops leave behind for good in the process that runs them (compiled code of matmuls).
    """

    ops: Mapping[str, OpCost]
    read_bytes_per_us: float = 1000.0
    write_bytes_per_us: float = 500.0
    latency_us: int = 100
    interference: float = 0.0
    kernel_bytes: int = 0
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """A schedule proven by replay, where each storage lies, and what both promise.

    peak_bytes: what the meters will show at most (tensors, workspace, arena padding, all inside the budget).
    tensor_bytes: the largest sum of storages alone. keep_all_*: the same step without any recompute or offload. faults_us: what the schedule
    does not know, the page faults of what the arena gives back and of large storages that have no place in it.
    """

    problem: Problem
    schedule: Schedule
    report: Report
    placement: Placement
    peak_bytes: int
    tensor_bytes: int
    keep_all_bytes: int
    keep_all_time_us: int
    bound_us: int
    faults_us: int = 0
    method: str = ""
    solve_seconds: float = 0.0

    @property
    def time_us(self) -> int:
        return self.report.time_us + self.faults_us

    @property
    def gap(self) -> float:
        """Proven relative distance of the schedule's time to the bound."""
        return self.time_us / self.bound_us - 1 if self.bound_us else 0.0


def build_problem(
    graph: Graph,
    costs: Costs,
    budget_bytes: int,
    offload: bool,
    grads: str = "keep",
    movable: Sequence[str] = MOVABLE,
    host_bytes: int | None = None,
) -> Problem:
    """The scheduling problem of a graph, in its order: every storage with the bytes charged for it (`overhead`), every op with its cost.
    host_bytes: of an accelerator's host, for what leaves its memory."""
    outputs = {graph.storage_of(name) for path, name in graph.results if grads == "keep" or not path.startswith("gradient:")}
    may_leave = homes(graph, offload, grads, movable)
    charged = charged_sizes(graph, may_leave)
    storages = tuple(
        solvers.Storage(
            storage.name,
            charged[index],
            persistent=storage.role in PERSISTENT,
            movable=index in may_leave if storage.role in PERSISTENT else storage.size_bytes > 0 and offload and not storage.on_host,
            output=index in outputs and storage.role not in PERSISTENT,
            stored=storage.role == "weight" and index in may_leave,
        )
        for index, storage in enumerate(graph.storages)
    )
    used = {storage for op in graph.ops for storage in (*op.reads, *op.writes, *op.creates, *(s for c in op.menu for s in c.reads))}
    storages = tuple(
        storage if index in used else _unused(storage, graph.storages[index].role in ("parameter", "optimizer"))
        for index, storage in enumerate(storages)
    )
    problem = Problem(
        ops=tuple(_op(op, costs.ops.get(op.name, OpCost(1)), graph.device) for op in graph.ops),
        storages=storages,
        budget_bytes=budget_bytes,
        constant_bytes=constant_overhead(graph),
        read_bytes_per_us=costs.read_bytes_per_us,
        write_bytes_per_us=costs.write_bytes_per_us,
        latency_us=costs.latency_us,
        interference=costs.interference,
        can_offload=offload,
        away_limit_bytes=host_bytes,
        name=graph.name,
    )
    problem.validate()
    return problem


def _unused(storage: solvers.Storage, keeps_home: bool) -> solvers.Storage:
    """A storage that no op touches: a number, or state that this step does not need, which may still be on disk."""
    size_bytes = storage.size_bytes if storage.persistent else 0
    return replace(storage, size_bytes=size_bytes, movable=storage.movable and keeps_home, persistent=True, output=False, stored=False)


def homes(graph: Graph, offload: bool, grads: str = "keep", roles: Sequence[str] = MOVABLE) -> frozenset[int]:
    """Persistent storages that need not be in memory between steps: packed weights; with `offload`, parameters and optimizer state.

    A parameter or entry of optimizer state qualifies if it is one tensor that fills its storage alone (no view, no slice of a flat buffer),
    is not itself a result of the step, and has no gradient outside the step (`.grad` can't lie in memory when its parameter does not).
    """
    results = {graph.storage_of(name) for _, name in graph.results}
    gradients = {storage.source for storage in graph.storages if storage.role == "gradient"}
    gradients |= {path for path, _ in graph.results if grads == "keep" and path.startswith("gradient:")}
    holders: dict[int, list[str]] = {}
    for name in graph.inputs:
        holders.setdefault(graph.storage_of(name), []).append(name)
    chosen = set()
    for index, storage in enumerate(graph.storages):
        if storage.role == "weight" and "weight" in roles and storage.size_bytes > 0:
            chosen.add(index)
        kind, _, name = storage.source.partition(":")
        if not offload or storage.on_host or storage.role not in roles or kind not in ("parameter", "optimizer") or index in results:
            continue
        alone = len(holders.get(index, ())) == 1 and _fills(graph.value[holders[index][0]], storage.size_bytes)
        if alone and storage.size_bytes >= SMALLEST_HOME_BYTES and not (kind == "parameter" and f"gradient:{name}" in gradients):
            chosen.add(index)
    return frozenset(chosen)


def _fills(value: Value, size_bytes: int) -> bool:
    """Whether the tensor covers its whole storage without gaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(value.shape, value.stride, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    digits = "".join(letter for letter in value.dtype.split("_")[0] if letter.isdigit())
    return value.offset == 0 and expected * (int(digits) // 8 if digits else 1) == size_bytes


def _op(op: Op, cost: OpCost, device: str) -> solvers.Op:
    plain = solvers.Choice(op.reads, cost.workspace_bytes, max(1, cost.time_us))
    loops = tuple(
        solvers.Choice(choice.reads, choice.workspace_bytes, max(1, choice.time_us), choice.trips, choice.disk_bytes) for choice in op.menu
    )
    optional = op.target == "run.dequantise"  # its readers may all take choices that read the packed weight
    again = same_again(op.target, device) and op.target != "run.table_rows"  # which reads what lies on disk as it was before the step
    return solvers.Op(op.name, (plain, *loops), op.creates, op.writes, op.rng, again, op.phase, op.module, optional)


def make_plan(
    graph: Graph,
    problem: Problem,
    effort: str = "balanced",
    time_limit_s: float = 20.0,
    hints: Sequence[Plan] = (),
    advice: str = "",
    tell: Callable[[str], None] | None = None,
    solver: str | None = None,
) -> Plan:
    """Solve, check, place. `hints`: plans of smaller budgets, than which this one is never slower. `solver` names a fixed schedule of
    `solvers.baselines` instead, whatever the effort.

    Raises BudgetInfeasible, naming the smallest budget found, its lower bound and the op that binds.
    """
    started = time.monotonic()
    try:
        solution = _fixed(problem, solver) if solver else _solved(problem, effort, time_limit_s, hints, tell)
    except solvers.Infeasible as error:
        raise _refusal(graph, problem, error, advice) from None
    placement = place_under(graph, problem, solution.schedule)
    if not solver and faults_us(graph, problem, solution.schedule, placement) > MANY_FAULTS * solution.report.time_us:
        solution, placement = _with_room(graph, problem, solution, placement, effort, time_limit_s, tell)
    own_us = solution.report.time_us + faults_us(graph, problem, solution.schedule, placement)
    faster = [hint for hint in hints if hint.time_us < own_us and max(hint.peak_bytes, hint.report.peak_bytes) <= problem.budget_bytes]
    if faster:
        best = min(faster, key=lambda hint: hint.time_us)
        solution, placement = replace(solution, schedule=best.schedule, report=best.report, method="hint"), best.placement
    report = solvers.replay(problem, solution.schedule)
    if placement.peak_bytes > problem.budget_bytes:
        message = f"the placement needs {placement.peak_bytes:,} bytes, the budget is {problem.budget_bytes:,}"
        raise GraphError(message, "report this problem: `step.save` writes it")
    everything = solvers.replay(problem, baselines.keep_all(problem), enforce_budget=False)
    return Plan(
        problem=problem,
        schedule=solution.schedule,
        report=report,
        placement=placement,
        peak_bytes=placement.peak_bytes,
        tensor_bytes=tensor_peak(graph, problem, solution.schedule),
        keep_all_bytes=everything.peak_bytes,
        keep_all_time_us=everything.time_us,
        bound_us=int(solution.bound_us),
        faults_us=faults_us(graph, problem, solution.schedule, placement),
        method=solution.method,
        solve_seconds=time.monotonic() - started,
    )


def _fixed(problem: Problem, solver: str) -> solvers.Solution:
    """A schedule that is the same whatever the budget. Raises Infeasible where it needs more."""
    schedule: Schedule = getattr(baselines, solver)(problem)
    report = solvers.replay(problem, schedule, enforce_budget=False)
    if report.peak_bytes > problem.budget_bytes:
        raise solvers.Infeasible(report.peak_bytes, *working_set(problem))
    if problem.away_limit_bytes is not None and report.away_bytes > problem.away_limit_bytes:
        raise BudgetError(
            f'solver="{solver}" keeps {report.away_bytes:,} bytes in host memory, the budget has {problem.away_limit_bytes:,} there',
            f"Budget(device=..., host={report.away_bytes}), or leave solver out",
        )
    return solvers.Solution(schedule, report, roofline_us(problem), solver)


def is_tight(problem: Problem, placement: Placement) -> bool:
    """Whether RSS has to follow the bytes in use, for the whole process.

    Left to itself malloc keeps freed blocks, and RSS stood 13 to 20 % above what a step holds, or four budgets above where the budget is a few
    blocks. Blocks from `overhead.mapped_bytes` on are mapped and given back at once, at the price of their page faults; from 256 KiB on that was
    a fifth to a third of a step, from 4 MiB on next to nothing.
    """
    return placement.peak_bytes * ROOMY > problem.budget_bytes


def faults_us(graph: Graph, problem: Problem, schedule: Schedule, placement: Placement) -> int:
    """What fresh pages take in a step: those that the arena gives back, and where the budget is tight those of large storages that it has no
    place for. (Those of a Loop's tiles are in its price.)"""
    if graph.device or not is_tight(problem, placement):
        return 0
    again_bytes = sum(item.high - item.low for item in placement.decommits)
    outside = (life for life in lives(graph, problem, schedule) if life.start >= 0 and (life.start, life.storage) not in placement.offsets)
    least_bytes, own = mapped_bytes(problem.budget_bytes), schedule.resident  # what is at home in memory comes back into pages of its own
    return int(fault_us(again_bytes, 0) + sum(fault_us(life.size_bytes, MAPPED_BYTES if life.storage in own else least_bytes) for life in outside))


def _with_room(
    graph: Graph,
    problem: Problem,
    solution: Solution,
    placement: Placement,
    effort: str,
    time_limit_s: float,
    tell: Callable[[str], None] | None,
) -> tuple[Solution, Placement]:
    """Of the given schedule, the same with transfers that keep clear of what lies in the arena, and those of smaller budgets, the one of least
    time with its page faults: a schedule that fills memory to the last byte makes the arena give back many pages."""
    faults = faults_us(graph, problem, solution.schedule, placement)
    best = solution.report.time_us + faults
    for schedule, placed in _roomier(graph, problem, solution, effort, time_limit_s, tell):
        report = solvers.replay(problem, schedule)
        fewer = faults_us(graph, problem, schedule, placed)
        if placed.peak_bytes <= problem.budget_bytes and report.time_us + fewer < best:
            best, faults, placement = report.time_us + fewer, fewer, placed
            solution = replace(solution, schedule=schedule, report=report)
        if faults <= MANY_FAULTS * best:
            break
    return solution, placement


def _roomier(
    graph: Graph,
    problem: Problem,
    solution: Solution,
    effort: str,
    time_limit_s: float,
    tell: Callable[[str], None] | None,
) -> Iterator[tuple[Schedule, Placement]]:
    """Schedules that leave the arena more room, in the order in which they are tried."""
    fitted = solvers.fit_arena(problem, solution.schedule, own=False)  # time counts, and the budget
    if fitted.schedule is not solution.schedule:
        yield fitted.schedule, place_under(graph, problem, fitted.schedule, fitted.placement)
    for variant in (problem.with_budget(int(problem.budget_bytes * share)) for share in ROOM_SHARES):
        try:
            schedule = solvers.solve(variant, effort=effort, time_limit_s=time_limit_s, progress=tell).schedule
        except solvers.Infeasible:
            return
        yield schedule, place_under(graph, problem, schedule)


def _solved(
    problem: Problem, effort: str, time_limit_s: float, hints: Sequence[Plan], tell: Callable[[str], None] | None
) -> Solution:
    """The solver's own answer. It is told of hints only where it finds none: one would end the search once it is good enough, and what was made
    for less memory recomputes and moves more than it need."""
    try:
        return solvers.solve(problem, effort=effort, time_limit_s=time_limit_s, progress=tell)
    except solvers.Infeasible:
        if not hints:
            raise
        schedules = [hint.schedule for hint in hints]
        return solvers.solve(problem, effort=effort, time_limit_s=time_limit_s, hints=schedules, progress=tell)


def _refusal(graph: Graph, problem: Problem, error: solvers.Infeasible, advice: str) -> BudgetInfeasible:
    binds = f"op {error.binding_op}" if error.binding_op in {op.name for op in graph.ops} else f"the {error.binding_op}"
    fixes = (f"budget={error.smallest_found_bytes}", advice, "a shorter sequence or smaller batch", "offload=a folder on disk")
    return BudgetInfeasible(
        f"no schedule fits {format_bytes(problem.budget_bytes)}: the smallest budget found is {error.smallest_found_bytes:,} bytes "
        f"({format_bytes(error.smallest_found_bytes)}), nothing below {error.lower_bound_bytes:,} bytes can work, and {binds} binds",
        ", ".join(filter(None, fixes)),
        error.smallest_found_bytes,
        error.lower_bound_bytes,
        error.binding_op,
    )


def make_plans(
    graph: Graph, problem: Problem, budgets: Sequence[int], effort: str = "balanced", time_limit_s: float = 20.0
) -> list[Plan]:
    """One plan for each budget, in the order given. Predicted time never falls as the budget shrinks: a larger budget may do what a smaller
    one's schedule does. Raises BudgetInfeasible for the first, from the smallest on, that nothing fits."""
    plans: dict[int, Plan] = {}
    for budget_bytes in sorted(set(budgets)):
        plans[budget_bytes] = make_plan(graph, problem.with_budget(budget_bytes), effort, time_limit_s, tuple(plans.values()))
    return [plans[budget_bytes] for budget_bytes in budgets]


def tensor_peak(graph: Graph, problem: Problem, schedule: Schedule) -> int:
    """Largest sum of storages, to the byte: no overhead, and no workspace except that of Loops, whose tiles are tensors too."""
    bare = replace(
        problem,
        constant_bytes=0,
        storages=tuple(
            replace(charged, size_bytes=storage.size_bytes if charged.size_bytes else 0)
            for storage, charged in zip(graph.storages, problem.storages, strict=True)
        ),
        ops=tuple(
            op if own.target == CHUNKS else replace(op, choices=(replace(op.choices[0], workspace_bytes=0), *op.choices[1:]))
            for own, op in zip(graph.ops, problem.ops, strict=True)
        ),
    )
    return solvers.replay(bare, schedule, enforce_budget=False).peak_bytes
