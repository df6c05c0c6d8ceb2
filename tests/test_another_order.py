"""Schedules whose ops run in another order than the user's: `effort="proof"` may find them, and the generated program must leave the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from chains import adamw, chain, mean_square, momentum, noise
from law1 import assert_same_training, smallest_budget
from models import Training
from torch import nn

import solvers
from mebp_compile import planning
from solvers import Problem, Solution, anneal
from solvers.decode import Tables
from solvers.greedy import first_decisions
from solvers.library import load_library

pytestmark = pytest.mark.skipif(load_library("anneal") is None, reason="anneal.c is not built (no C compiler)")


class Branches(nn.Module):
    """Four branches from one input, which any order may run: wide inside, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def branches() -> Training:
    torch.manual_seed(0)
    return mean_square(Branches(), momentum, noise(64, 64))


def in_another_order(moved: list[int], problem: Problem, *rest: Any) -> Solution:
    """What the solver makes of the problem in an order that has been annealed; moved: how many ops stand elsewhere."""
    tables = Tables(problem)
    away = frozenset(s for s, may in enumerate(tables.may_leave) if may)
    home = sum(info.size_bytes for s, info in enumerate(problem.storages) if info.persistent and s not in away)
    cramped = problem.with_budget(problem.constant_bytes + home + 4096)
    order = anneal.base_order(problem, anneal.sequence_of(cramped, anneal.Setting(first_decisions(tables).choice, away), work=30_000_000))
    moved.append(sum(place != op for place, op in enumerate(order)))
    found = solvers.solve(anneal.reordered(problem, order), "fast")
    schedule = anneal.renamed(found.schedule, order)
    return replace(found, schedule=schedule, report=solvers.replay(problem, schedule))


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("make", [branches, lambda: chain(adamw, dropout=0.1)], ids=["branches", "chain"])
def test_the_same_training_in_another_order(make: Any, on_disk: bool, tmp_path: Path) -> None:
    """Recomputes, random numbers, state on disk: bit for bit what the step itself leaves."""
    moved: list[int] = []
    budget = smallest_budget(make, 0.5, tmp_path if on_disk else None)
    with mock.patch.object(planning, "_solved", lambda *arguments: in_another_order(moved, *arguments)):
        step = assert_same_training(make, budget, offload=tmp_path if on_disk else None)
    assert moved[0] > 0
    assert step.plan.peak_bytes <= budget


def test_effort_proof(tmp_path: Path) -> None:
    """As a user asks for it."""
    step = assert_same_training(branches, smallest_budget(branches, 0.3), effort="proof", time_limit_s=3.0)
    assert step.plan.report.time_us >= step.plan.bound_us
