"""The table and the picture of a race."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from mebp_compile.bench.race import Result

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 460, 70, 60, 30
OURS, PEER = "#0b62a4", "#c4522b"
MB = 10**6


def table(results: Sequence[Result], reference: str = "eager") -> str:
    """A line per contestant: bytes in MB = 10^6, median seconds a step, and the ratio to the reference's."""
    base = next((result.median_s for result in results if result.kind == reference and result.seconds), 0.0)
    head = ["", "budget", "tensors", "malloc", "RssAnon", "VmHWM", "predicted", "s/step", f"x {reference}", "predicted s", "last loss"]
    rows = [head, *(_row(result, base) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [_aligned(row, widths) for row in rows]
    failed = [f"{result.name}: {result.error}" for result in results if result.error]
    return "\n".join([*lines, *failed])


def _aligned(row: list[str], widths: list[int]) -> str:
    """The name on the left, figures on the right of their columns."""
    name, *figures = row
    return "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))]).rstrip()


def _row(result: Result, base: float) -> list[str]:
    size = [_mb(getattr(result, f"{name}_bytes")) for name in ("tensor", "malloc", "anon", "resident", "predicted")]
    ratio = f"{result.median_s / base:.2f}" if base and result.seconds else ""
    predicted = f"{result.predicted_us / 1e6:.2f}" if result.predicted_us else ""
    seconds = f"{result.median_s:.2f}" if result.seconds else ""
    return [result.name, result.budget, *size, seconds, ratio, predicted, f"{result.losses[-1]:.3f}" if result.losses else ""]


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / MB:,.1f}" if size_bytes else ""


def write_plot(results: Sequence[Result], path: Path) -> Path:
    """An SVG: malloc's peak (log scale) against seconds a step; ours joined by a line, a dot with a name for each."""
    points = [result for result in results if result.seconds and result.malloc_bytes]
    if not points:
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>\n')
        return path
    low, high = (pick(math.log10(result.malloc_bytes) for result in points) for pick in (min, max))
    slowest = max(result.median_s for result in points) * 1.1

    def place(result: Result) -> tuple[float, float]:
        across = (math.log10(result.malloc_bytes) - low) / ((high - low) or 1)
        return LEFT + across * (WIDTH - LEFT - 130), HEIGHT - BOTTOM - result.median_s / slowest * (HEIGHT - BOTTOM - TOP)

    ours = sorted((place(result) for result in points if result.kind == "ours"), key=lambda at: at[0])
    parts = [f'<polyline fill="none" stroke="{OURS}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in ours)}"/>'] if len(ours) > 1 else []
    for result in points:
        (x, y), colour = place(result), OURS if result.kind == "ours" else PEER
        label = f"{html.escape(result.name)}: {_mb(result.malloc_bytes)} MB, {result.median_s:.2f} s"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/><text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 20}" text-anchor="middle">peak of a step, MB (log scale)</text>')
    parts.append(f'<text x="18" y="{HEIGHT / 2}" transform="rotate(-90 18 {HEIGHT / 2})" text-anchor="middle">seconds a step, from 0</text>')
    axes = f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 20}" fill="none" stroke="#444"/>'
    style = "<style>text{font:11px sans-serif}</style>"
    body = "".join([style, '<rect width="100%" height="100%" fill="#fff"/>', axes, *parts])
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">{body}</svg>\n')
    return path
