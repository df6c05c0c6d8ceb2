"""solvers.tuned and solvers.compare: schedules that fit, and a table that says who is faster."""

from pathlib import Path

import pytest
from generators import transformer

from solvers.__main__ import main
from solvers.baselines import SCHEMES, keep_all, per_layer, recompute_all, sqrt_n
from solvers.check import replay
from solvers.compare import comparison, fastest_us
from solvers.decode import Tables
from solvers.tuned import TUNED, knapsack, per_layer_tuned

PROBLEM = transformer(3, 16, 32, adam=False)
WHOLE = replay(PROBLEM, keep_all(PROBLEM), False).peak_bytes


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.05])
@pytest.mark.parametrize("name", TUNED)
def test_tuned_schedules_fit_or_are_none(name: str, share: float) -> None:
    """Whatever the budget; and the less there is, the slower."""
    problem = PROBLEM.with_budget(int(share * WHOLE))
    state = TUNED[name](Tables(problem))
    assert state is None or state.profile.peak_bytes <= problem.budget_bytes
    assert state is not None or share < 0.6
    loose = TUNED[name](Tables(PROBLEM.with_budget(2 * WHOLE)))
    assert loose is not None
    assert state is None or state.profile.compute_us >= loose.profile.compute_us


def test_tuning_lies_between_the_fixed_schedules() -> None:
    """At per_layer's own peak, or where nothing has to run again, it is as fast as that; between them, between them."""
    fixed = replay(PROBLEM, per_layer(PROBLEM), False)
    at_its_peak = per_layer_tuned(Tables(PROBLEM.with_budget(fixed.peak_bytes)))
    assert at_its_peak is not None
    assert at_its_peak.profile.peak_bytes <= fixed.peak_bytes
    loose = per_layer_tuned(Tables(PROBLEM.with_budget(2 * WHOLE)))
    middle = per_layer_tuned(Tables(PROBLEM.with_budget((fixed.peak_bytes + WHOLE) // 2)))
    assert loose is not None
    assert middle is not None
    assert loose.profile.compute_us <= middle.profile.compute_us <= at_its_peak.profile.compute_us


def test_sqrt_n_keeps_less_between_layers() -> None:
    """Three layers in two segments: what passes between the layers of a segment is made again too, but not all that can be."""
    schedules = [sqrt_n(PROBLEM), per_layer(PROBLEM)]
    reports = [replay(PROBLEM, schedule, False) for schedule in schedules]
    assert reports[0].recomputes > reports[1].recomputes > 0
    assert reports[0].recomputes <= replay(PROBLEM, recompute_all(PROBLEM), False).recomputes


def test_a_knapsack_of_everything_keeps_everything() -> None:
    """With room for all no op of the forward that the backward reads runs again."""
    state = knapsack(Tables(PROBLEM.with_budget(10 * WHOLE)))
    assert state is not None
    assert state.profile.compute_us <= replay(PROBLEM, keep_all(PROBLEM), False).time_us * 1.2


def test_every_line_of_the_table() -> None:
    """Each fixed schedule at its own peak, each tuned one at each budget; what is solved is never slower."""
    lines = list(comparison(PROBLEM, [WHOLE, int(0.7 * WHOLE), 1], "fast", 5.0))
    assert len(lines) == 1 + len(SCHEMES) + 3 * len(TUNED)
    ratios = [float(line.split()[6]) for line in lines[1:] if line.split()[-1] != "-"]
    assert len(ratios) >= len(SCHEMES) + 2 * len(TUNED) - 1
    assert max(ratios) <= 1.0


@pytest.mark.parametrize("name", SCHEMES)
def test_overlapping_never_loses(name: str) -> None:
    """Transfers overlapped in the bytes that the schedule has anyway."""
    tables = Tables(PROBLEM)
    state = SCHEMES[name](tables)
    assert fastest_us(PROBLEM.with_budget(state.profile.peak_bytes), state) <= state.profile.time_us


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "problem.json"
    path.write_text(transformer(2, 16, 16).to_json())
    assert main(["compare", str(path), "--budgets", "90%", "--effort", "fast"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(SCHEMES) + len(TUNED)
