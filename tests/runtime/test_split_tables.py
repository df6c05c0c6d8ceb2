"""A trained table in blocks of rows on disk: training is what it is with the table whole, in a budget that the table does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from law1 import estimated_costs, named_parameters
from models import Training
from torch import nn

from mebp_compile.compiler import optimize
from mebp_compile.errors import MebpError
from mebp_compile.lower import tables
from mebp_compile.runtime.metering import meter_process, meter_storages
from mebp_compile.runtime.tables import Table, by_parent

VOCABULARY, FEATURES, TOKENS = 2 * 2048 + 900, 64, 20
TABLE_BYTES = VOCABULARY * FEATURES * 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 2048 rows, and costs that follow from sizes."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1 << 16)
    with estimated_costs():
        yield


class Tied(nn.Module):
    """The smallest language model with one table for words in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, FEATURES)
        self.mix = nn.Linear(FEATURES, FEATURES)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(self.table(ids)))
        return nn.functional.cross_entropy(hidden @ self.table.weight.t(), targets)


def tied(optimizer: str) -> Training:
    torch.manual_seed(0)
    model = Tied()
    updates = OPTIMIZERS[optimizer](model.parameters())

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model(ids, targets)
        loss.backward()
        updates.step()
        updates.zero_grad()
        return loss.detach()

    def batch(call: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(call)
        ids = torch.randint(0, VOCABULARY, (TOKENS,))
        ids[3] = ids[4]
        return ids, ids.roll(-1)

    return Training([model], [updates], step, batch)


def trained(training: Training, step: Callable[..., Any], calls: int = 3) -> list[torch.Tensor]:
    return [step(*training.batch(call)) for call in range(calls)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_blocks_train_as_the_whole_table_does(optimizer: str, tmp_path: Path) -> None:
    """Losses, parameters and optimizer state after three steps are bit for bit those of the whole table, in a budget that is less than the
    table and its gradient; predicted and measured peak stay inside it."""
    whole, split = tied(optimizer), tied(optimizer)
    reference = optimize(whole.step, "200MB", numerics="reassociate", effort="fast", cache=False)
    expected = trained(whole, reference)
    budget = 2 * TABLE_BYTES
    compiled = optimize(split.step, budget, offload=tmp_path, numerics="reassociate", effort="fast", cache=False)
    assert torch.equal(torch.stack(trained(split, compiled)), torch.stack(expected))
    assert "table_rows(" in compiled.code
    assert split.modules[0].table.weight.device.type == "meta"
    leaves = list(split.batch(3))
    assert meter_storages(compiled.prepare(*leaves), leaves).peak_bytes <= budget
    assert (meter_process(compiled.prepare(*leaves), leaves).malloc_bytes or 0) <= budget
    for _ in range(2):
        reference(*leaves)
    compiled.materialise()
    for (name, own), (_, other) in zip(named_parameters(split), named_parameters(whole), strict=True):
        assert torch.equal(own, other), name
    compiled(*split.batch(5))  # the table leaves memory again


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_can_be_read_at_any_time(optimizer: str, tmp_path: Path) -> None:
    """`state_dict` has the whole table while its blocks lie on disk, equal to what `materialise` brings back."""
    training = tied(optimizer)
    compiled = optimize(training.step, 2 * TABLE_BYTES, offload=tmp_path, numerics="reassociate", effort="fast", cache=False)
    trained(training, compiled)
    saved = compiled.state_dict()
    compiled.materialise()
    assert torch.equal(saved["model"]["table.weight"], training.modules[0].table.weight)
    for number, entries in training.optimizers[0].state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(saved["optimizer"]["state"][number][key], value)


def test_a_failed_step_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    """An id outside the table fails before anything changes, and an error later does too: the table of before the step comes back."""
    training = tied("sgd")
    compiled = optimize(training.step, 2 * TABLE_BYTES, offload=tmp_path, numerics="reassociate", effort="fast", cache=False)
    trained(training, compiled, 1)
    before = compiled.state_dict()["model"]["table.weight"]
    ids, targets = training.batch(1)
    with pytest.raises(IndexError):
        compiled(ids.fill_(VOCABULARY), targets)
    compiled.materialise(force=True)
    assert torch.equal(training.modules[0].table.weight, before)


def test_a_large_budget_keeps_the_table_whole(tmp_path: Path) -> None:
    """Where the table, its gradients and their sum fit, nothing is cut."""
    training = tied("sgd")
    compiled = optimize(training.step, "200MB", offload=tmp_path, numerics="reassociate", effort="fast", cache=False)
    trained(training, compiled, 1)
    assert "table_rows(" not in compiled.code


def test_what_does_not_go_row_by_row_is_named(tmp_path: Path) -> None:
    """A norm over the whole gradient keeps the table whole, and the note says which op."""
    training, notes = tied("sgd"), list[str]()
    model, updates = training.modules[0], training.optimizers[0]

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        updates.step()
        updates.zero_grad()
        return loss.detach()

    compiled = optimize(step, "4MB", offload=tmp_path, numerics="reassociate", effort="fast", cache=False, progress=notes.append)
    compiled(*training.batch(0))
    assert "table_rows(" not in compiled.code
    assert any("stays whole, because" in note and "does not go row by row" in note for note in notes)


class Memory:
    """Blocks in a dict."""

    def __init__(self) -> None:
        self.blocks: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.blocks[name] = tensor.clone()

    def read(self, name: str, buffer: torch.Tensor) -> None:
        buffer.copy_(self.blocks[name])

    def wait(self, name: str) -> None:
        pass

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        at = offset // buffer.itemsize
        buffer.copy_(self.blocks[name].flatten()[at : at + buffer.numel()])


@pytest.mark.parametrize("held", [(), ("t#2:5",), ("t#0:2", "t#2:5", "t#5:9")])
def test_lookups_and_the_whole_agree_with_the_tensor(held: tuple[str, ...]) -> None:
    """Blocks in memory or not: `gather` gives the tensor back, and `look_up` its rows, repeated and unsorted ids included."""
    whole = torch.randn(9, 4)
    table = Table(Memory(), by_parent(["t#5:9", "t#0:2", "t#2:5"])["t"])
    table.fill(whole, held)
    back = torch.empty(9, 4)
    table.gather(back)
    assert torch.equal(back, whole)
    ids = torch.tensor([[8, 0, 2], [2, 4, 1]])
    assert torch.equal(table.look_up(ids, torch.empty(2, 3, 4)), whole[ids])
    for wrong in (-1, 9):
        with pytest.raises(IndexError):
            table.look_up(torch.tensor([wrong]), torch.empty(1, 4))


def test_blocks_that_leave_rows_out_are_refused() -> None:
    """A table must be all there."""
    with pytest.raises(MebpError, match="leave rows out"):
        by_parent(["t#0:2", "t#3:5"])
