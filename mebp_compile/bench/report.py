"""What a race gave: the table, the verdict on each peer, JSON, and the files of all of them. The picture is in `plot`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mebp_compile.bench.plot import write_plot
from mebp_compile.bench.race import Result

MB = 10**6
RATE = "matmul"  # the contestant that is no training
SAME = 0.01  # losses further apart than this are not those of the same training


def report(races: Sequence[Sequence[Result]], reference: str = "eager") -> str:
    """As text: of each race the table and a verdict on each peer, then a table of those who ran alone, and how far predicted times were off."""
    parts = [
        "\n".join([table(race, reference), "", *verdicts(race), *trainings(race, reference), *shares(race, reference)])
        for race in races
        if len(race) > 1
    ]
    alone = [race[0] for race in races if len(race) == 1]
    parts += [table(alone, reference)] if alone else []
    return "\n\n".join([*parts, *predictions([result for race in races for result in race])])


def write_report(races: Sequence[Sequence[Result]], folder: Path) -> list[Path]:
    """bench.txt (the text), bench.json (every measurement) and bench.svg (the picture of the first race) in a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.txt").write_text(report(races) + "\n")
    rows = [
        {"race": number, **asdict(result), "median_s": result.median_s, "peak_bytes": result.peak_bytes}
        for number, race in enumerate(races)
        for result in race
    ]
    (folder / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    return [folder / "bench.txt", folder / "bench.json", write_plot(races[0] if races else [], folder / "bench.svg")]


# --- the table ---


def table(results: Sequence[Result], reference: str = "eager") -> str:
    """A line per contestant: bytes in MB = 10^6, median seconds a step, and the ratio to the reference's. Who did not run has the reason there."""
    base = next((result.median_s for result in results if result.kind == reference and result.seconds), 0.0)
    head = ["", "budget", "tensors", "malloc", "RssAnon", "VmHWM", "predicted", "s/step", f"x {reference}", "predicted s", "last loss"]
    rows = [head, *(_row(result, base) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    ran = [bool(result.seconds) for result in results]
    lines = [_aligned(row, widths) for row in rows]
    reasons = [f"{result.name}: {result.error}" if result.error else "" for result in results]
    own = [line if has else reason or line for line, has, reason in zip(lines[1:], ran, reasons, strict=True)]
    return "\n".join([lines[0], *own, *(reason for reason, has in zip(reasons, ran, strict=True) if reason and has)])


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


# --- verdicts ---


def verdicts(results: Sequence[Result]) -> list[str]:
    """A line per peer: whether a point of ours is below and left of it, that is, needs no more memory (malloc's peak) and no more time
    (median of the ratios of the steps of one round)."""
    ours = [result for result in results if result.kind == "ours" and result.seconds and not result.error]
    return [f"ours against {result.name}: {_verdict(result, ours)}" for result in results if result.kind not in ("ours", RATE)]


def _verdict(peer: Result, ours: Sequence[Result]) -> str:
    if not peer.seconds or peer.error:
        return "not measured to the end, so nothing is said of it"
    if not ours:
        return "nothing of ours ran"
    inside = [our for our in ours if our.peak_bytes <= peer.peak_bytes]
    size = f"{peer.peak_bytes / MB:,.1f} MB"
    if not inside:
        return f"NOT left of its {size}: the smallest of ours is {_against(min(ours, key=_bytes), peer)}"
    fastest = min(inside, key=lambda our: paired_ratio(our, peer))
    better = [our for our in inside if paired_ratio(our, peer) <= 1]
    if not better:
        return f"NOT below: within its {size} the fastest of ours is {_against(fastest, peer)}"
    least = min(better, key=_bytes)
    named = [_against(least, peer)] if least is fastest else [_against(least, peer), _against(fastest, peer)]
    return f"below and left of its {size}: {' and '.join(named)}"


def trainings(results: Sequence[Result], reference: str = "eager") -> list[str]:
    """A line for each of ours whose losses leave the reference's, and one for the others: how far the losses of all steps are apart at most."""
    base = next((result for result in results if result.kind == reference and result.losses), None)
    ours = [result for result in results if result.kind == "ours" and result.losses]
    if base is None or not ours:
        return []
    apart = {our.name: max(_apart(mine, its) for mine, its in zip(our.losses, base.losses, strict=False)) for our in ours}
    gone = [f"{name}: NOT the training of {reference}: losses are {far:.2%} apart" for name, far in apart.items() if far > SAME]
    near = [far for far in apart.values() if far <= SAME]
    return [*gone, f"losses of {len(near)} of {len(ours)} rows of ours are within {max(near):.3%} of {reference}'s in every step"] if near else gone


def _apart(mine: float, its: float) -> float:
    return abs(mine / its - 1) if math.isfinite(mine) else math.inf


def shares(results: Sequence[Result], reference: str = "eager") -> list[str]:
    """A line: the rate of this machine's matrix products, and the share of it that our fastest row and the reference reach, with what the step
    asks for counted (no recompute)."""
    rate = next((result for result in results if result.kind == RATE and result.seconds), None)
    ours = [result for result in results if result.kind == "ours" and result.seconds and result.flops]
    if rate is None or not ours:
        return []
    best = min(ours, key=lambda our: our.median_s)
    rows = [best, *(result for result in results if result.kind == reference and result.seconds)]
    reached = [f"{row.name} {best.flops / rate.flops / paired_ratio(row, rate):.0%}" for row in rows]
    return [f"matrix products run at {rate.flops / rate.median_s / 1e9:,.0f} GFLOP/s, of which reach: {', '.join(reached)}"]


def predictions(results: Sequence[Result]) -> list[str]:
    """A line: how far predicted seconds are from the medians, as shares of these; and the same of the machine's products, which are predicted from
    one measurement and no model: what they are off, the machine was faster or slower when costs were measured."""
    off = {result.name: result.predicted_us / 1e6 / result.median_s - 1 for result in results if result.predicted_us and result.seconds}
    drift = [off.pop(result.name) for result in results if result.kind == RATE and result.name in off]
    if not off:
        return []
    least, most = min(off, key=lambda name: off[name]), max(off, key=lambda name: off[name])
    line = f"predicted times of {len(off)} rows are off by {off[least]:+.0%} ({least}) to {off[most]:+.0%} ({most})"
    return [line + f"; those of the products alone by {', '.join(f'{each:+.0%}' for each in drift)}" if drift else line]


def paired_ratio(our: Result, peer: Result) -> float:
    """The median, over the rounds, of our step's time divided by the peer's."""
    return statistics.median(mine / its for mine, its in zip(our.seconds, peer.seconds, strict=False))


def _against(our: Result, peer: Result) -> str:
    return f"{our.name} ({our.peak_bytes / MB:,.1f} MB, {paired_ratio(our, peer):.2f} x its time)"


def _bytes(result: Result) -> int:
    return result.peak_bytes
