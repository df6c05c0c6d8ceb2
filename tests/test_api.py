"""The public API on a small step: programs, guards, cache, comparison, edited code, and what goes wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mebp_compile
from mebp_compile import compiler
from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible, CacheError, DiskError, MebpError, OptionError, StepPoisoned, StoreError
from mebp_compile.runtime.weights import WeightStore

Step = Callable[..., Any]


def small_step(seed: int = 0, width: int = 64) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """A perceptron with dropout and a momentum SGD step step(x, y) -> loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return model, optimizer, step


def batch(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 32), torch.randint(0, 8, (rows,))


@pytest.fixture
def own_cache(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without programs, with the costs that were measured already."""
    for table in cache_folder.glob("costs-*.json"):
        shutil.copy(table, tmp_path)
    monkeypatch.setenv("MEBP_CACHE", str(tmp_path))
    return tmp_path


def test_two_batch_shapes_give_two_programs_and_known_ones_are_reused() -> None:
    """Each batch geometry is planned once, in the same budget."""
    _, _, step = small_step()
    compiled = optimize(step, "10MB", effort="fast")
    for rows in (64, 16, 64, 16):
        compiled(*batch(rows))
    first_call_and_steady = 2  # the momentum buffers come to be in the first step
    assert sum(map(len, compiled.programs.values())) == 2 + first_call_and_steady - 1


def test_a_changed_learning_rate_needs_no_new_program() -> None:
    """Hyper-parameters are live inputs: a scheduler outside the step changes them and the program stays."""
    model, optimizer, step = small_step()
    twin, twin_optimizer, twin_step = small_step()
    compiled = optimize(step, "10MB", effort="fast")
    for lr in (0.1, 0.05, 0.025, 0.0125):
        optimizer.param_groups[0]["lr"] = twin_optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(7)
        ours = compiled(*batch())
        torch.manual_seed(7)
        assert torch.equal(ours, twin_step(*batch()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert sum(map(len, compiled.programs.values())) == 2


def test_plan_is_a_dry_run() -> None:
    """plan() answers without touching the model and without an arena."""
    model, optimizer, step = small_step()
    before = [parameter.clone() for parameter in model.parameters()]
    plan = compiler.plan(step, "10MB", example=batch())
    assert 0 < plan.peak_bytes <= 10**7
    assert plan.time_us >= plan.bound_us > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_compare_says_equal_and_puts_everything_back() -> None:
    """compare() runs both steps from the same state, finds every byte equal, and leaves no trace."""
    model, _, step = small_step()
    compiled = optimize(step, "10MB", effort="fast")
    given = batch()
    compiled(*given)
    before = [parameter.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    comparison = compiled.compare(*given)
    assert comparison.equal, str(comparison)
    assert comparison.measured_bytes == comparison.predicted_bytes
    assert "equal bit for bit" in str(comparison)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())


def test_compare_sees_a_difference(tmp_path: Path) -> None:
    """An edited program that computes something else is caught, with the names of what differs."""
    _, _, step = small_step()
    compiled = optimize(step, "10MB", effort="fast")
    for _ in range(2):
        compiled(*batch())
    edited = tmp_path / "edited.py"
    edited.write_text(
        compiled.code.replace("    return (", "    run.state('0_weight' if False else 'x_0_weight').add_(1e-3)\n    return (", 1)
    )
    compiled.use_code(edited)
    comparison = compiled.compare(*batch())
    assert not comparison.equal
    assert any("0.weight" in name for name in comparison.different)


def test_edited_code_runs(tmp_path: Path) -> None:
    """A program text saved, edited and put back is what runs from then on."""
    _, _, step = small_step()
    compiled = optimize(step, "10MB", effort="fast")
    for _ in range(2):
        compiled(*batch())
    (tmp_path / "edited.py").write_text(compiled.code.replace("    return (", "    print('edited')\n    return (", 1))
    compiled.use_code(tmp_path / "edited.py")
    assert "print('edited')" in compiled.code
    compiled(*batch())


@pytest.mark.usefixtures("own_cache")
def test_a_second_process_finds_the_program_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same step, model and budget nothing is captured or solved again, and the results are the same."""
    _, _, step = small_step()
    first = optimize(step, "10MB", effort="fast", example=batch())
    monkeypatch.setattr(compiler, "build", lambda *_: pytest.fail("planned again"))
    again = optimize(step, "10MB", effort="fast", example=batch())
    assert again.code == first.code
    assert again.plan == first.plan
    torch.manual_seed(3)
    assert torch.isfinite(again(*batch()))


@pytest.mark.usefixtures("own_cache")
def test_the_cache_key_notices_a_changed_model() -> None:
    """Another dropout probability is another program, though every shape is the same."""
    model, _, step = small_step()
    first = optimize(step, "10MB", effort="fast", example=batch())
    model[2].p = 0.25  # type: ignore[union-attr]
    again = optimize(step, "10MB", effort="fast", example=batch())
    assert again.code != first.code


def test_a_failure_in_mid_step_poisons_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception inside the program the step refuses to go on, and says so."""
    _, _, step = small_step()
    compiled = optimize(step, "10MB", effort="fast", example=batch())
    program = compiled.program
    monkeypatch.setattr(program.engine, "at", lambda *_: (_ for _ in ()).throw(OSError("injected")))
    monkeypatch.setattr(program.engine, "new", lambda *_: (_ for _ in ()).throw(OSError("injected")))
    monkeypatch.setattr(program.engine, "state", lambda *_: (_ for _ in ()).throw(OSError("injected")))
    with pytest.raises(OSError, match="injected"):
        compiled(*batch())
    with pytest.raises(StepPoisoned, match="injected"):
        compiled(*batch())


def test_too_small_a_budget_is_refused_with_the_smallest_that_works() -> None:
    """The refusal names the smallest budget found, its lower bound and the op that binds; at that budget the step runs."""
    _, _, step = small_step()
    with pytest.raises(BudgetInfeasible) as caught:
        optimize(step, "1KB", example=batch())
    error = caught.value
    assert 0 < error.lower_bound_bytes <= error.smallest_bytes
    assert error.binding_op in str(error)
    compiled = optimize(step, error.smallest_bytes, example=batch())
    assert compiled.plan.peak_bytes <= error.smallest_bytes
    assert torch.isfinite(compiled(*batch()))


def test_dropped_gradients_are_freed_and_change_nothing_else() -> None:
    """grads="drop" leaves `.grad` None and every parameter as with "keep"; a refusal of "keep" says what it would save."""
    model, _, step = small_step()
    twin, _, twin_step = small_step()
    dropping, keeping = optimize(step, "10MB", grads="drop", effort="fast"), optimize(twin_step, "10MB", effort="fast")
    for _ in range(3):
        for compiled in (dropping, keeping):
            torch.manual_seed(5)
            compiled(*batch())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(BudgetInfeasible, match="drop"):
        optimize(small_step()[2], "1KB", example=batch())


def test_bad_arguments_give_typed_errors(disk_folder: Path) -> None:
    """A step that is no function, an unknown scheme, a missing store: each has its own error and a fix."""
    _, _, step = small_step()
    with pytest.raises(OptionError, match="not a callable"):
        optimize(42, "10MB")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="int5"):
        optimize(step, "10MB", weights="int5")
    with pytest.raises(StoreError):
        WeightStore.open(disk_folder / "absent")
    with pytest.raises(OptionError, match=r"state\[0\]"):
        optimize(step, "10MB", state=["model"])
    with pytest.raises(TypeError):
        optimize(step, "10MB", budgget="10MB")  # type: ignore[call-arg]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder below a file gives a CacheError that tells of MEBP_CACHE, before anything runs."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEBP_CACHE", str(tmp_path / "file" / "cache"))
    _, optimizer, step = small_step()
    with pytest.raises(CacheError, match="MEBP_CACHE"):
        optimize(step, "10MB", example=batch())
    assert not optimizer.state


def test_memory_is_refused_as_a_disk() -> None:
    """Offloading to tmpfs would spend the very memory that it is to save."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm")
    _, _, step = small_step(width=256)
    with pytest.raises(DiskError):
        optimize(step, "1MB", offload="/dev/shm", example=batch(512))


def test_a_step_not_yet_captured_says_so() -> None:
    """Inspection before the first call has its own error."""
    _, _, step = small_step()
    compiled = optimize(step, "10MB")
    with pytest.raises(MebpError, match="not been captured"):
        _ = compiled.code
    assert "not been captured" in str(compiled)


def test_imports_stay_light() -> None:
    """`import solvers` and reading artifacts leave torch out; `import mebp_compile` leaves torch, ortools and transformers out."""
    code = "import sys, solvers, mebp_compile, mebp_compile.cli; print(sorted({'torch', 'ortools', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert mebp_compile.__version__
