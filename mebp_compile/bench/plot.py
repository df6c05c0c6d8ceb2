"""The memory-time picture: one self-contained SVG, plain shapes and text. Ours is a curve, each peer a point with its name.

The curve has steps: with the memory of a point of ours, and with more up to the next point, that point's time is what was measured.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mebp_compile.bench.race import Result

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 520, 62, 150, 34, 56
OURS, PEER, INK = "#0b62a4", "#c4522b", "#444"
LINE, LETTER, DOT = 13, 6, 4  # pixels: from one label to the next, width of a letter, radius of a dot
MB = 10**6


@dataclass(frozen=True)
class Scale:
    """From bytes (log scale) and seconds (from 0) to pixels."""

    least_bytes: float
    most_bytes: float
    most_s: float

    def x(self, size_bytes: float) -> float:
        share = math.log(size_bytes / self.least_bytes) / math.log(self.most_bytes / self.least_bytes)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, seconds: float) -> float:
        return HEIGHT - BOTTOM - seconds / self.most_s * (HEIGHT - BOTTOM - TOP)


def write_plot(results: Sequence[Result], path: Path) -> Path:
    """x: the peak of a step (malloc's, else tensors') in MB on a log scale; y: median seconds a step. Who did not run is left out."""
    points = [result for result in results if result.seconds and result.peak_bytes]
    body = _picture(points) if points else _text(WIDTH / 2, HEIGHT / 2, "nobody ran", INK, "middle")
    style = "<style>text{font:11px sans-serif}</style>"
    sheet = '<rect width="100%" height="100%" fill="#fff"/>'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">{style}{sheet}{body}</svg>\n')
    return path


def pareto(results: Sequence[Result]) -> list[Result]:
    """Those than which no other is smaller and at least as fast, or as small and faster; by rising bytes."""
    front: list[Result] = []
    for result in sorted(results, key=lambda each: (each.peak_bytes, each.median_s)):
        if not front or result.median_s < front[-1].median_s:
            front.append(result)
    return front


def _picture(points: Sequence[Result]) -> str:
    sizes = [point.peak_bytes for point in points]
    scale = Scale(min(sizes) / 1.15, max(sizes) * 1.15, 1.1 * max(point.median_s for point in points))
    curve = pareto([point for point in points if point.kind == "ours"])
    parts = [*_axes(scale)]
    if curve:
        start, *rest = ((scale.x(point.peak_bytes), scale.y(point.median_s)) for point in curve)
        steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
        parts.append(f'<path d="M{start[0]:.1f} {start[1]:.1f}{steps}H{WIDTH - RIGHT}" fill="none" stroke="{OURS}" stroke-width="1.5"/>')
    return "".join([*parts, *_points(points, scale)])


def _points(points: Sequence[Result], scale: Scale) -> Iterator[str]:
    """A dot for each, its name beside it and its figures in a tooltip; names that would cover something move down, with a line to their dot."""
    at_dots = ((scale.x(point.peak_bytes), scale.y(point.median_s)) for point in points)
    taken = [(x - DOT, x + DOT, y + DOT) for x, y in at_dots]
    for point in sorted(points, key=lambda each: -each.median_s):
        x, y, colour = scale.x(point.peak_bytes), scale.y(point.median_s), OURS if point.kind == "ours" else PEER
        start, end, at = x + 2 * DOT, x + 2 * DOT + LETTER * (len(point.name) + 1), y + (DOT if point.kind != "ours" else -DOT)
        while (clash := _clash(taken, start, end, at)) is not None:
            at = clash + LINE
        taken.append((start, end, at))
        figures = html.escape(f"{point.name}: {point.peak_bytes / MB:,.1f} MB, {point.median_s:.3g} s")
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" fill="{colour}"><title>{figures}</title></circle>'
        if at > y + LINE / 2:
            yield f'<path d="M{x:.1f} {y:.1f}L{start - 1:.1f} {at - DOT:.1f}" stroke="{colour}" stroke-width="0.5"/>'
        yield _text(start, at, point.name, colour)


def _clash(taken: Sequence[tuple[float, float, float]], start: float, end: float, at: float) -> float | None:
    """The height of a label in the way."""
    return next((height for first, last, height in taken if first < end and start < last and abs(height - at) < LINE - 0.01), None)


def _axes(scale: Scale) -> Iterator[str]:
    """Grid lines with their numbers: 1, 2 and 5 times powers of ten across, about six even steps upwards."""
    for tick in _log_ticks(scale.least_bytes / MB, scale.most_bytes / MB):
        x = scale.x(tick * MB)
        yield f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e6e6e6"/>' + _text(x, HEIGHT - BOTTOM + 15, f"{tick:,.5g}", INK, "middle")
    step = _even_step(scale.most_s / 6)
    for number in range(int(scale.most_s / step) + 1):
        y = scale.y(number * step)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e6e6e6"/>' + _text(LEFT - 6, y + 4, f"{number * step:.4g}", INK, "end")
    yield f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>'
    yield _text(LEFT, TOP - 14, "seconds a step (median)", INK)
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "peak of a step above the process without the model, MB (log scale)", INK, "middle")


def _log_ticks(least: float, most: float) -> list[float]:
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [factor * 10.0**power for power in decades for factor in (1, 2, 5) if least <= factor * 10.0**power <= most]


def _even_step(wanted: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least as large."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * 0.999)


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{html.escape(text)}</text>'
