"""Faults in a running step: whatever read, write, fsync or allocation fails, at whichever call, the error is typed and says what to try,
the state of before can be had again, and neither threads nor files are left behind.

Tiny trainings with a frozen embedding and a frozen layer, whose activations go to disk and back. "halfway" (int4 weights, AdamW, the
smallest budget) keeps some of what it updates in memory: a failure leaves a half-updated model, and a checkpoint is loaded over it. "undone"
(int4 weights, SGD with momentum, everything away) and "lent" (frozen weights as they are, in memory but out of it in mid-step) update only
what lies on disk: `materialise()` gives the state of before.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import faults
import pytest
import torch
from chains import WIDTH, adamw, mean_square, momentum
from faults import Allocations, Calls, Fault, Waits, naming, no_hang, nothing_left
from law1 import assert_same, describe, estimated_costs, raw
from models import Training
from threads import one_thread
from torch import nn

import solvers
from mebp_compile import compiler
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetInfeasible, DiskError, MeasureError, MebpError, OutOfMemory, StepPoisoned
from mebp_compile.measure import cached_read, file_io
from mebp_compile.measure.child import run_child
from mebp_compile.measure.process import limit_data, rss, set_malloc_thresholds
from mebp_compile.measure.transfer import DiskThread, Ticket
from mebp_compile.runtime.activations import ActivationStore, Slot
from mebp_compile.runtime.weights import WeightStore
from solvers.decode import Decisions, Tables, decode
from solvers.emit import emit, synchronous
from solvers.greedy import evaluate
from solvers.solve import Solution
from solvers.transfers import placed

TABLE = 256
FROZEN = ("0.weight", "3.weight")
IDS = torch.tensor([3, 4, 5, 90, 200, 201]).repeat(11)[:WIDTH]  # three runs of rows of the table
CHUNK_BYTES = 10_000  # a 16 KiB transfer takes two calls, so that one may fail when a part of it is done
SMALLEST, AWAY, LENT, LARGE = 0, 10**6, 10**7, 10**8  # budgets; at all but the first everything would fit, and all the same it moves
FOLDER = Path(__file__).resolve().parents[2] / "out"


# --- trainings and their plans ---


def training(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Training:
    """Layers without biases, so that every parameter is large enough to move; dropout, so that the generator's state matters."""
    torch.manual_seed(0)
    layers = (part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()))
    model = nn.Sequential(nn.Embedding(TABLE, WIDTH), *layers, nn.Dropout(0.1))
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return mean_square(model, optimizer, lambda call: ((IDS + call) % TABLE,))


@dataclass(frozen=True)
class Case:
    """warm: the calls after which steps are alike. undone: whether a failed step can be undone. stored: whether weights lie in a store."""

    name: str
    optimizer: Callable[[Any], torch.optim.Optimizer]
    budget: int
    warm: int
    undone: bool
    stored: bool = True


HALFWAY = Case("halfway", adamw, SMALLEST, 1, undone=False)
UNDONE = Case("undone", momentum, AWAY, 2, undone=True)
LENT_OUT = Case("lent", momentum, LENT, 2, undone=True, stored=False)
CASES = [pytest.param(case, id=case.name) for case in (HALFWAY, UNDONE, LENT_OUT)]


def everything_away(problem: solvers.Problem) -> Solution:
    """All state and all weights at home on disk, all activations there between forward and backward, transfers overlapped with the ops."""
    tables, decisions = spilling(problem)
    decisions.away.update(index for index, may in enumerate(tables.may_leave) if may)
    state = evaluate(tables, decisions)
    return solution(problem, emit(tables, decisions, state.trace, placed(tables, state, (1.0,))[1]))


def frozen_lent(problem: solvers.Problem) -> Solution:
    """What the step writes at home on disk; what it only reads at home in memory, but out of it in forward and in backward."""
    tables, decisions = spilling(problem)
    for index in (index for index, may in enumerate(tables.may_leave) if may):
        if index in tables.written:
            decisions.away.add(index)
        else:
            for boundary in (3, len(problem.ops) // 3, len(problem.ops) // 2):
                decisions.cut(index, boundary)
    trace = decode(tables, decisions)
    return solution(problem, emit(tables, decisions, trace, synchronous(trace)))


def spilling(problem: solvers.Problem) -> tuple[Tables, Decisions]:
    """Decisions that put activations on disk between forward and backward."""
    tables = Tables(problem)
    backward = next(index for index, op in enumerate(problem.ops) if op.phase == "backward")
    moving = [index for index, storage in enumerate(problem.storages) if tables.may_spill[index] and not storage.persistent]
    decisions = Decisions([0] * len(problem.ops), spilled=set(moving))
    for index in moving:
        decisions.cut(index, backward)
    return tables, decisions


def solution(problem: solvers.Problem, schedule: solvers.Schedule) -> Solution:
    return Solution(schedule, solvers.replay(problem, schedule), 1, "test")


# --- a training beside its eager twin ---


@dataclass(frozen=True)
class Stage:
    """Where the tests play: a folder for offloads, a store of the frozen weights, and the smallest budget of "halfway"."""

    offload: Path
    store: WeightStore
    smallest: int = 0

    def optimize(self, case: Case, other: Training) -> CompiledStep:
        """The program comes from the cache after the first time."""
        weights = self.store if case.stored else None
        return optimize(other.step, case.budget or self.smallest, weights=weights, offload=self.offload, effort="fast")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Inside, programs are planned from estimated costs, by the test's own decisions where the budget says so, and cached in the folder."""
    (folder / "offload").mkdir()
    search = solvers.solve

    def solve(problem: solvers.Problem, **options: Any) -> Solution:
        planned = {AWAY: everything_away, LENT: frozen_lent, LARGE: everything_away}.get(10 ** (len(str(problem.budget_bytes - 1))), None)
        return planned(problem) if planned is not None else search(problem, **options)

    with pytest.MonkeyPatch.context() as patch, estimated_costs(), one_thread():
        patch.setenv("MEBP_CACHE", str(folder / "cache"))
        patch.setattr(solvers, "solve", solve)
        patch.setattr(file_io, "CHUNK_BYTES", CHUNK_BYTES)
        with WeightStore.from_module(training(adamw).modules[0], folder / "store", "int4") as store:
            stage = Stage(folder / "offload", store)
            yield replace(stage, smallest=smallest_budget(stage))


def smallest_budget(stage: Stage) -> int:
    some = training(HALFWAY.optimizer)
    with pytest.raises(BudgetInfeasible) as refused:
        replace(stage, smallest=1).optimize(HALFWAY, some).prepare(*some.batch(0))
    return refused.value.smallest_bytes


@pytest.fixture
def folder() -> Iterator[Path]:
    yield from temporary_folder()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    for folder in temporary_folder():
        with staged(folder) as stage:
            yield stage


def temporary_folder() -> Iterator[Path]:
    """On a disk: the system's own may lie in memory."""
    FOLDER.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=FOLDER))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["at once", "by the thread"])
def carriers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who moves bytes: the caller where the page cache holds them, or the thread, as on a machine that has no memory to spare."""
    if request.param == "by the thread":
        monkeypatch.setattr(cached_read, "CACHE_BYTES", 1 << 62)
    return str(request.param)


class Twins:
    """A compiled training and its eager twin on the dequantised weights, at the same call."""

    def __init__(self, case: Case, stage: Stage, warm: int | None = None) -> None:
        self.case, self.stage, self.call = case, stage, 0
        self.own, self.other = training(case.optimizer), training(case.optimizer)
        for name in FROZEN if case.stored else ():
            self.own.modules[0].get_parameter(name).data = stage.store.dense(name)
        self.compiled = stage.optimize(case, self.other)
        for _ in range(case.warm if warm is None else warm):
            self.step()

    def step(self) -> None:
        """One call each from the same state of the generator, compared."""
        before = torch.get_rng_state()
        expected, drawn = self.own.step(*self.own.batch(self.call)), torch.get_rng_state()
        torch.set_rng_state(before)
        returned = self.compiled(*self.other.batch(self.call))
        assert_same("returned", describe((expected, drawn)), describe((returned, torch.get_rng_state())))
        self.call += 1
        self.compare()

    def compare(self) -> None:
        """All state, wherever it lies, is the eager twin's."""
        assert_same("state", self.described(eager_state(self.own)), self.described(self.compiled.state_dict()))

    def described(self, state: dict[str, Any]) -> dict[str, Any]:
        """Leaves by path, as comparable bits, without the weights that lie in a store."""
        model = {name: tensor for name, tensor in state["model"].items() if not (self.case.stored and name in FROZEN)}
        return describe({"model": model, "optimizer": state["optimizer"]})

    def fail(self, fault: contextlib.AbstractContextManager[Any], expected: type[BaseException] = MebpError) -> None:
        """A call inside the fault, which must end in an error of this kind with something to try, and leave the generator alone."""
        batch, generator = self.other.batch(self.call), torch.get_rng_state()
        with no_hang(), fault, pytest.raises(expected) as raised:
            self.compiled(*batch)
        assert isinstance(raised.value, KeyboardInterrupt) or raised.value.fix
        assert raw(torch.get_rng_state()) == raw(generator)

    def recover(self, checkpoint: dict[str, Any]) -> None:
        """What docs/guarantees.md promises after a failed step; in the end the state is that of before it."""
        refused = [lambda: self.compiled(*self.other.batch(self.call)), self.compiled.state_dict]
        for refusing in refused if self.case.undone else (*refused, self.compiled.materialise):
            with pytest.raises(StepPoisoned, match="try: "):
                refusing()
        if self.case.undone:
            self.compiled.materialise()
        else:
            self.compiled.materialise(force=True)
            load(self.other, checkpoint)
            self.compiled = self.stage.optimize(self.case, self.other)
        assert not any(tensor.is_meta for tensor in trained(self.other))
        self.compare()


def eager_state(own: Training) -> dict[str, Any]:
    return {"model": own.modules[0].state_dict(), "optimizer": own.optimizers[0].state_dict()}


def trained(some: Training) -> Iterator[torch.Tensor]:
    """Trained parameters and optimizer state."""
    yield from (parameter for parameter in some.modules[0].parameters() if parameter.requires_grad)
    yield from (value for entries in some.optimizers[0].state.values() for value in entries.values() if isinstance(value, torch.Tensor))


def load(some: Training, checkpoint: dict[str, Any]) -> None:
    """What a user does after `materialise(force=True)`."""
    some.modules[0].load_state_dict(checkpoint["model"], strict=False)
    some.optimizers[0].load_state_dict(copy.deepcopy(checkpoint["optimizer"]))


def every(count: int, fewest: int = 5) -> range:
    """The numbers of calls to try, of which there must be some."""
    assert count >= fewest
    return range(1, count + 1)


def calls_in(counter: Any, work: Callable[[], Any]) -> int:
    """How many calls some work makes when nothing fails."""
    with counter:
        work()
    return int(counter.count)


def calls_of_step(case: Case, stage: Stage, counter: Any) -> int:
    twins = Twins(case, stage)
    batch = twins.other.batch(twins.call)
    return calls_in(counter, lambda: twins.compiled(*batch))


# --- in a step ---


def test_the_steps_use_the_disk_in_every_way(stage: Stage) -> None:
    """Each kind of transfer is in some program: packed weights, rows of a table, activations, state there and back, state lent out."""
    code = {}
    for case in (HALFWAY, UNDONE, LENT_OUT):
        twins = Twins(case, stage)
        homes = twins.compiled.program.engine.homes
        assert homes is not None
        assert twins.compiled.program.restorable is False  # it has ended well, and is not to be undone
        assert homes.restorable == case.undone
        assert any(f"run.prefetch({name!r}" in twins.compiled.code for name in homes.away)
        assert any(f"run.offload({name!r}" in twins.compiled.code for name in homes.away)
        assert "run.offload('x_2_tanh'" in twins.compiled.code
        code[case.name] = twins.compiled.code
    assert "run.prefetch('x_3_weight_packed'" in code["halfway"]
    assert "run.embedding('x_0_weight'" in code["undone"]
    assert "run.release('x_3_weight')" in code["lent"]


@pytest.mark.parametrize("case", CASES)
def test_a_clean_comparison_finds_no_difference(case: Case, stage: Stage) -> None:
    """compare() runs these steps too, also where a table is only looked up and so never in memory."""
    twins = Twins(case, stage)
    comparison = twins.compiled.compare(*twins.other.batch(twins.call))
    assert comparison.equal, str(comparison)
    assert comparison.measured_bytes <= comparison.predicted_bytes
    twins.step()


@pytest.mark.parametrize("case", CASES)
def test_a_failing_comparison(case: Case, stage: Stage) -> None:
    """Whichever read or write of compare() fails, in either step or on the way back: a typed error, the state is that of before, and training
    goes on."""
    twins = Twins(case, stage)
    batch = twins.other.batch(twins.call)
    with Calls(faults.BROKEN) as counter:
        twins.compiled.compare(*batch)
    for number in every(counter.count):
        with naming(f"call {number} of {counter.count}"):
            with no_hang(), Calls(faults.BROKEN, number), pytest.raises(MebpError, match="try: "):
                twins.compiled.compare(*batch)
            twins.compare()
            twins.step()


@pytest.mark.parametrize("fault", [faults.BROKEN, faults.GONE, faults.FULL, faults.CUT], ids=lambda fault: fault.name)
@pytest.mark.parametrize("case", CASES)
def test_a_failing_transfer(case: Case, fault: Fault, stage: Stage, carriers: str) -> None:
    """Whichever read or write of a step fails: a typed error, the step refuses to go on, the state of before comes back as promised, and
    training continues with eager's bits."""
    count = calls_of_step(case, stage, Calls(fault))
    with nothing_left(stage.offload):
        twins = Twins(case, stage)
        for number in every(count):
            with naming(f"{fault.name} at call {number} of {count}"):
                checkpoint = twins.compiled.state_dict()
                twins.fail(Calls(fault, number))
                twins.recover(checkpoint)
                twins.step()
        del twins


@pytest.mark.parametrize("fault", [faults.SHORT, faults.ALWAYS_SHORT, faults.INTERRUPTED], ids=lambda fault: fault.name)
@pytest.mark.parametrize("case", CASES)
def test_a_short_transfer_is_continued(case: Case, fault: Fault, stage: Stage, carriers: str) -> None:
    """A read or write that moves a part of its bytes, or is interrupted by a signal, at any call: the step leaves eager's bits."""
    count = calls_of_step(case, stage, Calls(fault))
    twins = Twins(case, stage)
    for number in every(count):
        with naming(f"{fault.name} at call {number} of {count}"), no_hang(), Calls(fault, number) as calls:
            twins.step()
        assert calls.count > number


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("case", CASES)
def test_a_failing_allocation(case: Case, sticky: bool, stage: Stage) -> None:
    """Whichever tensor of a step finds no memory, alone or with all after it: the same promises."""
    count = calls_of_step(case, stage, Allocations())
    fail_each(case, stage, {number: Allocations(number, sticky) for number in every(count)}, OutOfMemory)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_wait(case: Case, stage: Stage, carriers: str) -> None:
    """Ctrl-C at any wait for a transfer, which goes on meanwhile: the same promises."""
    count = calls_of_step(case, stage, Waits())
    fail_each(case, stage, {number: Waits(number) for number in every(count)}, KeyboardInterrupt)


def test_an_interrupted_wait_before_a_collection(stage: Stage) -> None:
    """The frames of a step that failed may keep views of its tensors until Python's collector comes round: the next step doesn't depend on that."""
    gc.disable()
    try:
        test_an_interrupted_wait(LENT_OUT, stage, "at once")
    finally:
        gc.enable()


def fail_each(case: Case, stage: Stage, injected: Mapping[int, Allocations | Waits], error: type[BaseException]) -> None:
    """One step after the other fails, by its number's fault; after each the state of before can be had, and training goes on."""
    with nothing_left(stage.offload):
        twins = Twins(case, stage)
        for number, fault in injected.items():
            with naming(f"{type(fault).__name__} {number}"):
                checkpoint = twins.compiled.state_dict()
                twins.fail(fault, error)
                twins.recover(checkpoint)
                twins.step()
        del twins


def test_a_dead_disk(stage: Stage) -> None:
    """Where the scratch files lose their bytes for good, errors stay typed, and zeros can be had to load a checkpoint over them."""
    with nothing_left(stage.offload):
        twins = Twins(UNDONE, stage)
        checkpoint = twins.compiled.state_dict()
        for number in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{number}").startswith(str(stage.offload.resolve())):
                os.truncate(f"/proc/self/fd/{number}", 0)
        twins.fail(contextlib.nullcontext(), DiskError)
        with pytest.raises(DiskError, match="the file ends at byte"):
            twins.compiled.materialise()
        assert twins.compiled.homes is not None
        twins.compiled.homes.materialise(force=True)
        load(twins.other, checkpoint)
        twins.compiled = stage.optimize(UNDONE, twins.other)
        twins.step()
        del twins


# --- before and between steps ---


@pytest.mark.parametrize("fault", [Calls, Allocations])
@pytest.mark.parametrize("case", CASES)
def test_a_failure_before_the_first_step(case: Case, fault: type, stage: Stage) -> None:
    """While a program is made ready (the store's digests, room on disk, records read, state moved there): a typed error, nothing has changed,
    and the same step works when called again."""
    make = (lambda at=0: Calls(faults.READYING, at)) if fault is Calls else Allocations
    counted = Twins(case, stage, warm=0)
    ready(counted, counter := make())
    del counted
    with nothing_left(stage.offload):
        for number in every(counter.count):
            with naming(f"{fault.__name__} {number} of {counter.count}"), WeightStore.open(stage.store.path) as store:
                twins = Twins(case, replace(stage, store=store), warm=0)
                before = twins.compiled.state_dict()["model"]
                with no_hang(), pytest.raises(MebpError, match="try: "):
                    ready(twins, make(number))
                assert_same("parameters", describe(before), describe(twins.compiled.state_dict()["model"]))
                twins.step()
        del twins


def ready(twins: Twins, fault: contextlib.AbstractContextManager[Any]) -> None:
    """All that a call does between planning and its program, inside the fault."""
    make_engine = compiler.make_engine

    def make(*arguments: Any) -> Any:
        with fault:
            return make_engine(*arguments)

    with mock.patch.object(compiler, "make_engine", make):
        program = twins.compiled.prepare(IDS)
    with fault:
        program.arrange()


@pytest.mark.parametrize("name", ["materialise", "state_dict"])
@pytest.mark.parametrize("poisoned", [False, True], ids=["after a step", "after a failed step"])
@pytest.mark.parametrize("fault", [Calls, Allocations])
def test_a_failure_while_state_is_brought_back(name: str, poisoned: bool, fault: type, stage: Stage) -> None:
    """materialise() and state_dict() that fail at any read or allocation lose nothing: called again they give all of it."""
    if poisoned and name == "state_dict":
        return  # it is refused
    make = (lambda at=0: Calls(faults.READ_BROKEN, at)) if fault is Calls else Allocations
    counted = Twins(UNDONE, stage)
    count = calls_in(make(), getattr(counted.compiled, name))
    del counted
    with nothing_left(stage.offload):
        twins = Twins(UNDONE, stage)
        for number in every(count, 4):
            with naming(f"{fault.__name__} {number} of {count}"):
                if poisoned:
                    twins.fail(Calls(faults.BROKEN, 3))
                with no_hang(), make(number), pytest.raises(MebpError, match="try: "):
                    getattr(twins.compiled, name)()
                getattr(twins.compiled, name)()
                twins.compare()
                twins.step()
        del twins


# --- the making and opening of weight stores ---


def test_a_failure_while_weights_are_quantised(stage: Stage, folder: Path) -> None:
    """weights="int4" with a call that fails, whichever: a typed error, the model has its weights, nothing is left in the folder."""
    (folder / "weights").mkdir()
    before = describe(training(adamw).modules[0].state_dict())
    quantise = lambda other: optimize(other.step, AWAY, weights="int4", offload=folder)  # noqa: E731
    with Calls(faults.BUILDING) as calls:
        compiled = quantise(training(adamw))
    count, refused, kept = calls.count, 0, []
    del compiled
    with nothing_left(folder):
        for number in every(count):
            other = training(adamw)
            with naming(f"{faults.BUILDING.name} at call {number} of {count}"), no_hang():
                error = error_of(Calls(faults.BUILDING, number), lambda other=other: kept.append(quantise(other)))
                kept.clear()  # not inside the fault
            if error is not None:
                assert isinstance(error, MebpError)
                assert error.fix
                assert_same("the model", before, describe(other.modules[0].state_dict()))
                refused += 1
        with Calls(faults.ALWAYS_SHORT_BUILDING, 1):
            compiled = quantise(other := training(adamw))
        assert other.modules[0].get_parameter(FROZEN[0]).is_meta
        del compiled
    assert refused >= count - 3  # a folder that is there already need not be made


def error_of(fault: contextlib.AbstractContextManager[Any], work: Callable[[], Any]) -> Exception | None:
    """What some work raises inside a fault, if anything."""
    try:
        with fault:
            work()
    except Exception as error:
        return error.with_traceback(None)
    return None


def test_a_store_that_cannot_be_bound_takes_no_weights(stage: Stage) -> None:
    """Where a parameter does not fit the store, or one on meta is in no store, the parameters before it still have their weights."""
    for spoil in (lambda model: setattr(model[3], "weight", nn.Parameter(torch.zeros(8, 8), False)), lambda model: model[5].to("meta")):
        other = training(momentum)
        spoil(other.modules[0])
        with pytest.raises(MebpError, match="try: "):
            optimize(other.step, AWAY, weights=stage.store, offload=stage.offload)
        assert not other.modules[0].get_parameter(FROZEN[0]).is_meta


def test_a_failure_while_a_store_is_opened(stage: Stage) -> None:
    """Whichever call fails the error is typed and no descriptor is left; short and interrupted reads are continued."""
    open_store = lambda: WeightStore.open(stage.store.path).close()  # noqa: E731
    count, before = calls_in(Calls(faults.OPENING), open_store), len(os.listdir("/proc/self/fd"))
    for number in every(count):
        with naming(f"{faults.OPENING.name} at call {number} of {count}"):
            with Calls(faults.OPENING, number), pytest.raises(MebpError, match="try: "):
                open_store()
            assert len(os.listdir("/proc/self/fd")) == before
            for harmless in (faults.OPENING_SHORT, faults.OPENING_INTERRUPTED):
                with Calls(harmless, number):
                    open_store()


# --- the transfer thread ---


def test_ctrl_c_does_not_close_a_file_that_is_written(folder: Path) -> None:
    """A scratch file is not closed under a write that outlives an interrupted wait: its descriptor may be another file's by then."""
    gate, asked = threading.Event(), threading.Event()

    def slow(fd: int, data: memoryview, offset: int) -> int:
        asked.set()
        assert gate.wait(60)
        return real(fd, data, offset)

    real = os.pwrite
    with mock.patch.object(os, "pwrite", slow), DiskThread() as thread:
        store = ActivationStore(folder, 4096, {"x": Slot(0, 4096)}, thread)
        store.offload("x", torch.ones(4096, dtype=torch.uint8))
        assert asked.wait(60)
        with Waits(1), pytest.raises(KeyboardInterrupt):
            store.wait("x")
        kept = faults.open_files(folder)
        del store
        assert faults.open_files(folder) == kept
        gate.set()


def test_errors_in_the_thread_hold_nothing() -> None:
    """An error that a ticket keeps lets go of buffers and of the thread's owner, so that a forgotten thread ends; it still says where it came
    from, and what to try when memory was short."""

    class Owner:
        def __init__(self) -> None:
            self.thread = DiskThread()

        def fail(self) -> Ticket:
            return self.thread.submit(lambda: self.no_memory())

        def no_memory(self) -> None:
            raise MemoryError

    owner = Owner()
    with pytest.raises(DiskError, match="free memory") as raised:
        owner.fail().wait()
    assert "no_memory" in "".join(raised.value.__cause__.__notes__)
    late = owner.fail()  # nobody waits for this one
    with no_hang():
        while not late.done:  # till then it runs, and holds the owner
            time.sleep(0.001)
    gone = weakref.ref(owner)
    del owner, raised
    gc.collect()
    assert gone() is None


def test_a_thread_that_cannot_start() -> None:
    """A system that gives no thread is a typed error."""
    refusal = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
    with refusal, pytest.raises(MeasureError, match="can't start new thread"):
        DiskThread()


# --- in another process: no memory, killed ---


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, Any]]:
    """What `hard_faults` found in a fresh interpreter: it may be starved, and forks."""
    for folder in temporary_folder():
        yield run_child("test_faults", hard_faults.__name__, {"folder": str(folder)}, threads=1)


def test_memory_that_the_system_refuses(answers: dict[str, Any]) -> None:
    """Under a limit on the process's memory a step ends in OutOfMemory, and when the limit is lifted the state of before comes back."""
    assert answers["starved"] == "undone, and goes on"


def test_killed_in_a_step(answers: dict[str, Any]) -> None:
    """SIGKILL at any write of a step, a part of whose bytes are on disk: the folder is as before, store and checkpoint are whole, and another
    process continues from them there with the same bits."""
    assert answers["killed steps"] > 10


def test_killed_while_a_store_is_written(answers: dict[str, Any]) -> None:
    """SIGKILL at any write, fsync or rename of a store: there is none or a whole one, and another process makes it there."""
    assert answers["killed builds"] > 10


def hard_faults(request: dict[str, Any]) -> dict[str, Any]:
    """The child's side. Raises AssertionError, which comes out in the parent, where a promise is broken."""
    folder = Path(request["folder"])
    with staged(folder) as stage:
        starved = starve(stage)
        killed_steps, killed_builds = kill_steps(stage, folder), kill_builds(folder)
    return {"starved": starved, "killed steps": killed_steps, "killed builds": killed_builds}


def starve(stage: Stage) -> str:
    """A step with activations of 16 MB in a process that may not grow by 4 MB."""
    set_malloc_thresholds()  # freed blocks go back to the system, so that new ones need more of it
    twins = Twins(replace(UNDONE, budget=LARGE), stage, warm=0)
    twins.own.batch = twins.other.batch = lambda call: (IDS.repeat(1024),)
    for _ in range(2):
        twins.step()
    twins.fail(limit_data(rss().data_bytes + 4_000_000), OutOfMemory)
    twins.recover({})
    twins.step()
    return "undone, and goes on"


def kill_steps(stage: Stage, folder: Path) -> int:
    """For every N a fork that is killed at the N-th write of a step; what is left is checked here. The number of forks."""
    path, before = folder / "checkpoint.pt", faults.names(stage.offload)
    twins = Twins(HALFWAY, stage)
    torch.save(twins.compiled.state_dict(), path)
    batch = twins.other.batch(twins.call)
    count = calls_in(Calls(faults.FULL), lambda: twins.compiled(*batch))
    digest = path.read_bytes()
    for number in every(count):
        with naming(f"killed at write {number} of {count}"):
            assert faults.killed(lambda number=number: doomed(stage, number))
            assert faults.names(stage.offload) == before
            assert path.read_bytes() == digest
            stage.store.verify()
    fresh = Twins(HALFWAY, stage, warm=0)  # as a new process would: from the checkpoint, in the same folder
    fresh.own.step(*fresh.own.batch(0))
    load(fresh.other, torch.load(path))
    fresh.call = 1
    fresh.step()
    return count


def doomed(stage: Stage, number: int) -> None:
    """One step, and another that ends in SIGKILL after a part of its N-th write."""
    other = training(HALFWAY.optimizer)
    compiled = stage.optimize(HALFWAY, other)
    compiled(*other.batch(0))
    with Calls(faults.KILLED, number):
        compiled(*other.batch(1))


def kill_builds(folder: Path) -> int:
    """For every N a fork that is killed at the N-th call that makes a store. The number of forks."""
    model = training(adamw).modules[0]
    build = lambda place: WeightStore.from_module(model, place / "store", "int4").close()  # noqa: E731
    (folder / "builds").mkdir()
    count = calls_in(Calls(faults.KILLED_BUILDING), lambda: build(folder / "builds"))
    for number in every(count):
        place = folder / f"build {number}"
        place.mkdir()
        with naming(f"killed at call {number} of {count}"):
            assert faults.killed(lambda place=place, number=number: _build_and_die(build, place, number))
            assert {name.split("/")[0].split(".tmp-")[0] for name in faults.names(place)} <= {"store", ".store"}
            if not (place / "store").exists():
                build(place)
            with WeightStore.open(place / "store") as store:
                store.verify()
    return count


def _build_and_die(build: Callable[[Path], None], place: Path, number: int) -> None:
    with Calls(faults.KILLED_BUILDING, number):
        build(place)
