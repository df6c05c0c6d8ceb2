"""Homes on disk: parameters and optimizer state that lie in a file between steps train as they do in memory, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from chains import WIDTH, adamw, chain, momentum, sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from law1 import assert_same, bits, describe, estimated_costs, snapshot
from models import Recipe, Training
from torch import nn

import solvers
from mebp_compile import compiler
from mebp_compile.capture import State
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetInfeasible, DiskError, MebpError, StepPoisoned
from mebp_compile.measure import disk, file_io, transfer_queue
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.runtime import arena
from mebp_compile.runtime.all_state import state_dict
from mebp_compile.runtime.home_store import HomeStore, Room
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.metering import meter_process
from solvers.decode import Decisions, Tables, decode
from solvers.emit import emit, synchronous
from solvers.solve import Solution

WIDER = (("num_hidden_layers", 1), ("hidden_size", 64), ("intermediate_size", 256))


@pytest.fixture(autouse=True)
def estimates() -> Iterator[None]:
    with estimated_costs():
        yield


def compiled_step(training: Training, budget: int, folder: Path | None, **options: Any) -> CompiledStep:
    return optimize(training.step, budget, offload=folder, effort="fast", cache=False, **options)


def smallest_budget(training: Training, folder: Path | None, call: int = 0) -> int:
    """The smallest budget found for the batch of `call`."""
    with pytest.raises(BudgetInfeasible) as refused:
        compiled_step(training, 1, folder, example=training.batch(call))
    return refused.value.smallest_bytes


def state_bytes(training: Training) -> int:
    """Bytes of parameters and optimizer state."""
    tensors = [p for module in training.modules for p in module.parameters()]
    tensors += [v for o in training.optimizers for entries in o.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def all_state(training: Training) -> dict[str, Any]:
    """Eager's side of `CompiledStep.state_dict`."""
    return {"model": training.modules[0].state_dict(), "optimizer": training.optimizers[0].state_dict()}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by path, as comparable bits."""
    if isinstance(tree, dict):
        return {key: leaf for name, part in tree.items() for key, leaf in flat(part, f"{path}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {key: leaf for index, part in enumerate(tree) for key, leaf in flat(part, f"{path}/{index}").items()}
    return {path: bits(tree)}


def run_both(own: Training, other: Training, compiled: CompiledStep, calls: range) -> None:
    """Steps both ways; results and all state, wherever it lies, are compared after each."""
    for call in calls:
        expected, returned = own.step(*own.batch(call)), compiled(*other.batch(call))
        assert_same(f"call {call}: returned", describe(expected), describe(returned))
        assert_same(f"call {call}", flat(all_state(own)), flat(compiled.state_dict()))


# --- training ---


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT uses the old name
@pytest.mark.parametrize(
    ("make", "share"),
    [
        (Recipe(config=WIDER).build, 0.5),
        (Recipe(lora="float32", config=WIDER).build, 0.8),
        (lambda: chain(adamw), 0.5),
        (lambda: chain(momentum), 0.55),
        (lambda: chain(sgd), 0.9),
    ],
    ids=["qwen2-adamw", "qwen2-lora", "adamw", "sgd-momentum", "sgd"],
)
def test_training_below_the_size_of_its_state(make: Callable[[], Training], share: float, disk_folder: Path) -> None:
    """Three steps inside a share of the bytes of parameters and optimizer state leave what eager leaves; then all comes back."""
    own, other = make(), make()
    for training in (own, other):  # SGD's momentum buffers come to be in the first step, as results, which lie in memory
        training.step(*training.batch(0))
    compiled = compiled_step(other, int(share * state_bytes(other)), disk_folder)
    run_both(own, other, compiled, range(1, 4))
    assert compiled.homes is not None
    assert compiled.homes.away
    assert any(parameter.is_meta for parameter in other.modules[0].parameters())
    compiled.materialise()
    assert_same("materialised", snapshot(own), snapshot(other))


def test_homes_under_different_budgets(disk_folder: Path) -> None:
    """From the smallest budget to one that holds everything, with state brought back between calls, steps equal eager's."""
    other = chain(adamw)
    smallest, everything = smallest_budget(other, disk_folder), smallest_budget(other, None)
    for budget in (smallest, (smallest + everything) // 2, 2 * everything):
        own, other = chain(adamw), chain(adamw)
        compiled = compiled_step(other, budget, disk_folder)
        for call in range(3):
            run_both(own, other, compiled, range(call, call + 1))
            compiled.materialise()
            assert_same(f"budget {budget}", snapshot(own), snapshot(other))


def test_first_steps_make_state_that_then_goes_to_disk(disk_folder: Path) -> None:
    """SGD's momentum buffers, results of the first step, are on disk from the second step on, and parameters keep their identity."""
    own, other = chain(momentum), chain(momentum)
    identity = [id(parameter) for parameter in other.modules[0].parameters()]
    first = smallest_budget(other, disk_folder)
    compiled = compiled_step(other, first, disk_folder)
    run_both(own, other, compiled, range(4))
    assert compiled.homes is not None
    assert [id(parameter) for parameter in other.modules[0].parameters()] == identity


def test_two_batch_shapes_keep_their_own_homes(disk_folder: Path) -> None:
    """A second batch shape is captured while state lies on disk, and programs with other homes take turns."""
    own, other = chain(adamw), chain(adamw)
    big = lambda call: (torch.randn(256 if call % 2 else 4, WIDTH, generator=torch.Generator().manual_seed(call)),)  # noqa: E731
    own.batch = other.batch = big
    compiled = compiled_step(other, max(smallest_budget(other, disk_folder, call) for call in (0, 1)), disk_folder)
    run_both(own, other, compiled, range(6))
    homes = [set(program.engine.homes.away.values()) for known in compiled.programs.values() for program in known]
    assert len(homes) == 2
    assert homes[0] != homes[1]


def test_what_leaves_in_mid_step_has_pages_of_its_own(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter at home in memory that leaves it and comes back lies in pages of its own, which the system gets back, from the first step on; under
    the meters the step needs what the plan says. A view of it, which would show old values, is refused."""
    monkeypatch.setattr(arena, "MAPPED_BYTES", 4096)
    own, other = chain(sgd, 8), chain(sgd, 8)
    budget = (smallest_budget(other, disk_folder) + smallest_budget(other, None)) // 2
    compiled = compiled_step(other, budget, disk_folder, example=other.batch(0))
    program = compiled.prepare(*other.batch(0))
    moving = [other.modules[0].get_parameter(source.rpartition(":")[2]) for source in program.engine.homes.resident.values()]
    assert moving
    assert "run.mapped(" in program.code
    identity = [id(parameter) for parameter in moving]
    for call in range(3):
        run_both(own, other, compiled, range(call, call + 1))
        assert all(arena.has_own_pages(parameter) for parameter in moving)
    reading = meter_process(program, list(other.batch(3)))
    assert own.step(*own.batch(3)).equal(reading.result)
    comparison = compiled.compare(*other.batch(4))
    assert comparison.equal, str(comparison)
    assert comparison.measured_bytes <= comparison.predicted_bytes
    assert [id(parameter) for parameter in moving] == identity
    view = moving[0].data[:2]
    with pytest.raises(MebpError, match="another tensor shares it"):
        compiled(*other.batch(5))
    del view
    compiled.materialise()
    assert_same("materialised", snapshot(own), snapshot(other))


def test_state_that_a_program_does_not_use_stays_on_disk(disk_folder: Path) -> None:
    """A call that only accumulates gradients does not need the optimizer's state, and does not bring it into memory."""

    def make() -> Training:
        training = chain(adamw)
        model, own = training.modules[0], training.optimizers[0]

        def step(x: torch.Tensor, update: bool) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            if update:
                own.step()
                own.zero_grad()
            return loss

        training.step, training.batch = step, lambda call: (torch.full((4, WIDTH), 0.1 * (call + 1)), call % 2 == 0)
        return training

    own, other = make(), make()
    compiled = compiled_step(other, 2 * state_bytes(own) + 80_000, disk_folder)
    run_both(own, other, compiled, range(4))
    assert compiled.homes is not None
    compiled(*other.batch(1))
    assert {source.split(":")[0] for source in compiled.homes.away} == {"optimizer"}


def test_a_cached_program_finds_its_homes(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second compiled step that takes its program from the cache, without a capture, trains as eager does."""
    monkeypatch.setenv("MEBP_CACHE", str(disk_folder / "cache"))
    for visit in range(2):
        own, other = chain(adamw), chain(adamw)
        compiled = optimize(other.step, state_bytes(other) * 2, offload=disk_folder, effort="fast")
        captures = mock.patch.object(compiler, "capture", wraps=compiler.capture)
        with captures as capture:
            run_both(own, other, compiled, range(2))
        assert compiled.homes is not None
        assert compiled.homes.away
        assert visit == 0 or not capture.called


def test_measured_peak_is_the_predicted_one(disk_folder: Path) -> None:
    """Under the storage meter a step with homes on disk needs what the plan says, and equals eager; state is back in memory afterwards."""
    training = chain(adamw)
    compiled = compiled_step(training, smallest_budget(training, disk_folder), disk_folder)
    compiled(*training.batch(0))
    comparison = compiled.compare(*training.batch(0))
    assert comparison.equal, str(comparison)
    assert comparison.measured_bytes <= comparison.predicted_bytes < state_bytes(training)


# --- the user's objects ---


def held(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, Homes]:
    """A model with a tied and a transposed weight, its optimizer after one step, and its homes with room for everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    optimizer.zero_grad()
    homes = Homes(State({"model": model}, {"opt": optimizer}), folder)
    sizes = {f"parameter:model:{path}": p.nbytes for path, p in model.named_parameters()}
    sizes["optimizer:opt:model:0.weight:exp_avg"] = WIDTH * WIDTH * 4
    homes.store.reserve({source: Room(size, 2) for source, size in sizes.items()})
    return model, optimizer, homes


MOVING = frozenset({"parameter:model:0.weight", "parameter:model:2.weight", "optimizer:opt:model:0.weight:exp_avg"})


def test_objects_keep_identity_hooks_and_ties(disk_folder: Path) -> None:
    """Away and back, a parameter is the same object with its attributes, hooks, ties, strides and values."""
    model, optimizer, homes = held(disk_folder)
    weight, calls = model[0].weight, []
    weight.register_hook(lambda grad: calls.append(1))
    weight.tag = "kept"
    entry, before = optimizer.state[weight]["exp_avg"], flat(model.state_dict())
    homes.arrange(MOVING)
    assert weight.is_meta
    assert entry.is_meta
    assert model[0].weight is weight
    assert model[1].weight is weight
    assert optimizer.state[weight]["exp_avg"] is entry
    assert weight.requires_grad
    assert weight.is_leaf
    assert isinstance(weight, nn.Parameter)
    assert homes.away == MOVING
    assert_same("state_dict", before, flat(state_dict(homes.state, homes)["model"]))
    homes.materialise()
    assert_same("back", before, flat(model.state_dict()))
    assert weight.tag == "kept"
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    model[0](torch.ones(2, WIDTH)).sum().backward()
    assert calls == [1]
    assert weight.grad is not None


def test_memory_is_given_up(disk_folder: Path) -> None:
    """When a parameter leaves, its storage dies."""
    model, _, homes = held(disk_folder)
    from torch.multiprocessing.reductions import StorageWeakRef

    storage = StorageWeakRef(model[0].weight.untyped_storage())
    homes.arrange(frozenset({"parameter:model:0.weight"}))
    assert storage.expired()


def test_a_copy_of_state_is_a_snapshot_with_its_ties(disk_folder: Path) -> None:
    """`state_dict` gives copies that share nothing with live tensors, one for tied entries."""
    model, _, homes = held(disk_folder)
    homes.arrange(MOVING)
    copied = state_dict(homes.state, homes)
    assert copied["model"]["0.weight"] is copied["model"]["1.weight"]
    live = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not live & {tensor.data_ptr() for tensor in copied["model"].values()}


def test_what_the_user_puts_in_place_counts(disk_folder: Path) -> None:
    """A tensor that replaces one on disk (optimizer.load_state_dict does that) is the truth from then on."""
    model, optimizer, homes = held(disk_folder)
    homes.arrange(MOVING)
    fresh = torch.full((WIDTH, WIDTH), 3.0)
    optimizer.state[model[0].weight]["exp_avg"] = fresh.clone()
    homes.arrange(MOVING)
    assert optimizer.state[model[0].weight]["exp_avg"].is_meta
    homes.materialise()
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], fresh)


def test_what_cannot_leave_is_refused(disk_folder: Path) -> None:
    """A shared memory, a gradient, a lost value: each is named, and nothing has moved."""
    model, optimizer, homes = held(disk_folder)
    view = model[0].weight.data[:2]
    with pytest.raises(MebpError, match="another tensor shares it"):
        homes.arrange(MOVING - {"optimizer:opt:model:0.weight:exp_avg"})
    del view
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    with pytest.raises(MebpError, match="has a gradient"):
        homes.arrange(frozenset({"parameter:model:0.weight"}))
    optimizer.state[model[0].weight]["exp_avg"] = torch.empty(WIDTH, WIDTH, device="meta")
    with pytest.raises(MebpError, match="on meta"):
        homes.arrange(frozenset({"optimizer:opt:model:0.weight:exp_avg"}))
    assert homes.away == frozenset()
    assert not model[0].weight.is_meta


# --- failures ---


class FailingDisk:
    """Raises an I/O error at the n-th read or write of the transfer thread."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> FailingDisk:
        self.patches = [mock.patch.object(file_io.os, name, self._failing(getattr(os, name))) for name in ("pwrite", "preadv")]
        self.patches.append(mock.patch.object(transfer_queue, "read_cached", return_value=False))  # all reads are Python's
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()

    def _failing(self, call: Callable[..., int]) -> Callable[..., int]:
        def failing(*args: Any) -> int:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.EIO, "broken")
            return call(*args)

        return failing


def transfers_of(compiled: CompiledStep) -> int:
    report = compiled.plan.report
    return report.offloads + report.prefetches


@contextlib.contextmanager
def everything_away() -> Iterator[None]:
    """Inside, schedules give every storage that may move its home on disk."""

    def solve(problem: solvers.Problem, **options: Any) -> Solution:
        tables = Tables(problem)
        decisions = Decisions([0] * len(problem.ops), away={index for index, may in enumerate(tables.may_leave) if may})
        trace = decode(tables, decisions)
        schedule = emit(tables, decisions, trace, synchronous(trace))
        return Solution(schedule, solvers.replay(problem, schedule), 1, "away")

    with mock.patch.object(solvers, "solve", solve):
        yield


def test_a_failed_step_leaves_the_old_generation(disk_folder: Path) -> None:
    """Whichever transfer fails, the step is poisoned, refuses everything but force, and disk holds what it held before the step."""
    training = chain(adamw)
    budget, number, count = smallest_budget(training, disk_folder), 1, 2
    while number <= count:
        own, other = chain(adamw), chain(adamw)
        compiled = compiled_step(other, budget, disk_folder)
        run_both(own, other, compiled, range(1))
        count, before = transfers_of(compiled), flat(compiled.state_dict())
        assert compiled.homes is not None
        with FailingDisk(number), pytest.raises(DiskError, match="EIO"):
            compiled(*other.batch(2))
        for source in compiled.homes.away:
            kind, _root, *rest = source.split(":")
            if kind == "parameter":
                assert bits(compiled.homes.load(source)) == before[f"/model/{rest[0]}"]
        for refused, arguments in ((compiled, other.batch(2)), (compiled.materialise, ()), (compiled.state_dict, ())):
            with pytest.raises(StepPoisoned, match="EIO"):
                refused(*arguments)
        compiled.materialise(force=True)
        assert not any(parameter.is_meta for parameter in other.modules[0].parameters())
        number += max(1, count // 3)
    other.modules[0].load_state_dict(own.modules[0].state_dict())
    other.optimizers[0].load_state_dict(copy.deepcopy(own.optimizers[0].state_dict()))
    run_both(own, other, compiled_step(other, budget, disk_folder), range(2, 3))


def test_a_failed_step_is_undone_where_all_that_it_updates_is_on_disk(disk_folder: Path) -> None:
    """Plain SGD with all parameters on disk: after a failure `materialise` gives the state of before, and training goes on."""
    own, other = chain(sgd), chain(sgd)
    compiled = compiled_step(other, 10**6, disk_folder)
    with everything_away():
        run_both(own, other, compiled, range(1))
        for number in (1, 3, transfers_of(compiled)):
            assert compiled.homes is not None
            assert len(compiled.homes.away) == 4
            with FailingDisk(number), pytest.raises(DiskError, match="EIO"):
                compiled(*other.batch(2))
            with pytest.raises(StepPoisoned):
                compiled(*other.batch(2))
            compiled.materialise()
            assert_same("restored", snapshot(own), snapshot(other))
            run_both(own, other, compiled, range(2, 3))


def test_a_failure_between_steps_poisons_nothing(disk_folder: Path) -> None:
    """Where moving to disk fails before the step, values stay where they were and the next call works."""
    own, other = chain(adamw), chain(adamw)
    compiled = compiled_step(other, smallest_budget(other, disk_folder), disk_folder)
    compiled.prepare(*other.batch(0))
    with FailingDisk(5), pytest.raises(DiskError, match="EIO"):
        compiled(*other.batch(0))
    run_both(own, other, compiled, range(2))


def test_a_full_disk_is_refused_before_the_first_step(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for both generations is reserved when a program is made; without it nothing moves and nothing runs."""
    training = chain(adamw)
    budget, before = smallest_budget(training, disk_folder), snapshot(training)
    space = os.statvfs(disk_folder)
    full = os.statvfs_result((*space[:3], 20, 20, *space[5:]))
    monkeypatch.setattr(disk.os, "statvfs", lambda folder: full)
    with pytest.raises(DiskError, match="disk full"):
        compiled_step(training, budget, disk_folder)(*training.batch(0))
    assert_same("untouched", before, {key: value for key, value in snapshot(training).items() if key in before})


# --- the store ---

ACTION = st.tuples(st.sampled_from(["write", "read", "commit", "abandon"]), st.sampled_from("abc"), st.integers(0, 255))


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTION, max_size=30))
def test_the_store_has_two_generations(actions: list[tuple[str, str, int]]) -> None:
    """Reads see this step's writes; after `abandon` they see the last commit: as two dicts would have it."""
    folder = Path(__file__).resolve().parents[2] / "out"
    folder.mkdir(exist_ok=True)
    with DiskThread() as thread:
        store = HomeStore(folder, thread)
        store.reserve({"a": Room(64, 1)})
        store.reserve({name: Room(64, 2) for name in "abc"})
        committed: dict[str, int] = {}
        fresh: dict[str, int] = {}
        for action, name, value in actions:
            if action == "write":
                store.write(name, torch.full((64,), value, dtype=torch.uint8))
                store.wait(name)
                fresh[name] = value
            elif action == "read" and name in {**committed, **fresh}:
                buffer = torch.empty(64, dtype=torch.uint8)
                store.read(name, buffer)
                store.wait(name)
                assert buffer.unique().tolist() == [{**committed, **fresh}[name]]
            elif action == "read":
                with pytest.raises(DiskError, match="never written"):
                    store.read(name, torch.empty(64, dtype=torch.uint8))
            else:
                committed |= fresh if action == "commit" else {}
                fresh = {}
                (store.commit if action == "commit" else store.abandon)()
