"""A saved step in a lean process: the same bits without the planner, its state saved and loaded, budgets of the whole process, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import WIDTH, adamw, chain, channels_last, momentum, sgd
from law1 import assert_same, bits, describe, estimated_costs
from models import Recipe, Training

import mebp_compile
from mebp_compile import Budget, compiler, process_budget
from mebp_compile.capture import find_state
from mebp_compile.cli import main
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetError, BudgetInfeasible, LeanError, OptionError, StepPoisoned, StoreError
from mebp_compile.lean import LeanStep, load_lean
from mebp_compile.lean_process import try_out
from mebp_compile.runtime.state import LiveState

BASELINE_BYTES = 155_000_000  # what a lean process held where this was written; tests that need a true one measure it
COMPARED = ("parameter", "optimizer", "buffer", "gradient")
HEAVY = ("transformers", "peft", "ortools", "networkx", "sympy", "solvers", "models", "torch._dynamo", "torch._inductor")
PLANNER = ("compiler", "planning", "codegen", "cost", "place", "runtime.setup", "runtime.program", "artifacts", "finetune", "explain", "viz")
TINY = ["--model", "tiny-qwen2", "--sequence", "32", "--dtype", "float32", "--effort", "fast", "--quiet"]


@pytest.fixture(autouse=True)
def estimates() -> Iterator[None]:
    with estimated_costs():
        yield


def saved(training: Training, folder: Path, offload: Path | None = None, budget: int | str = "1GB", **options: Any) -> CompiledStep:
    """The compiled step, saved before its first call."""
    compiled = optimize(training.step, budget, offload=offload, effort="fast", cache=False, example=training.batch(0), **options)
    compiled.save(folder)
    return compiled


def least(training: Training, offload: Path) -> int:
    with pytest.raises(BudgetInfeasible) as refused:
        optimize(training.step, 1, offload=offload, effort="fast", cache=False, example=training.batch(0))
    return refused.value.smallest_bytes


def assert_same_state(where: str, lean: LeanStep, training: Training) -> None:
    """Every parameter, buffer, gradient and entry of optimizer state, as bits."""
    live = LiveState(find_state(training.step), {})
    sources = sorted(source for source in lean.sources if source.split(":")[0] in COMPARED)
    assert sources
    for source in sources:
        assert_same(f"{where}: {source}", {source: bits(live.getter(source)())}, {source: bits(lean.tensor(source))})


def run_all(own: Training, other: Training | None, compiled: CompiledStep | None, lean: LeanStep, calls: range) -> None:
    """The same calls eagerly, compiled and lean, from one state of the generator: results and state are compared after each."""
    for call in calls:
        start = torch.get_rng_state()
        expected = describe(own.step(*own.batch(call)))
        drawn = torch.get_rng_state()
        if compiled is not None and other is not None:
            torch.set_rng_state(start)
            assert_same(f"compiled {call}", expected, describe(compiled(*other.batch(call))))
        torch.set_rng_state(start)
        assert_same(f"lean {call}", expected, describe(lean(*own.batch(call))))
        assert torch.equal(torch.get_rng_state(), drawn)
        assert_same_state(f"call {call}", lean, own)


# --- the same bits ---


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: chain(adamw), 1.0),
        (lambda: chain(adamw), 1.4),
        (lambda: chain(adamw, dropout=0.2), 1.2),
        (lambda: chain(sgd), 1.0),
        (Recipe(lora="float32").build, 1.1),
        (Recipe(family="gpt2", dropout=0.1, mask=None, returns="dict").build, 1.3),
        (Recipe(zero="first", mask="padded").build, 1.3),
        (Recipe(family="resnet", optimizer="sgd").build, 1.3),
        (channels_last, 1.0),
    ],
    ids=["adamw-least", "adamw", "dropout", "sgd", "lora", "gpt2-dict", "gradients-kept", "resnet", "channels-last"],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT uses the old name
def test_steps_equal_compiled_and_eager_ones(make: Callable[[], Training], share: float, disk_folder: Path) -> None:
    """Three steps of the loaded step give the bits of the compiled step and of eager: results, parameters, optimizer state on disk or not,
    buffers, gradients, and the generator."""
    own, other = make(), make()
    budget = int(share * least(make(), disk_folder))
    compiled = saved(other, disk_folder / "step", disk_folder, budget)
    lean = load_lean(disk_folder / "step")
    assert lean.homes is not None
    assert lean.homes.away == frozenset(lean.binding.away.values())  # already: loading never holds all of the state
    assert lean.homes.away or share > 1.0
    run_all(own, other, compiled, lean, range(3))
    again = load_lean(disk_folder / "step", state=lean.save_state(disk_folder / "trained"))
    run_all(own, None, None, again, range(3, 4))


def test_streamed_weights_are_those_of_the_store(disk_folder: Path) -> None:
    """A step on int4 weights, whose temporary store is kept beside it, gives the compiled step's bits; another store there is refused."""
    own = Recipe(lora="float32", config=(("hidden_size", 64), ("intermediate_size", 128))).build()
    compiled = saved(own, disk_folder / "step", disk_folder, weights="int4")
    lean = load_lean(disk_folder / "step")
    for call in range(3):
        assert_same(f"call {call}", describe(compiled(*own.batch(call))), describe(lean(*own.batch(call))))
    manifest = disk_folder / "step" / "weights" / "manifest.json"
    assert manifest.is_file()
    manifest.unlink()
    with pytest.raises(StoreError):
        load_lean(disk_folder / "step")


def test_a_step_saved_in_mid_training_goes_on(disk_folder: Path) -> None:
    """Momentum that the first call made is in a step saved after it; what lies on disk then is saved too."""
    own, other = chain(momentum), chain(momentum)
    for training in (own, other):
        training.step(*training.batch(0))
    compiled = optimize(other.step, least(chain(momentum), disk_folder) * 2, offload=disk_folder, effort="fast", cache=False)
    own.step(*own.batch(1))
    compiled(*other.batch(1))
    compiled.save(disk_folder / "step")
    run_all(own, other, compiled, load_lean(disk_folder / "step"), range(2, 5))


def test_learning_rates_stay_live(disk_folder: Path) -> None:
    """A changed param group changes the next step as it does eagerly; one that a guard relies on asks for another plan."""
    own, other = chain(adamw), chain(adamw)
    saved(other, disk_folder / "step")
    lean = load_lean(disk_folder / "step")
    for number in (0.05, 0.003):
        own.optimizers[0].param_groups[0]["lr"] = number
        next(iter(lean.optimizers.values())).param_groups[0]["lr"] = number
        run_all(own, None, None, lean, range(2))
    next(iter(lean.optimizers.values())).param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(LeanError, match="guard"):
        lean(*own.batch(0))


def test_an_edited_program_is_compiled_again(disk_folder: Path) -> None:
    """program.pyc counts only for the very text beside it: an edited program runs, a broken one is a typed error."""
    own = chain(adamw)
    saved(own, disk_folder / "step")
    program = disk_folder / "step" / "program.py"
    text = program.read_text()
    program.write_text(text.replace("    return (", "    print('edited')\n    return ("))
    before = (disk_folder / "step" / "program.pyc").read_bytes()
    run_all(own, None, None, load_lean(disk_folder / "step"), range(1))
    assert (disk_folder / "step" / "program.pyc").read_bytes() != before
    for broken in ("def train_step(:\n", "x = 1\n"):
        program.write_text(broken)
        with pytest.raises(mebp_compile.errors.MebpError, match=r"not Python|train_step"):
            load_lean(disk_folder / "step")


# --- a lean process ---


SCRIPT = """
import json, sys
from mebp_compile.lean_process import become_lean
become_lean()
import torch
from mebp_compile.lean import load_lean
step = load_lean(sys.argv[1])
losses = [step(*(torch.full(shape, value, dtype=dtype) for shape, dtype in step.batch_tensors())).item().hex() for value in range(3)]
step.save_state(sys.argv[2])
print(json.dumps({"losses": losses, "modules": sorted(sys.modules)}))
"""


def lean_child(folder: Path, trained: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_nothing_of_the_planner_is_imported(disk_folder: Path) -> None:
    """In a new process a saved LoRA step on int4 weights loads, runs and saves with the same losses, and neither transformers, PEFT, the
    solver and its libraries, sympy nor the planning modules of this package are in sys.modules."""
    own = Recipe(lora="float32", mask=None, config=(("hidden_size", 64), ("intermediate_size", 128))).build()
    inner = own.step
    own.step, own.batch = lambda ids: inner(ids, None), lambda call: (torch.full((2, 16), call, dtype=torch.int64),)
    compiled = saved(own, disk_folder / "step", disk_folder, weights="int4")
    answer = lean_child(disk_folder / "step", disk_folder / "trained")
    assert answer["losses"] == [compiled(*own.batch(call)).item().hex() for call in range(3)]
    forbidden = {*HEAVY, *(f"mebp_compile.{name}" for name in PLANNER)}
    assert forbidden.isdisjoint(answer["modules"])
    assert (disk_folder / "trained" / "adapter_model.safetensors").is_file()


# --- state ---


def test_saved_state_goes_on_bit_for_bit(disk_folder: Path) -> None:
    """A step loaded with a state that was saved in mid-training, param groups and generator included, does what the first one does."""
    own = chain(adamw, dropout=0.3)
    saved(own, disk_folder / "step", disk_folder, 2 * least(chain(adamw, dropout=0.3), disk_folder))
    first = load_lean(disk_folder / "step")
    first(*own.batch(0))
    next(iter(first.optimizers.values())).param_groups[0]["lr"] = 0.07
    first(*own.batch(1))
    first.save_state(disk_folder / "trained")
    expected = [describe(first(*own.batch(call))) for call in (2, 3)]
    second = load_lean(disk_folder / "step", state=disk_folder / "trained")
    assert [describe(second(*own.batch(call))) for call in (2, 3)] == expected
    assert first.sources == second.sources
    for source in first.sources:
        assert bits(first.tensor(source)) == bits(second.tensor(source))


def test_trained_parameters_are_a_file_for_other_readers(disk_folder: Path) -> None:
    """parameters.safetensors has each trained parameter under its name, as the safetensors library reads it."""
    from safetensors.torch import load_file

    own = chain(adamw)
    saved(chain(adamw), disk_folder / "step")
    lean = load_lean(disk_folder / "step")
    run_all(own, None, None, lean, range(2))
    trained = load_file(lean.save_state(disk_folder / "trained") / "parameters.safetensors")
    expected = own.modules[0].state_dict()
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_saved_as_peft_saves_them(disk_folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json equal those that PEFT's own save_pretrained writes after the same steps."""
    from safetensors.torch import load_file

    own = Recipe(lora="float32").build()
    saved(Recipe(lora="float32").build(), disk_folder / "step")
    lean = load_lean(disk_folder / "step")
    run_all(own, None, None, lean, range(2))
    lean.save_state(disk_folder / "ours")
    own.modules[0].save_pretrained(str(disk_folder / "peft"), save_embedding_layers=False)
    ours, theirs = (load_file(disk_folder / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((disk_folder / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


# --- refusals ---


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: chain(momentum), "makes state"),
        (Recipe(returns="output").build, "class of a library"),
    ],
    ids=["first-call", "library-class"],
)
def test_what_can_not_be_lean_says_why(make: Callable[[], Training], words: str, disk_folder: Path) -> None:
    """Such a step is saved for `mebp check` all the same; loading it as a lean one is a LeanError with its reason and what to try."""
    saved(make(), disk_folder / "step")
    assert main(["check", str(disk_folder / "step")]) == 0
    with pytest.raises(LeanError, match=words) as refused:
        load_lean(disk_folder / "step")
    assert refused.value.fix


def test_folders_that_are_no_saved_step(tmp_path: Path) -> None:
    """No lean.json, one that is not JSON, and one of another format are typed errors."""
    with pytest.raises(LeanError, match=r"lean\.json"):
        load_lean(tmp_path)
    for text in ("{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "binding": {}}'):
        (tmp_path / "lean.json").write_text(text)
        with pytest.raises(StoreError):
            load_lean(tmp_path)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "program.py"])
def test_damage_is_found(name: str, disk_folder: Path) -> None:
    """A changed or missing file of the state, or no program, is a StoreError or LeanError, never a wrong number."""
    saved(chain(adamw), disk_folder / "step")
    file = disk_folder / "step" / name
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    if name != "program.py":
        file.write_bytes(raw)
        with pytest.raises(StoreError):
            load_lean(disk_folder / "step")
    file.unlink()
    with pytest.raises((StoreError, LeanError)):
        load_lean(disk_folder / "step")


def test_another_batch_or_torch_is_refused(disk_folder: Path) -> None:
    """A batch of another shape, and a step planned with another torch or other settings, give a LeanError that names both sides."""
    saved(chain(adamw), disk_folder / "step")
    lean = load_lean(disk_folder / "step")
    with pytest.raises(LeanError, match=r"\(5, 64\).*\(4, 64\)"):
        lean(torch.zeros(5, WIDTH))
    with pytest.raises(LeanError, match="batch"):
        lean(torch.zeros(4, WIDTH), 1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(LeanError, match="set up"):
            load_lean(disk_folder / "step")
    finally:
        torch.use_deterministic_algorithms(False)
    path = disk_folder / "step" / "lean.json"
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(LeanError, match=r"torch 1\.0"):
        load_lean(disk_folder / "step")


def test_a_failed_step_poisons_and_is_not_saved(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in mid-step neither a call nor save_state goes on; a step loaded anew does."""
    own = chain(adamw)
    saved(own, disk_folder / "step")
    lean = load_lean(disk_folder / "step")
    monkeypatch.setattr(lean, "function", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lean(*own.batch(0))
    with pytest.raises(StepPoisoned):
        lean(*own.batch(0))
    with pytest.raises(StepPoisoned):
        lean.save_state(disk_folder / "trained")
    run_all(own, None, None, load_lean(disk_folder / "step"), range(1))


def test_a_poisoned_step_is_saved_without_its_state(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed call the plan can still be saved and checked, but not run."""
    own = chain(adamw)
    compiled = saved(own, disk_folder / "step")
    monkeypatch.setattr(compiled.program, "function", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compiled(*own.batch(0))
    compiled.save(disk_folder / "step")
    assert main(["check", str(disk_folder / "step")]) == 0
    with pytest.raises(LeanError, match="failed in mid-step"):
        load_lean(disk_folder / "step")


# --- budgets of the whole process ---


@pytest.fixture
def fixed_baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A baseline that is not measured here, and how often it was asked for."""
    asked: list[int] = []
    monkeypatch.setenv("MEBP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(process_budget, "_measured", lambda: asked.append(1) or BASELINE_BYTES)
    return asked


def test_a_budget_below_the_baseline_is_refused_by_name(fixed_baseline: list[int]) -> None:
    """The error says what interpreter and torch alone hold; it is measured once a machine and then known."""
    own = chain(adamw)
    for _ in range(2):
        with pytest.raises(BudgetError, match=f"{BASELINE_BYTES:,}") as refused:
            optimize(own.step, Budget("100MB", scope="process"))
        assert "process" in refused.value.fix
    assert len(fixed_baseline) == process_budget.RUNS


def test_a_process_budget_leaves_the_step_what_remains(fixed_baseline: list[int]) -> None:
    """The plan's budget is the process's without baseline and program; too little is refused in the process's bytes, and those then fit."""
    own = chain(adamw)

    def planned(size: int) -> CompiledStep:
        return optimize(own.step, Budget(size, scope="process"), effort="fast", cache=False, example=own.batch(0))

    compiled = planned(200_000_000)
    besides = process_budget.own_bytes(compiled.options, compiled.graph, kernel_bytes=0)  # as the estimates say
    assert besides > BASELINE_BYTES
    assert compiled.plan.problem.budget_bytes == 200_000_000 - besides
    with pytest.raises(BudgetError, match=f"{BASELINE_BYTES:,}"):
        planned(BASELINE_BYTES + 1)
    with pytest.raises(BudgetInfeasible, match="lean process holds") as refused:
        planned(besides + 1)
    assert refused.value.lower_bound_bytes > BASELINE_BYTES
    assert f'Budget({refused.value.smallest_bytes}, scope="process")' in refused.value.fix
    assert planned(refused.value.smallest_bytes).plan.peak_bytes <= refused.value.smallest_bytes - besides


def test_a_process_budget_holds_in_a_lean_process_and_is_not_claimed_elsewhere(disk_folder: Path) -> None:
    """Three steps in a child stay inside the budget, baseline included; the planning process, which holds more, refuses to run it."""
    own = chain(adamw)
    baseline_bytes = process_budget.baseline_bytes()
    budget_bytes = baseline_bytes + 16_000_000
    compiled = saved(own, disk_folder / "step", disk_folder, Budget(budget_bytes, scope="process"))
    with pytest.raises(LeanError, match="process budget"):
        compiled(*own.batch(0))
    found = try_out(disk_folder / "step")
    assert 50_000_000 < baseline_bytes - 8_000_000 < found["peak_bytes"] <= budget_bytes
    ballast = torch.ones(budget_bytes // 4)
    with pytest.raises(BudgetError, match="besides the step's state"):
        load_lean(disk_folder / "step")
    assert ballast.sum() > 0


# --- the command line ---


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def test_run_trains_as_train_does(text: Path, disk_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`mebp plan --out` and then `mebp run` give the losses and the adapter of `mebp train`, and `--state` goes on from there."""
    from safetensors.torch import load_file

    monkeypatch.setenv("MEBP_CACHE", str(disk_folder / "cache"))
    shared = [*TINY, "--budget", "4MB", "--lr", "0.01", "--offload", str(disk_folder)]
    steps = ["--data", str(text), "--steps", "4"]
    assert main(["train", *shared, *steps, "--log", str(disk_folder / "train.jsonl"), "--adapter-out", str(disk_folder / "trained")]) == 0
    assert main(["plan", *shared, "--out", str(disk_folder / "step")]) == 0
    capsys.readouterr()
    run = ["run", str(disk_folder / "step"), "--quiet", *steps, "--adapter-out", str(disk_folder / "run"), "--log", str(disk_folder / "run.jsonl")]
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "process RssAnon at most" in printed
    losses = [[json.loads(line)["loss"] for line in (disk_folder / name).read_text().splitlines()] for name in ("train.jsonl", "run.jsonl")]
    assert losses[0] == losses[1]
    ours, theirs = (load_file(disk_folder / name / "adapter_model.safetensors") for name in ("run", "trained"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main([*run, "--state", str(disk_folder / "run")]) == 0
    assert [json.loads(line)["loss"] for line in (disk_folder / "run.jsonl").read_text().splitlines()] != losses[0]


def test_mistakes_of_run_are_told(text: Path, tmp_path: Path, disk_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, no data, no steps, a step that takes another batch: status 2 and what to try."""
    saved(chain(adamw), disk_folder / "step")
    good = ["run", str(disk_folder / "step"), "--data", str(text), "--steps", "1"]
    for arguments in (
        ["run", str(tmp_path), "--data", str(text), "--steps", "1"],
        ["run", str(disk_folder / "step"), "--data", "nowhere", "--steps", "1"],
        [*good[:-1], "0"],
        good,
    ):
        assert main(arguments) == 2
        assert "try:" in capsys.readouterr().err


def test_the_public_names_are_there() -> None:
    """Budget and load_lean are names of the package; a budget knows its bytes and its scope."""
    assert mebp_compile.load_lean is load_lean
    assert Budget("256MB", scope="process") == Budget(256_000_000, "process")
    assert Budget("1KiB").scope == "step"
    with pytest.raises(OptionError):
        Budget("1GB", scope="planet")
    with pytest.raises(BudgetError):
        Budget("lots")
    assert compiler.optimize is mebp_compile.optimize
