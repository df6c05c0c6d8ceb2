"""A step on an accelerator, whole: captured, planned under a device and a host budget, generated, run on a fake one whose streams run as early or
as late as they may. Equal to eager bit for bit, and inside both budgets."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from law1 import assert_same_training, estimated_costs
from models import Recipe, Training

from mebp_compile import cache, compiler
from mebp_compile.capture import devices
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.config import Budget
from mebp_compile.errors import BudgetError, BudgetInfeasible, OptionError, Unsupported

sys.path.insert(0, str(Path(__file__).parent / "runtime"))
from fake_accelerator import COMPUTE, FakeAccelerator

PLACE = "fake:0"


@pytest.fixture
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """What has dimensions is on it; numbers are on the host, as an optimizer's step counts are. Its copies come late, unless a test says when."""
    fake = FakeAccelerator(late=getattr(request, "param", True))
    monkeypatch.setattr(devices, "place_of", lambda tensor: PLACE if tensor.dim() else "")
    monkeypatch.setattr(devices, "torch_device", lambda place: torch.device("cpu"))
    monkeypatch.setattr(compiler, "accelerator_of", lambda place: fake if place else None)
    return fake


@functools.cache
def limits(recipe: Recipe, host: int | str = "1GB", weights: str | None = None) -> tuple[int, int]:
    """The smallest device budget found, and what keep-all needs."""
    training = recipe.build()
    with estimated_costs():
        with pytest.raises(BudgetInfeasible) as refusal:
            step_of(training, Budget(device=1 << 10, host=host), weights).prepare(*training.batch(0))
        other = recipe.build()
        step = step_of(other, Budget(device=1 << 34, host=host), weights)
        step.prepare(*other.batch(0))
    return refusal.value.smallest_bytes, step.plan.keep_all_bytes


def step_of(training: Training, budget: Budget, weights: str | None = None) -> CompiledStep:
    return optimize(training.step, budget, offload="host", weights=weights, effort="fast", cache=False)


def check(step: CompiledStep, accelerator: FakeAccelerator, budget: Budget) -> None:
    """Both budgets hold, by what was reserved; the copies are on their own streams."""
    plan = step.plan
    assert plan.peak_bytes <= budget.size_bytes
    assert plan.report.away_bytes <= budget.host_bytes
    assert sum(accelerator.pinned_bytes) <= budget.host_bytes
    assert step.program.engine.accelerator is accelerator
    assert {entry[0] for entry in accelerator.module.log if entry[1] == "copies"} <= {"read", "write"}
    waits = sum(1 for entry in accelerator.module.log if entry[0] == COMPUTE)
    assert waits >= plan.report.prefetches + plan.report.offloads


@pytest.mark.parametrize(
    ("recipe", "fraction"),
    [
        (Recipe("qwen2", "sgd", sequence=8), 0.1),
        (Recipe("gpt2", "sgd", dropout=0.1), 0.1),
        pytest.param(Recipe("resnet", "sgd-momentum"), 0.0, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.family if isinstance(value, Recipe) else str(value),
)
@pytest.mark.parametrize("accelerator", [False, True], ids=["early", "late"], indirect=True)
def test_same_bits_inside_both_budgets(recipe: Recipe, fraction: float, accelerator: FakeAccelerator) -> None:
    """Activations, parameters and optimizer state go to host memory and come back."""
    smallest, keep_all = limits(recipe)
    accelerator.pinned_bytes.clear()
    budget = Budget(device=int(smallest + fraction * (keep_all - smallest)), host="1GB")
    step = assert_same_training(recipe.build, budget, offload="host")
    assert step.plan.report.prefetches > 0
    assert "# from host, " in step.code
    assert "disk" not in step.code + str(step) + step.explain()
    assert "for what leaves the device" in str(step)
    check(step, accelerator, budget)


def test_a_small_host_recomputes_instead(accelerator: FakeAccelerator) -> None:
    """At a device budget that needs no host: with less of it, and with next to none, the step still runs, no faster."""
    recipe = Recipe("qwen2", "sgd")
    size, times = int(1.02 * limits(recipe, host=1)[0]), []
    for host_bytes in (10**9, 1):
        accelerator.pinned_bytes.clear()
        budget = Budget(device=size, host=host_bytes)
        step = assert_same_training(recipe.build, budget, offload="host", calls=2)
        check(step, accelerator, budget)
        times.append(step.plan.report.time_us)
    assert step.plan.report.recomputes > 0 == step.plan.report.offloads
    assert times == sorted(times)


def test_packed_weights_lie_in_host_memory(accelerator: FakeAccelerator) -> None:
    """Read from the store once, and copied to the device before each use; the same losses as with room for all of them there, or for some, which
    leave the device in mid-step."""
    recipe = Recipe("qwen2", "sgd", lora="float32")
    smallest, keep_all = limits(recipe, weights="int8")
    losses, left = [], set[str]()
    for size in (smallest, *(int(smallest + share * (keep_all - smallest)) for share in (0.2, 0.4, 0.6)), 2 * keep_all):
        training = recipe.build()
        with estimated_costs():
            step = step_of(training, Budget(device=size, host="1GB"), "int8")
            losses.append([float(step(*training.batch(call)).detach()) for call in range(3)])
        stream = step.program.engine.weights
        assert stream is not None
        assert stream.host is not None
        left |= stream.at_home & set(stream.host.slots)
        if size == smallest:
            assert len(stream.host.slots) > 10
            assert step.plan.report.prefetches > len(stream.host.slots)
    assert left
    assert all(other == losses[0] for other in losses)


def test_what_is_refused(accelerator: FakeAccelerator, disk_folder: Path) -> None:
    """Each with what to write instead."""
    training = Recipe("qwen2", "sgd").build()
    with pytest.raises(OptionError, match="needs a limit"):
        optimize(training.step, "1MB", offload="host")
    with pytest.raises(OptionError, match="not to a folder"):
        optimize(training.step, "1MB", offload=disk_folder)
    with pytest.raises(OptionError, match="counts memory of the CPU"):
        optimize(training.step, Budget("1GB", scope="process"))
    with pytest.raises(BudgetError, match="give one of them"):
        Budget("1GB", device="1GB")


def test_a_fixed_schedule_has_its_own_needs(accelerator: FakeAccelerator) -> None:
    """It is the same whatever the budget, so a host too small for it is refused, with what it needs."""
    training = Recipe("qwen2", "sgd", lora="float32").build()
    fixed = optimize(training.step, Budget(device="1GB", host=1), offload="host", weights="int8", solver="per_layer", cache=False)
    with estimated_costs(), pytest.raises(BudgetError, match="bytes in host memory"):
        fixed.prepare(*training.batch(0))


def test_a_kept_program_is_for_its_device(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text names the device: the same step on the CPU, or on another accelerator, has another program."""
    training, keys = Recipe("qwen2", "sgd").build(), set()
    monkeypatch.setattr(cache, "fingerprint", lambda device: "the same machine")
    step = optimize(training.step, "1GB", cache=False)
    for place in ("", "fake:0", "fake:1"):
        monkeypatch.setattr(devices, "place_of", lambda tensor, place=place: place)
        keys.add(cache.program_key(step.step_fn, step.state, step.options, (), None))
    assert len(keys) == 3


def test_a_host_is_beside_an_accelerator() -> None:
    """On the CPU there is none."""
    training = Recipe("qwen2", "sgd").build()
    for budget, offload in (("1MB", "host"), (Budget(device="1MB", host="1MB"), None)):
        with pytest.raises(OptionError, match="on the CPU"):
            optimize(training.step, budget, offload=offload)


def test_two_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has one."""
    monkeypatch.setattr(devices, "place_of", lambda tensor: f"fake:{len(tensor.shape)}")
    with pytest.raises(Unsupported, match="fake:1, fake:2"):
        optimize(Recipe("qwen2", "sgd").build().step, "1MB")
