"""The schedule as a trace in the Chrome format, which Perfetto and chrome://tracing open: counters of memory, slices of ops and transfers."""

from __future__ import annotations

import json
from typing import Any

from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.walk import Walk, forward_lines, source_line, walk
from solvers import Run, Wait

COMPUTE, DISK, STALL = 1, 2, 3


def trace_json(graph: Graph, plan: Plan) -> str:
    """Trace events: "C" counters "live bytes" and "live by kind" at every step, "X" slices for ops, transfers and waits (microseconds)."""
    seen = walk(graph, plan)
    events = [*_names(graph), *_counters(plan, seen), *_ops(graph, plan, seen), *_transfers(plan, seen), *_stalls(plan, seen)]
    totals = {
        "budget_bytes": plan.problem.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "live_peak_bytes": plan.report.peak_bytes,
        "time_us": plan.time_us,
    }
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": totals}, separators=(",", ":"))


def _names(graph: Graph) -> list[dict[str, Any]]:
    threads = {COMPUTE: "compute", DISK: "disk", STALL: "waiting for the disk"}
    process = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"{graph.name} (predicted)"}}
    return [process, *({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}} for tid, name in threads.items())]


def _counters(plan: Plan, seen: Walk) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    if plan.report.peak_step < 0:
        events.append({"ph": "C", "pid": 1, "ts": 0, "name": "live bytes", "args": {"bytes": plan.report.peak_bytes}})
    for number, ts in enumerate(seen.clocks.start_us):
        events.append({"ph": "C", "pid": 1, "ts": ts, "name": "live bytes", "args": {"bytes": plan.report.timeline[number]}})
        kinds = {name: row[number] for name, row in seen.live.items()}
        events.append({"ph": "C", "pid": 1, "ts": ts, "name": "live by kind", "args": kinds})
    return events


def _ops(graph: Graph, plan: Plan, seen: Walk) -> list[dict[str, Any]]:
    lines = forward_lines(graph)
    events = []
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, Run):
            op = graph.ops[step.op]
            facts = {"step": number, "op": op.target, "module": op.module, "line": source_line(op, lines), "recompute": seen.again[number]}
            category = f"{op.phase},recompute" if seen.again[number] else op.phase
            events.append(_slice(COMPUTE, op.name, category, seen.clocks.start_us[number], seen.clocks.end_us[number], facts))
    return events


def _transfers(plan: Plan, seen: Walk) -> list[dict[str, Any]]:
    events = []
    for item in seen.clocks.transfers:
        storage = plan.problem.storages[item.storage]
        verb = "write" if item.write else "read"
        facts = {"size_bytes": storage.size_bytes, "issued_at_step": item.issued, "waited_at_step": item.waited}
        events.append(_slice(DISK, f"{verb} {storage.name}", verb, item.start_us, item.end_us, facts))
    return events


def _stalls(plan: Plan, seen: Walk) -> list[dict[str, Any]]:
    times = zip(plan.schedule.steps, seen.clocks.start_us, seen.clocks.end_us, strict=True)
    return [
        _slice(STALL, f"wait for {plan.problem.storages[step.storage].name}", "stall", start, end, {"step": number})
        for number, (step, start, end) in enumerate(times)
        if isinstance(step, Wait) and end > start
    ]


def _slice(tid: int, name: str, category: str, start_us: int, end_us: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": tid, "ts": start_us, "dur": end_us - start_us, "name": name, "cat": category, "args": args}
