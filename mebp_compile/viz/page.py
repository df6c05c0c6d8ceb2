"""The memory timeline as one self-contained HTML page: the SVG, figures, and a little JavaScript for hover, zoom and what lies in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from mebp_compile.config import format_bytes
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.viz import timeline
from mebp_compile.walk import GROUPS, Walk, common_prefix, forward_lines, group_of, source_line, walk
from solvers import Run

KINDS = ("Run", "Free", "Offload", "Prefetch", "Wait")
LEGEND_TEXT = {
    "parameters": "parameters, buffers", "optimizer": "optimizer state", "weights": "frozen weights", "activations": "activations",
    "gradients": "gradients, backward", "workspace": "workspace, overhead",
}  # fmt: skip


def timeline_html(graph: Graph, plan: Plan, measured: Sequence[int] | None = None) -> str:
    """One HTML file that needs nothing else. `measured`: bytes that a meter saw in each schedule step. Raises OptionError if their count is wrong."""
    seen = walk(graph, plan)
    template = files("mebp_compile.viz").joinpath("page.html").read_text(encoding="utf-8")
    curve = timeline.keep_all_curve(plan)
    parts = {
        "TITLE": escape(f"{graph.name}: memory timeline"),
        "NAME": escape(graph.name),
        "SUBTITLE": f"graph {graph.digest} &middot; {len(graph.ops):,} ops &middot; {len(plan.schedule.steps):,} schedule steps",
        "STYLE": timeline.style(),
        "TILES": "".join(_tile(*tile) for tile in _tiles(plan)),
        "LEGEND": "".join(_legend(plan, seen, measured is not None)),
        "CHARTS": "".join(timeline.axis_svg(graph, plan, seen, axis, curve, measured) for axis in ("step", "time")),
        "DATA": json.dumps(_data(graph, plan, seen), separators=(",", ":")).replace("</", "<\\/"),
    }
    for key, text in parts.items():
        template = template.replace(f"@{key}@", text, 1)
    return template


def _tiles(plan: Plan) -> list[tuple[str, str, str]]:
    """(label, figure, what it is compared with)."""
    report, budget = plan.report, plan.problem.budget_bytes
    extra = 100 * (plan.time_us / plan.keep_all_time_us - 1) if plan.keep_all_time_us else 0.0
    saved = 100 * (1 - plan.peak_bytes / plan.keep_all_bytes) if plan.keep_all_bytes else 0.0
    return [
        ("peak", format_bytes(plan.peak_bytes), f"{100 * plan.peak_bytes / budget:.1f} % of {format_bytes(budget)}"),
        ("keep-all", format_bytes(plan.keep_all_bytes), f"{saved:.0f} % saved" if saved >= 1 else "nothing to save at this budget"),
        (
            "time",
            f"{plan.time_us / 1e6:.3g} s" if plan.time_us >= 10**6 else f"{plan.time_us / 1e3:.3g} ms",
            f"{extra:+.1f} % against keep-all",
        ),
        ("recomputes", f"{report.recomputes:,}", f"of {report.runs:,} runs"),
        ("disk", format_bytes(report.written_bytes + report.read_bytes), f"{report.offloads} offloads, {report.prefetches} prefetches"),
        ("waiting", f"{report.stall_us / 1e3:.3g} ms", f"{100 * report.stall_us / max(1, plan.time_us):.1f} % of the step"),
        ("arena", format_bytes(plan.placement.arena_bytes), f"{len(plan.placement.offsets):,} tensors lie in it"),
        ("gap", f"{100 * plan.gap:.1f} %", f"to the proven bound, {escape(plan.method or 'given')}"),
    ]


def _tile(label: str, figure: str, note: str) -> str:
    return f'<div class="tile"><span>{label}</span><b>{figure}</b><small>{note}</small></div>'


def _legend(plan: Plan, seen: Walk, measured: bool) -> list[str]:
    shown = [name for name in GROUPS if any(seen.live[name])]
    parts = [f'<span><i style="background:var(--{name})"></i>{LEGEND_TEXT[name]}</span>' for name in shown]
    parts.append('<span><i style="background:var(--keepall);opacity:.6"></i>keep-all</span>')
    if plan.placement.arena_bytes:
        parts.append('<span><i class="rule" style="border-color:var(--ink)"></i>footprint with the whole arena</span>')
    if measured:
        parts.append('<span><i class="rule dotted" style="border-color:var(--stall)"></i>measured</span>')
    return parts


def _data(graph: Graph, plan: Plan, seen: Walk) -> dict[str, Any]:
    """What hovering shows: facts of each step, op and storage, as plain lists; numbers refer to the lists."""
    prefix, lines = common_prefix(graph), forward_lines(graph)
    return {
        "budget": plan.problem.budget_bytes,
        "groups": list(GROUPS),
        "kinds": list(KINDS),
        "frame": [timeline.WIDTH, timeline.LEFT, timeline.INNER, timeline.TOP, timeline.PLOT],
        "steps": [[KINDS.index(type(step).__name__), step.op if isinstance(step, Run) else step.storage] for step in plan.schedule.steps],
        "again": [number for number, again in enumerate(seen.again) if again],
        "live": list(plan.report.timeline),
        "footprint": list(seen.footprint),
        "workspace": list(seen.live["workspace"]),
        "constant": plan.problem.constant_bytes,
        "start": list(seen.clocks.start_us),
        "end": list(seen.clocks.end_us),
        "lives": [
            [life.storage, life.start, life.end, plan.placement.offsets.get((life.start, life.storage), -1)]
            for life in seen.lives
            if life.size_bytes
        ],
        "ops": [[op.name, op.target, op.phase, op.module.removeprefix(prefix), source_line(op, lines)] for op in graph.ops],
        "storages": [
            [item.name, item.size_bytes, GROUPS.index(group_of(graph, index)), graph.producer.get(index, -1)]
            for index, item in enumerate(graph.storages)
        ],
    }
