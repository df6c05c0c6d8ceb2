"""The same step on a real accelerator: skipped where torch has none. `tests/test_accelerated_step.py` runs all but torch's streams without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mebp_compile.compiler import optimize
from mebp_compile.config import Budget
from mebp_compile.errors import BudgetInfeasible

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda:0"


def training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., Any]]:
    """Eight layers with dropout under AdamW, deterministic kernels throughout."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(512, 512), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, optimizer, step


def batch(call: int) -> torch.Tensor:
    return torch.randn(1024, 512, generator=torch.Generator().manual_seed(call)).to(DEVICE)


def smallest_bytes(host: str) -> int:
    _, _, step = training()
    with pytest.raises(BudgetInfeasible) as refusal:
        optimize(step, Budget(device=1 << 10, host=host), offload="host", cache=False).prepare(batch(0))
    return refusal.value.smallest_bytes


@pytest.mark.parametrize("host", ["1GB", "1"], ids=["offload", "recompute"])
def test_same_bits_inside_both_budgets(host: str) -> None:
    """Losses and parameters of four steps, with what dropout draws; the allocator's peak is inside the device's budget."""
    budget = Budget(device=int(1.05 * smallest_bytes(host)), host=host)
    model, _, eager = training()
    torch.cuda.manual_seed(1)
    expected = [eager(batch(call)) for call in range(4)]
    other, _, step = training()
    compiled = optimize(step, budget, offload="host", example=(batch(0),), cache=False)
    torch.cuda.manual_seed(1)
    peaks, found = [], []
    for call in range(4):
        given = batch(call)
        torch.cuda.reset_peak_memory_stats()
        found.append(compiled(given))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    compiled.materialise()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    del model, eager
    assert compiled.plan.peak_bytes <= budget.size_bytes
    assert compiled.plan.report.away_bytes <= budget.host_bytes
    assert compiled.plan.report.recomputes + compiled.plan.report.prefetches > 0
    kept = sum(tensor.nbytes for tensor in training()[0].parameters())  # of the eager twin, alive while the peaks were taken
    assert max(peaks) <= budget.size_bytes + 3 * kept + (64 << 20)  # its optimizer state, and cuBLAS's workspace
