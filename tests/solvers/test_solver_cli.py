"""python -m solvers: solve, check, and errors on one line."""

import re
from pathlib import Path

import pytest
from generators import layered

from solvers.__main__ import main, parse_budget


@pytest.fixture
def problem_path(tmp_path: Path) -> Path:
    path = tmp_path / "problem.json"
    path.write_text(layered(0, 16).to_json())
    return path


def test_solve_writes_what_check_accepts(problem_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The written schedule replays at the same budget with the same summary."""
    out = problem_path.with_name("schedule.json")
    arguments = [str(problem_path), "--budget", "80%"]
    assert main(["solve", *arguments, "--effort", "fast", "--out", str(out), "--steps"]) == 0
    solved = capsys.readouterr().out
    assert main(["check", str(problem_path), str(out), "--budget", "80%"]) == 0
    checked = capsys.readouterr().out
    assert solved.startswith(checked.rstrip())
    assert "gap" in solved
    assert "run      loss" in solved


def test_a_schedule_in_one_arena(problem_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its arena is named, and what is written replays."""
    out = problem_path.with_name("schedule.json")
    assert main(["solve", str(problem_path), "--budget", "80%", "--effort", "fast", "--arena", "--out", str(out)]) == 0
    line = r"arena +[0-9,]+ bytes, [0-9.-]+ % above the most at once as solved, [0-9.]+ % above its own; step \+[0-9.]+ %"
    assert re.search(line, capsys.readouterr().out)
    assert main(["check", str(problem_path), str(out), "--budget", "80%"]) == 0


def test_errors_are_one_line_and_exit_code_1(problem_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An impossible budget, a budget that isn't one, a missing file and a broken schedule are reported, not raised."""
    broken = problem_path.with_name("broken.json")
    broken.write_text('{"resident": [], "steps": []}')
    for arguments in (
        ["solve", str(problem_path), "--budget", "1"],
        ["solve", str(problem_path), "--budget", "lots"],
        ["solve", str(problem_path.with_name("missing.json"))],
        ["check", str(problem_path), str(broken)],
    ):
        assert main(arguments) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_budgets() -> None:
    """Bytes, decimal and binary units, and percentages of the keep-all peak."""
    problem = layered(0, 16)
    assert [parse_budget(text, problem) for text in ("123", "2KB", "1.5MiB", "1 GB")] == [123, 2000, 1572864, 10**9]
    assert parse_budget("50%", problem) == parse_budget("100%", problem) // 2
