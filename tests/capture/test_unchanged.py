"""Python state around a trace: changes are noticed, named and undone; what libraries fill in once may stay."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mebp_compile.capture import capture, find_state
from mebp_compile.capture.unchanged import python_state_kept
from mebp_compile.errors import ClosureChanged, Unsupported


def test_nothing_changed_is_fine() -> None:
    """A block that changes nothing passes; one that moves torch's generator does not, and that is undone."""
    before = torch.get_rng_state()
    with python_state_kept(len, find_state(lambda: None)):
        pass
    with pytest.raises(ClosureChanged, match="generator"), python_state_kept(len, find_state(lambda: None)):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_changes_are_undone_when_the_block_raises() -> None:
    """An error of the block's own comes through, with Python state put back all the same."""
    box = {"n": 1}
    drawn = random.getstate()

    def change() -> None:
        box["n"] = 2
        random.random()
        raise KeyError

    with pytest.raises(KeyError), python_state_kept(change, find_state(lambda: box)):
        change()
    assert box == {"n": 1}
    assert random.getstate() == drawn


def test_containers_keep_their_identity() -> None:
    """Lists, dicts and sets get their content back in place; names that were rebound get their object back."""
    log, table, some, name = [1], {"a": 1}, {1}, "old"
    held = (log, table, some)

    def step() -> None:
        nonlocal name, log
        log.append(2)
        log = []
        table.clear()
        some.add(2)
        name = "new"

    with pytest.raises(ClosureChanged), python_state_kept(step, find_state(step)):
        step()
    assert (log, table, some, name) == ([1], {"a": 1}, {1}, "old")
    assert (log, table, some) == held
    assert log is held[0]


class FillsIn(nn.Module):
    """Notes a setting at its first call, as transformers' models do, or counts, or computes something else at first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.kind = kind
        self.note: int | None = None
        self.config = SimpleNamespace(problem=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.note is None
        if self.kind == "counts":
            self.note = (self.note or 0) + 1
        else:
            self.note = 1
            self.config.problem = "regression"
        return self.inner(x) * (2 if first and self.kind == "differs" else 3)


@pytest.mark.parametrize("kind", ["settles", "counts", "differs"])
def test_attributes_that_settle(kind: str) -> None:
    """An attribute filled in once stays; a counter, or a first call that computes something else, is refused and undone."""
    net = FillsIn(kind)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = net(x).sum()
        loss.backward()
        return loss

    if kind == "settles":
        capture(step, find_state(step), (torch.ones(1, 2),), {})
        assert (net.note, net.config.problem) == (1, "regression")
        return
    with pytest.raises(ClosureChanged if kind == "counts" else Unsupported):
        capture(step, find_state(step), (torch.ones(1, 2),), {})
    assert (net.note, net.config.problem) == (None, None)
