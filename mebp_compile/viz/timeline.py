"""The memory timeline as SVG: live bytes by kind over the schedule, the budget, the keep-all curve, and lanes for layers, recomputes and the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import solvers
from mebp_compile.config import format_bytes
from mebp_compile.errors import OptionError
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.viz.scale import Scale, bars, outline, representatives, steps_scale, time_scale
from mebp_compile.walk import GROUPS, Walk, common_prefix, layer_of, walk
from solvers.baselines import keep_all

WIDTH, LEFT, RIGHT, TOP, PLOT, LANE, GAP = 1200, 96, 16, 26, 320, 13, 6
LANES = ("phase", "layer", "recompute", "write", "read", "stall")
LANE_NAMES = {"phase": "phase", "layer": "layer", "recompute": "recompute", "write": "disk write", "read": "disk read", "stall": "waiting"}
LANES_TOP = TOP + PLOT + 26
HEIGHT = LANES_TOP + len(LANES) * (LANE + GAP) + 2
INNER = WIDTH - LEFT - RIGHT
Curve = Sequence[tuple[int, int]]
COLOURS = {
    "parameters": ("#8b95a5", "#6b7686"), "optimizer": ("#b9a3e3", "#8d76c4"), "weights": ("#7cc4b5", "#3f9a89"),
    "activations": ("#4f8fd9", "#4d8ad0"), "gradients": ("#f0a04b", "#d98836"), "workspace": ("#dd5f74", "#d2566c"),
    "forward": ("#4f8fd9", "#4d8ad0"), "backward": ("#f0a04b", "#d98836"), "update": ("#6fae6a", "#5c9a58"),
    "recompute": ("#a04ad0", "#bd7be6"), "write": ("#2f7f74", "#49b3a4"), "read": ("#2f7f74", "#49b3a4"), "stall": ("#d6304a", "#ff6b81"),
    "budget": ("#d6304a", "#ff6b81"), "keepall": ("#c3cad4", "#4a5361"), "ink": ("#1d2430", "#e6eaf0"), "soft": ("#667085", "#98a2b3"),
    "grid": ("#e7eaef", "#2a313c"), "band": ("#eef1f5", "#262d38"), "band2": ("#dde2ea", "#333c49"), "paper": ("#ffffff", "#171c24"),
}  # fmt: skip


def style() -> str:
    """The colours as CSS variables, for light and dark, and the few rules of the SVG."""
    light, dark = ("".join(f"--{name}:{pair[tone]};" for name, pair in COLOURS.items()) for tone in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "svg text{font:11px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--soft)}svg .strong{fill:var(--ink);font-weight:600}"
        "svg .line{fill:none;vector-effect:non-scaling-stroke}svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px}"
    )


def timeline_svg(graph: Graph, plan: Plan, measured: Sequence[int] | None = None) -> str:
    """The timeline over schedule steps, as one SVG file. `measured`: bytes that a meter saw in each step."""
    seen = walk(graph, plan)
    body = draw(graph, plan, seen, steps_scale(seen), keep_all_curve(plan), measured)
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"><style>{style()}</style>{background}{body}</svg>\n'


def axis_svg(graph: Graph, plan: Plan, seen: Walk, axis: str, curve: Curve, measured: Sequence[int] | None) -> str:
    """The timeline over "step" or "time", to be put into a page; `curve` is `keep_all_curve(plan)`."""
    scale = steps_scale(seen) if axis == "step" else time_scale(seen)
    hidden = "" if axis == "step" else ' style="display:none"'
    label = f"memory over {'schedule steps' if axis == 'step' else 'predicted time'}"
    body = draw(graph, plan, seen, scale, curve, measured)
    return f'<svg class="chart" data-axis="{axis}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"{hidden}>{body}</svg>'


@dataclass(frozen=True)
class Frame:
    """One drawing: where steps lie on x, and how many bytes the plot's height stands for."""

    scale: Scale
    top_bytes: float

    def y(self, size_bytes: float) -> float:
        return TOP + PLOT * (1 - min(1.0, size_bytes / self.top_bytes))

    def x(self, fraction: float) -> float:
        return LEFT + INNER * fraction


def draw(graph: Graph, plan: Plan, seen: Walk, scale: Scale, curve: Curve, measured: Sequence[int] | None) -> str:
    """Everything inside the <svg>. What moves when a page zooms lies in <g class="zoom">."""
    if measured is not None and len(measured) != len(plan.schedule.steps):
        raise OptionError(f"{len(measured)} measured values for {len(plan.schedule.steps)} schedule steps", "give one value for each step")
    frame = Frame(scale, top_bytes(plan, measured))
    clip = f'<clipPath id="clip-{scale.axis}"><rect x="{LEFT}" y="0" width="{INNER}" height="{HEIGHT}"/></clipPath>'
    moving = [
        _keep_all(plan, curve, frame), *_stack(seen, frame), _footprint(plan, seen, frame), _measured(measured, frame),
        *_lanes(graph, plan, seen, frame),
    ]  # fmt: skip
    labels = _layer_labels(graph, plan, seen, frame)
    zoom = f'<g clip-path="url(#clip-{scale.axis})"><g class="zoom">{"".join(moving)}</g>{labels}</g>'
    return (
        clip
        + "".join(_grid(frame))
        + zoom
        + "".join([*_budget(plan, frame), *_peak(plan, seen, frame), *_lane_names(), _axis_labels(frame)])
    )


def top_bytes(plan: Plan, measured: Sequence[int] | None = None) -> float:
    """What the plot's height stands for: budget, footprint and measured curve always fit; keep-all up to 2.2 times as much."""
    peak = max(plan.peak_bytes, plan.report.peak_bytes, max(measured or (0,)), 1)
    budget = plan.problem.budget_bytes if plan.problem.budget_bytes < 2.5 * peak else 0
    return 1.06 * max(peak, budget, min(plan.keep_all_bytes, 2.2 * max(peak, budget)))


def _stack(seen: Walk, frame: Frame) -> list[str]:
    """Areas from the baseline to each cumulative height, the highest drawn first."""
    chosen = representatives(frame.scale, [sum(column) for column in zip(*seen.live.values(), strict=True)])
    heights = [0] * len(chosen)
    paths = []
    for name in GROUPS:
        heights = [height + seen.live[name][step] for height, step in zip(heights, chosen, strict=True)]
        if any(seen.live[name]):
            edge = outline([frame.y(height) for height in heights], LEFT, INNER)
            paths.append(f'<path d="{edge}V{TOP + PLOT}H{LEFT}Z" fill="var(--{name})"/>')
    return paths[::-1]


def _footprint(plan: Plan, seen: Walk, frame: Frame) -> str:
    """The line of what the process holds: arena, allocator and workspace. Not drawn without an arena, where it is the stack's edge."""
    if not plan.placement.arena_bytes:
        return ""
    return _line(seen.footprint, frame, 'stroke="var(--ink)" stroke-width="1.3"')


def _measured(measured: Sequence[int] | None, frame: Frame) -> str:
    return _line(measured, frame, 'stroke="var(--stall)" stroke-width="1.3" stroke-dasharray="2 2"') if measured is not None else ""


def _line(values: Sequence[int], frame: Frame, look: str) -> str:
    chosen = representatives(frame.scale, values)
    return f'<path class="line" d="{outline([frame.y(values[step]) for step in chosen], LEFT, INNER)}" {look}/>'


def keep_all_curve(plan: Plan) -> Curve:
    """(op, live bytes) of each run of the keep-all schedule."""
    schedule = keep_all(plan.problem)
    report = solvers.replay(plan.problem, schedule, enforce_budget=False)
    return [(step.op, size) for step, size in zip(schedule.steps, report.timeline, strict=True) if isinstance(step, solvers.Run)]


def _keep_all(plan: Plan, curve: Curve, frame: Frame) -> str:
    """The keep-all curve: its bytes at each op, drawn where this schedule first runs that op."""
    first: dict[int, float] = {}
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, solvers.Run):
            first.setdefault(step.op, frame.scale.start[number])
    highest: dict[int, int] = {}
    for x, size in sorted((first[op], size) for op, size in curve):
        highest[int(x * INNER)] = max(size, highest.get(int(x * INNER), 0))
    edge = "".join(f"L{LEFT + x} {frame.y(size):.1f}" for x, size in highest.items())
    base = TOP + PLOT
    return f'<path d="M{LEFT} {base}{edge}L{LEFT + INNER} {base}Z" fill="var(--keepall)" opacity=".35"/>' if edge else ""


def _grid(frame: Frame) -> list[str]:
    parts = []
    for size in ticks(frame.top_bytes):
        y = frame.y(size)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + INNER}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_bytes(size)}</text>')
    return parts


def ticks(top: float) -> list[int]:
    """About five round numbers of bytes from 0 to `top`, round in KiB, MiB or GiB."""
    unit = next((unit for unit in (2**30, 2**20, 2**10) if top >= unit), 1)
    rough, power = top / unit / 5, 1.0
    while power * 10 <= rough:
        power *= 10
    while power > rough:
        power /= 10
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [int(count * step * unit) for count in range(int(top / (step * unit)) + 1)]


def _budget(plan: Plan, frame: Frame) -> list[str]:
    budget = plan.problem.budget_bytes
    text = f"budget {format_bytes(budget)}"
    if budget > frame.top_bytes:
        return [f'<text class="halo" x="{LEFT + INNER - 4}" y="{TOP + 10}" text-anchor="end">{text}, above the scale</text>']
    y = frame.y(budget)
    return [
        f'<path d="M{LEFT} {y:.1f}H{LEFT + INNER}" stroke="var(--budget)" stroke-width="1.5" stroke-dasharray="6 4"/>',
        f'<text class="halo" x="{LEFT + INNER - 4}" y="{y - 6:.1f}" text-anchor="end" style="fill:var(--budget);font-weight:600">{text}</text>',
    ]


def _peak(plan: Plan, seen: Walk, frame: Frame) -> list[str]:
    """A ring at the step with the largest footprint."""
    if not seen.footprint:
        return []
    step = max(range(len(seen.footprint)), key=lambda number: seen.footprint[number])
    fraction = (frame.scale.start[step] + frame.scale.end[step]) / 2
    y = frame.y(seen.footprint[step])
    side, shift = ("end", -9) if fraction > 0.6 else ("start", 9)
    return [
        f'<circle class="mark" data-x="{fraction:.6f}" cx="{frame.x(fraction):.1f}" cy="{y:.1f}" r="4" fill="var(--paper)" '
        'stroke="var(--ink)" stroke-width="2"/>',
        f'<text class="mark strong halo" data-x="{fraction:.6f}" data-shift="{shift}" x="{frame.x(fraction) + shift:.1f}" y="{max(12.0, y - 9):.1f}" '
        f'text-anchor="{side}">peak {format_bytes(plan.peak_bytes)}</text>',
    ]


# --- lanes ---


def _lane_y(lane: str) -> int:
    return LANES_TOP + LANES.index(lane) * (LANE + GAP)


def _lane_names() -> list[str]:
    return [f'<text x="{LEFT - 8}" y="{_lane_y(lane) + 10}" text-anchor="end">{LANE_NAMES[lane]}</text>' for lane in LANES]


def _lanes(graph: Graph, plan: Plan, seen: Walk, frame: Frame) -> list[str]:
    parts = [f'<path d="M{LEFT} {_lane_y(lane) + LANE / 2}H{LEFT + INNER}" stroke="var(--grid)" class="line"/>' for lane in LANES[2:]]
    for phase in ("forward", "backward", "update"):
        spans = [(a, b) for name, a, b in _spans(_phases(graph, plan), frame.scale) if name == phase]
        parts.append(_bars("phase", spans, phase))
    for number, (_, a, b) in enumerate(_spans(_layers(graph, plan, seen), frame.scale)):
        parts.append(_bars("layer", [(a, b)], "band2" if number % 2 else "band"))
    start, end = frame.scale.start, frame.scale.end
    parts.append(_bars("recompute", [(start[n], end[n]) for n, again in enumerate(seen.again) if again], "recompute"))
    for lane, write in (("write", True), ("read", False)):
        parts.append(_bars(lane, [frame.scale.transfer(item) for item in seen.clocks.transfers if item.write is write], lane))
    stalls = [
        (start[n], end[n])
        for n, step in enumerate(plan.schedule.steps)
        if isinstance(step, solvers.Wait) and seen.clocks.end_us[n] > seen.clocks.start_us[n]
    ]
    return [*parts, _bars("stall", stalls, "stall")]


def _bars(lane: str, spans: Sequence[tuple[float, float]], colour: str) -> str:
    path = bars(spans, LEFT, INNER, _lane_y(lane), LANE)
    return f'<path d="{path}" fill="var(--{colour})"/>' if path else ""


def _phases(graph: Graph, plan: Plan) -> list[str]:
    return [graph.ops[step.op].phase if isinstance(step, solvers.Run) else "" for step in plan.schedule.steps]


def _layers(graph: Graph, plan: Plan, seen: Walk) -> list[str]:
    """The layer of each step's op; recomputes, and ops of no module or of one that holds all layers, don't interrupt a layer."""
    prefix = common_prefix(graph)
    result = []
    for step, again in zip(plan.schedule.steps, seen.again, strict=True):
        module = graph.ops[step.op].module if isinstance(step, solvers.Run) and not again else ""
        result.append("" if prefix.startswith(f"{module}.") else layer_of(module).removeprefix(prefix))
    return result


def _spans(names: Sequence[str], scale: Scale) -> list[tuple[str, float, float]]:
    """Runs of equal names, as (name, from, to) in fractions of the width; steps without a name belong to the run before them."""
    starts = [(number, name) for number, name in enumerate(names) if name]
    changes = [item for before, item in zip([None, *starts], starts, strict=False) if before is None or before[1] != item[1]]
    ends = [scale.start[number] for number, _ in changes[1:]] + [1.0]
    return [(name, scale.start[number], end) for (number, name), end in zip(changes, ends, strict=True)]


def _layer_labels(graph: Graph, plan: Plan, seen: Walk, frame: Frame) -> str:
    """Names of the layers; a page hides those that don't fit when it zooms."""
    y = _lane_y("layer") + 10
    parts = []
    for name, a, b in _spans(_layers(graph, plan, seen), frame.scale):
        width = 6.2 * len(name) + 6
        if (b - a) * INNER * 40 >= width:
            shown = "" if (b - a) * INNER >= width else ' display="none"'
            parts.append(
                f'<text class="layer" data-a="{a:.5f}" data-b="{b:.5f}" data-w="{width:.0f}" x="{frame.x((a + b) / 2):.1f}" y="{y}" '
                f'text-anchor="middle"{shown}>{escape(name)}</text>'
            )
    return "".join(parts)


def _axis_labels(frame: Frame) -> str:
    y = TOP + PLOT + 16
    marks = [frame.scale.label(count / 8) for count in range(9)]
    texts = "".join(
        f'<text class="tick" x="{frame.x(count / 8):.1f}" y="{y}" text-anchor="{_anchor(count)}">{text}</text>'
        for count, text in enumerate(marks)
    )
    return texts + f'<path d="M{LEFT} {TOP + PLOT}H{LEFT + INNER}" stroke="var(--soft)"/>'


def _anchor(count: int) -> str:
    return "start" if count == 0 else "end" if count == 8 else "middle"


__all__ = ["axis_svg", "style", "timeline_svg"]
