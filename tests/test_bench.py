"""`mebp bench`: contestants in processes of their own, a table and a picture of what was measured, and a failure that stops nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from mebp_compile.bench import Contestant, Result, race, table, write_plot
from mebp_compile.bench.peers import mezo_step
from mebp_compile.cli import main
from mebp_compile.finetune import Settings
from mebp_compile.progress import Progress

TEXT = "A line of text that is read as bytes, again and again.\n" * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_ours_and_eager_on_the_same_batches(text: Path, disk_folder: Path) -> None:
    """Exact tier: the same losses; ours inside its budget by every meter, and as predicted; a budget of nothing is an error of its row alone."""
    settings = Settings(
        "tiny-qwen2", "450KB", sequence=32, optimizer="sgd", weights="int4", offload=disk_folder, store=disk_folder / "store", effort="fast"
    )
    small = Settings(**{**vars(settings), "budget": "10KB"})
    rows = [Contestant("ours", "ours", settings), Contestant("too small", "ours", small), Contestant("eager", "eager", settings)]
    ours, refused, eager = race(rows, 2, text, Progress(quiet=True))
    assert ours.losses == eager.losses
    assert len(ours.seconds) == len(eager.seconds) == 2
    assert 0 < ours.tensor_bytes <= ours.malloc_bytes <= ours.predicted_bytes <= 450_000
    assert ours.tensor_bytes < eager.tensor_bytes
    assert "BudgetInfeasible" in refused.error
    assert not refused.seconds
    printed = table([ours, refused, eager])
    assert "too small: BudgetInfeasible" in printed
    assert f"{eager.median_s / eager.median_s:.2f}" in printed


def test_the_command_writes_table_and_picture(text: Path, disk_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One contestant of each kind that is cheap here."""
    arguments = ["--weights", "int4", "--optimizer", "sgd", "--sequence", "32", "--effort", "fast", "--offload", str(disk_folder), "--quiet"]
    rows = ["--budgets", "1MB", "--peers", "checkpointing,schedule:per_layer,mezo", "--rounds", "1", "--data", str(text)]
    assert main(["bench", "--model", "tiny-qwen2", *arguments, *rows, "--store", str(disk_folder / "store"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for name in ("ours, 1MB", "checkpointing", "schedule:per_layer", "mezo"):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert len(line.split()) >= 7, printed
    assert (tmp_path / "out" / "bench.txt").read_text() in printed
    assert (tmp_path / "out" / "bench.svg").read_text().count("<circle") == 4


def test_bad_requests_are_refused_early(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No rounds, no file, a budget that is none."""
    base = ["bench", "--model", "tiny-qwen2"]
    assert main([*base, "--budgets", "1MB", "--data", str(text), "--rounds", "0"]) == 2
    assert main([*base, "--budgets", "1MB", "--data", str(text) + "x"]) == 2
    assert main([*base, "--budgets", "1MB,much", "--data", str(text)]) == 2
    assert "positive" in capsys.readouterr().err


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    """Where everybody failed there is still a file."""
    assert write_plot([Result("ours", "ours", error="no")], tmp_path / "x.svg").read_text().startswith("<svg")


def test_mezo_moves_against_the_slope() -> None:
    """On a quadratic the two forwards give a step downhill on average, and the perturbation leaves no trace where the slope is zero."""
    import torch

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), 3.0))

        def forward(self, **_: torch.Tensor) -> object:
            return type("Output", (), {"loss": self.weight.square().sum()})

    model = Quadratic()
    step = mezo_step(model, 0.01)
    with torch.no_grad():
        losses = [float(step(input_ids=None, labels=None)) for _ in range(200)]
    assert losses[-1] < 0.1 * losses[0]
    assert mezo_step(Quadratic(), 0.0)(input_ids=None, labels=None) > 0
