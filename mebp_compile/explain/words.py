"""Words, numbers and columns of the explanations."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mebp_compile.config import format_bytes
from mebp_compile.graph import Graph, Op
from mebp_compile.planning import Plan

USERS_SHOWN = 8


def outside(graph: Graph) -> str:
    """Where storages lie that are not in memory."""
    return "host memory" if graph.device else "disk"


def close_matches(name: str, known: Sequence[str]) -> str:
    """A hint naming up to five of `known` that look like `name`."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.75) or [item for item in known if name in item][:5]
    near = near or difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    return f"one of {', '.join(near)}" if near else f"one of the {len(known)} names in the graph's listing"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as aligned lines, two spaces between columns; the columns in `right` are set flush right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def place_of(op: Op) -> str:
    return f"{op.phase}: {op.module}" if op.module else op.phase


def count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def more(count: int) -> str:
    return f" and {count - USERS_SHOWN} more" if count > USERS_SHOWN else ""


def bytes_or_dash(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "-"


def duration(time_us: int) -> str:
    if time_us >= 1_000_000:
        return f"{time_us / 1e6:.2f} s"
    return f"{time_us / 1e3:.1f} ms" if time_us >= 1000 else f"{time_us} us"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def extra_time(plan: Plan) -> str:
    if not plan.keep_all_time_us:
        return "keep-all takes no time"
    return f"{100 * (plan.time_us / plan.keep_all_time_us - 1):+.1f} % against keep-all's {duration(plan.keep_all_time_us)}"


def proven_gap(plan: Plan) -> str:
    return f"within {100 * plan.gap:.1f} % of the proven bound {duration(plan.bound_us)} (solved in {plan.solve_seconds:.1f} s)"
