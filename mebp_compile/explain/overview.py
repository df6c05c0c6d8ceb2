"""The whole step, or a module of it, in words and a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mebp_compile.config import format_bytes
from mebp_compile.errors import OptionError
from mebp_compile.explain.words import bytes_or_dash, close_matches, columns, count, duration, extra_time, outside, percent, proven_gap
from mebp_compile.graph import Graph
from mebp_compile.place import Life
from mebp_compile.planning import Plan
from mebp_compile.walk import GROUPS, Walk, common_prefix, forward_lines, group_of, layer_of, source_line, step_label, walk
from solvers import Offload, Run

TOP = 10


def summary(graph: Graph, plan: Plan) -> str:
    """A few lines: size of the step, budget and peak, time, and what the schedule does to get there."""
    return "\n".join(
        [
            f"training step {graph.name!r} (graph {graph.digest}): {len(graph.ops):,} ops, {len(graph.storages):,} storages, "
            f"{len(plan.schedule.steps):,} schedule steps",
            f"budget  {format_bytes(plan.problem.budget_bytes)}; peak {format_bytes(plan.peak_bytes)} "
            f"({percent(plan.peak_bytes, plan.problem.budget_bytes)} of it) {_peak_place(graph, plan)}",
            f"        keep-all would need {format_bytes(plan.keep_all_bytes)}",
            f"time    {duration(plan.time_us)} predicted, {extra_time(plan)}; {plan.method or 'schedule'}, {proven_gap(plan)}",
            f"how     {_means(graph, plan)}",
            *_host(plan),
        ]
    )


def _peak_place(graph: Graph, plan: Plan) -> str:
    number = plan.report.peak_step
    if not 0 <= number < len(plan.schedule.steps):
        return "before the first step"
    step = plan.schedule.steps[number]
    place = graph.ops[step.op] if isinstance(step, Run) else None
    where = f" ({place.phase}{': ' + place.module if place.module else ''})" if place else ""
    return f"at step {number}: {step_label(graph, step)}{where}"


def _host(plan: Plan) -> list[str]:
    limit = plan.problem.away_limit_bytes
    return [] if limit is None else [f"host    {format_bytes(plan.report.away_bytes)} of {format_bytes(limit)} for what leaves the device"]


def _means(graph: Graph, plan: Plan) -> str:
    report = plan.report
    if not (report.recomputes or report.offloads or report.prefetches):
        return "nothing is recomputed or moved: everything fits as it is"
    parts = []
    if report.recomputes:
        parts.append(f"{count(report.recomputes, 'recompute')} ({duration(_recompute_us(plan))})")
    if report.offloads:
        parts.append(f"{count(report.offloads, 'offload')} ({format_bytes(report.written_bytes)} written)")
    if report.prefetches:
        parts.append(f"{count(report.prefetches, 'prefetch', 'prefetches')} ({format_bytes(report.read_bytes)} read)")
    if report.offloads or report.prefetches:
        parts.append(f"{duration(report.stall_us)} spent waiting for the {outside(graph)}")
    return ", ".join(parts)


def _recompute_us(plan: Plan) -> int:
    ran: set[int] = set()
    total = 0
    for step in plan.schedule.steps:
        if isinstance(step, Run):
            total += plan.problem.ops[step.op].choices[step.choice].time_us if step.op in ran else 0
            ran.add(step.op)
    return total


def explain(graph: Graph, plan: Plan, module: str | None = None) -> str:
    """The budget, the time, what is in memory at the peak, and a line per layer (or, with `module`, per module inside it).

    `module` is a path or a run of its components ("layers.3.mlp"). Raises OptionError, with close matches, for a module without ops.
    """
    seen = walk(graph, plan)
    if module is not None:
        return "\n".join([f"module {module}", "", *_table(_rows(graph, plan, seen, module), "module"), "", LEGEND])
    parts = [summary(graph, plan), _arena(plan, seen), "", *_at_peak(graph, plan, seen), ""]
    return "\n".join([*parts, *_table(_rows(graph, plan, seen, None), "layer"), "", LEGEND])


LEGEND = (
    "kept: forward tensors that stay in memory until the backward has used them. recomputed: runs beyond an op's first.\n"
    "offloaded: bytes written out of memory. outside the arena: tensors that the allocator holds, summed over the step. time: all runs."
)


def _arena(plan: Plan, seen: Walk) -> str:
    inside = len(plan.placement.offsets)
    made = sum(1 for life in seen.lives if life.start >= 0)
    return (
        f"arena   {format_bytes(plan.placement.arena_bytes)}, {inside:,} of {made:,} tensors made in the step lie in it"
        if inside
        else "arena   none: the allocator holds every tensor, no arena fits this budget or no op could fill one"
    )


def _at_peak(graph: Graph, plan: Plan, seen: Walk) -> list[str]:
    number = max(0, plan.report.peak_step)
    lines = forward_lines(graph)
    if not plan.report.timeline:
        return ["the schedule has no steps"]
    parts = [f"{name} {format_bytes(seen.live[name][number])}" for name in GROUPS if seen.live[name][number]]
    head = f"live at the peak (step {number}): {format_bytes(plan.report.timeline[number])} = {' + '.join(parts)}"
    living = [life for life in seen.living(number) if life.size_bytes][:TOP]
    rows = [_storage_row(graph, life, lines, common_prefix(graph)) for life in living]
    return [head, *columns([("bytes", "storage", "kind", "module", "line"), *rows], right=(0,))]


def _storage_row(graph: Graph, life: Life, lines: dict[str, str], prefix: str) -> tuple[str, ...]:
    made = graph.producer.get(life.storage)
    op = graph.ops[made] if made is not None else None
    storage = graph.storages[life.storage]
    place = (op.module.removeprefix(prefix) or op.phase) if op else storage.source.split(":")[-1]
    return format_bytes(life.size_bytes), storage.name, group_of(graph, life.storage), place, source_line(op, lines) if op else ""


@dataclass
class Row:
    """What happens in one layer or module, summed."""

    label: str
    ops: int = 0
    kept_bytes: int = 0
    recomputes: int = 0
    recompute_us: int = 0
    offloaded_bytes: int = 0
    outside: int = 0
    outside_bytes: int = 0
    time_us: int = 0


def _rows(graph: Graph, plan: Plan, seen: Walk, module: str | None) -> list[Row]:
    """A row per layer, or per module inside `module`, in order of first use."""
    labels = _labels(graph, module)
    rows: dict[str, Row] = {}
    for label in labels.values():
        row = rows.setdefault(label, Row(label))
        row.ops += 1
    _count_runs(plan, seen, labels, rows)
    kept = _kept(graph, plan, seen)
    for life in seen.lives:
        label = labels.get(graph.producer.get(life.storage, -1), "")
        if life.start < 0 or not label:
            continue
        rows[label].kept_bytes += life.size_bytes if life in kept else 0
        if (life.start, life.storage) not in plan.placement.offsets and life.size_bytes:
            rows[label].outside += 1
            rows[label].outside_bytes += life.size_bytes
    return list(rows.values())


def _count_runs(plan: Plan, seen: Walk, labels: dict[int, str], rows: dict[str, Row]) -> None:
    """Time, recomputes and offloads of each row."""
    maker = _responsible(plan)
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, Run) and step.op in labels:
            row, time_us = rows[labels[step.op]], plan.problem.ops[step.op].choices[step.choice].time_us
            row.time_us += time_us
            row.recomputes += seen.again[number]
            row.recompute_us += time_us if seen.again[number] else 0
        elif isinstance(step, Offload) and maker.get(step.storage) in labels:
            rows[labels[maker[step.storage]]].offloaded_bytes += plan.problem.storages[step.storage].size_bytes


def _responsible(plan: Plan) -> dict[int, int]:
    """The op that each storage belongs to: the one that creates it, or the last that writes it, or the first that reads it."""
    result: dict[int, int] = {}
    for index, op in enumerate(plan.problem.ops):
        for storage in op.choices[0].reads:
            result.setdefault(storage, index)
    for index, op in enumerate(plan.problem.ops):
        result.update(dict.fromkeys(op.writes, index))
    return result | {storage: index for index, op in enumerate(plan.problem.ops) for storage in op.creates}


def _kept(graph: Graph, plan: Plan, seen: Walk) -> set[Life]:
    """Lives of forward tensors that begin before the first backward op runs and are still there when a later phase uses them."""
    users: dict[int, list[int]] = {}
    border = len(plan.schedule.steps)
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, Run) and graph.ops[step.op].phase == "backward":
            border = min(border, number)
            for storage in (*graph.ops[step.op].reads, *graph.ops[step.op].writes):
                users.setdefault(storage, []).append(number)
    return {
        life
        for life in seen.lives
        if 0 <= life.start < border < life.end and any(border <= use < life.end for use in users.get(life.storage, ()))
    }


def _labels(graph: Graph, module: str | None) -> dict[int, str]:
    """The row of each op: its layer, or its module where it lies inside `module`."""
    prefix = common_prefix(graph)
    if module is None:
        return {index: layer_of(op.module).removeprefix(prefix) or f"({op.phase})" for index, op in enumerate(graph.ops)}
    found = {index: op.module.removeprefix(prefix) for index, op in enumerate(graph.ops) if _inside(op.module, module)}
    if not found:
        paths = sorted({path.removeprefix(prefix) for op in graph.ops for path in _parents(op.module) if path})
        raise OptionError(f"no op belongs to module {module!r}", close_matches(module, paths))
    return found


def _inside(path: str, wanted: str) -> bool:
    """Whether the components of `wanted` occur, in a row, in `path`."""
    return f".{wanted.strip('.')}." in f".{path}."


def _parents(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _table(rows: Sequence[Row], head: str) -> list[str]:
    cells = [(head, "ops", "kept", "recomputed", "offloaded", "outside the arena", "time")]
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in list(Row.__dataclass_fields__)[1:]))
    for row in [*rows, total]:
        cells.append(
            (
                row.label,
                f"{row.ops:,}",
                bytes_or_dash(row.kept_bytes),
                f"{row.recomputes} ops, {duration(row.recompute_us)}" if row.recomputes else "-",
                bytes_or_dash(row.offloaded_bytes),
                f"{row.outside}, {bytes_or_dash(row.outside_bytes)}" if row.outside else "-",
                duration(row.time_us),
            )
        )
    return columns(cells, right=(1, 2, 3, 4, 5, 6))
