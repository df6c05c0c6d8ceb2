"""Law 2: the budget is hard. What the plan predicts is what the meters measure, and neither exceeds the budget.

The rows are in `matrix`: each optimizer once in every run, the whole 6 x 3 x 4 where `slow` tests run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matrix import FRACTIONS, OPTIMIZERS, RECIPES, Cell, limited_steps, row

from mebp_compile.measure.child import run_child
from mebp_compile.measure.malloc_meter import library_path

KIB, MIB = 1 << 10, 1 << 20
TENSOR_SLACK = 64 * KIB
MALLOC_SHARE, MALLOC_SLACK = 0.02, MIB
RSS_SHARE, RSS_SLACK = 0.05, 16_000_000
TIGHT = 1  # the first cells of a row are tight: the smallest budget found

pytestmark = pytest.mark.skipif(library_path() is None, reason="the malloc meter's library is not built (no compiler)")
REDUCED = [("qwen2", "adamw"), ("gpt2", "sgd-momentum"), ("resnet", "adamw-foreach")]  # adapters; dropout and two programs; buffers
REST = [(family, optimizer) for family in RECIPES for optimizer in OPTIMIZERS if (family, optimizer) not in REDUCED]


@pytest.mark.parametrize(("family", "optimizer"), [*REDUCED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_matrix(family: str, optimizer: str, disk_folder: Path) -> None:
    """Four budgets from the smallest found to keep-all: equal to eager in raw bytes over four calls, as predicted, never above the
    budget."""
    refusal, cells = row(family, optimizer, disk_folder)
    print(*cells, sep="\n")
    check_refusal(refusal, cells)
    assert len(cells) == len(FRACTIONS)
    for cell in cells:
        check_cell(cell)
    check_tight(cells)
    check_times(cells)


def check_cell(cell: Cell) -> None:
    """The bounds of law 2 for one budget."""
    assert cell.tensor_bytes == pytest.approx(cell.measured_tensor_bytes, abs=TENSOR_SLACK), cell
    assert cell.measured_tensor_bytes <= cell.tensor_bytes, cell
    assert cell.malloc_bytes <= cell.peak_bytes <= cell.malloc_bytes * (1 + MALLOC_SHARE) + MALLOC_SLACK, cell
    assert cell.peak_bytes <= cell.budget_bytes, cell
    assert cell.malloc_bytes <= cell.budget_bytes, cell
    assert cell.anon_bytes <= cell.peak_bytes * (1 + RSS_SHARE) + RSS_SLACK, cell


def check_refusal(refusal: dict[str, Any], cells: list[Cell]) -> None:
    """Below the smallest budget found: a refusal with it, a lower bound and what binds; at it the step runs (the first cell)."""
    assert refusal["refused_below"]
    assert refusal["lower_bound_bytes"] <= refusal["smallest_bytes"] == cells[0].budget_bytes
    assert refusal["binding_op"] in (*refusal["ops"], "end of the step")
    for said in (f"{refusal['smallest_bytes']:,}", f"{refusal['lower_bound_bytes']:,}", refusal["binding_op"]):
        assert said in refusal["message"]


def check_tight(cells: list[Cell]) -> None:
    """A tight budget is met by recomputing and by moving to disk, both."""
    for cell in cells[:TIGHT]:
        assert cell.recomputes >= 1, cell
        assert cell.offloads >= 1, cell


def check_times(cells: list[Cell]) -> None:
    """Predicted time never falls as the budget shrinks."""
    times = [cell.time_us for cell in cells]
    assert times == sorted(times, reverse=True), times


def test_a_process_that_may_not_grow(disk_folder: Path) -> None:
    """Under RLIMIT_DATA = warmed VmData + budget + slack the compiled step completes and the plain step does not."""
    answer = run_child("matrix", limited_steps.__name__, {"folder": str(disk_folder), "share": RSS_SHARE, "slack": RSS_SLACK})
    assert answer["compiled"] == "completed"
    assert "memory" in answer["plain"] or "alloc" in answer["plain"], answer
