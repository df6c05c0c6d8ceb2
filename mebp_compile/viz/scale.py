"""Where steps lie on the x axis (by number or by predicted time), and paths with as many points as a picture can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mebp_compile.walk import Transfer, Walk

BUCKETS = 3600


@dataclass(frozen=True)
class Scale:
    """start, end: where each step begins and ends, in fractions of the width. total: steps, or microseconds."""

    axis: str
    start: tuple[float, ...]
    end: tuple[float, ...]
    total: int

    def transfer(self, item: Transfer) -> tuple[float, float]:
        """From issue to completion: over time on the disk's own clock, over steps until the Wait."""
        if self.axis == "step":
            return self.start[item.issued], self.end[item.waited]
        return item.start_us / max(1, self.total), item.end_us / max(1, self.total)

    def label(self, fraction: float) -> str:
        if self.axis == "step":
            return f"step {round(fraction * self.total):,}"
        return f"{fraction * self.total / 1e6:.2f} s" if self.total >= 2_000_000 else f"{fraction * self.total / 1e3:.1f} ms"


def steps_scale(seen: Walk) -> Scale:
    count = max(1, len(seen.again))
    return Scale(
        "step", tuple(n / count for n in range(len(seen.again))), tuple((n + 1) / count for n in range(len(seen.again))), len(seen.again)
    )


def time_scale(seen: Walk) -> Scale:
    total = max(1, seen.clocks.end_us[-1]) if seen.clocks.end_us else 1
    return Scale("time", tuple(us / total for us in seen.clocks.start_us), tuple(us / total for us in seen.clocks.end_us), total)


def representatives(scale: Scale, values: Sequence[int]) -> list[int]:
    """For each of up to BUCKETS equal parts of the width the step with the largest value in it, so that no peak is lost."""
    count = min(BUCKETS, len(values)) if scale.axis == "step" else BUCKETS
    best: list[int] = [-1] * count
    for step, value in enumerate(values):
        first = min(count - 1, int(scale.start[step] * count + 1e-6))
        last = min(count - 1, max(first, int(scale.end[step] * count - 1e-6)))
        for bucket in range(first, last + 1):
            if best[bucket] < 0 or value > values[best[bucket]]:
                best[bucket] = step
    return _filled(best)


def _filled(best: list[int]) -> list[int]:
    """A part of the width without a step shows the step before it."""
    last = 0
    result = []
    for step in best:
        last = step if step >= 0 else last
        result.append(last)
    return result


def outline(ys: Sequence[float], left: float, width: float) -> str:
    """A stair of equal treads over the width: "M.. H.. V.." with one corner for each change."""
    if not ys:
        return f"M{left} 0"
    parts, before = [f"M{left} {ys[0]:.1f}"], f"{ys[0]:.1f}"
    for number, y in enumerate(ys):
        if f"{y:.1f}" != before:
            before = f"{y:.1f}"
            parts.append(f"H{left + width * number / len(ys):.2f}V{before}")
    return "".join(parts) + f"H{left + width}"


def bars(spans: Sequence[tuple[float, float]], left: float, width: float, y: float, height: float) -> str:
    """Filled boxes at least a pixel wide; those closer than half a pixel become one."""
    merged: list[list[float]] = []
    for a, b in sorted(spans):
        x0, x1 = left + a * width, left + max(b, a + 1.0 / width) * width
        if merged and x0 <= merged[-1][1] + 0.5:
            merged[-1][1] = max(merged[-1][1], x1)
        else:
            merged.append([x0, x1])
    return "".join(f"M{x0:.2f} {y}H{x1:.2f}V{y + height}H{x0:.2f}Z" for x0, x1 in merged)
