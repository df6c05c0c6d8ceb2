"""The engine: schedules that move persistent tensors in and out of memory in any legal way leave what eager leaves, bit for bit."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from law1 import assert_same, describe, estimated_costs, raw, snapshot
from models import Training
from torch import nn

import solvers
from mebp_compile import codegen, compiler, openmp
from mebp_compile.capture import State, capture, find_state
from mebp_compile.capture.contract import Contract, contract_of
from mebp_compile.config import Options
from mebp_compile.errors import DiskError
from mebp_compile.graph import Graph
from mebp_compile.lower import lower
from mebp_compile.place import place_under
from mebp_compile.planning import Plan, build_problem, make_plan, tensor_peak
from mebp_compile.quant import Packed, dequantise
from mebp_compile.quant.schemes import scheme_named
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.metering import meter_storages
from mebp_compile.runtime.program import Program, load
from mebp_compile.runtime.setup import make_engine
from mebp_compile.runtime.state import LiveState
from solvers import Free, Offload, Prefetch, Run, Schedule
from solvers.decode import Decisions, DecodeError, Tables, decode
from solvers.emit import emit, synchronous
from solvers.greedy import evaluate
from solvers.solve import Solution
from solvers.transfers import placed

BUDGET_BYTES = 10**9


def training() -> Training:
    """Two embeddings of one table (a tie), two layers, AdamW: parameters are read in forward and backward and written by several ops."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(32, 32), "first": nn.Linear(32, 64), "second": nn.Linear(64, 32)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)

    def step(ids: torch.Tensor) -> torch.Tensor:
        hidden = model["second"](torch.tanh(model["first"](model["table"](ids))))
        loss = torch.nn.functional.cross_entropy(hidden @ model["table"].weight.t(), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training([model], [optimizer], step, lambda call: (torch.arange(16) * (call + 3) % 32,))


@dataclass(frozen=True)
class Captured:
    """A captured training, its problem, and what eager leaves after two steps."""

    training: Training
    state: State
    contract: Contract
    graph: Graph
    problem: solvers.Problem
    start: tuple[dict[str, Any], dict[str, Any]]
    expected: dict[str, Any]


@cache
def captured() -> Captured:
    own, other = training(), training()
    state = find_state(other.step)
    traced = capture(other.step, state, other.batch(0), {})
    graph = lower(traced)
    with estimated_costs():
        costs, _ = compiler.measure_costs(graph)
    problem = build_problem(graph, costs, BUDGET_BYTES, offload=True)
    start = (copy.deepcopy(other.modules[0].state_dict()), copy.deepcopy(other.optimizers[0].state_dict()))
    returned = [own.step(*own.batch(call)) for call in range(2)]
    return Captured(other, state, contract_of(traced), graph, problem, start, {**describe(returned), **snapshot(own)})


@cache
def solved() -> Plan:
    return make_plan(captured().graph, captured().problem, effort="fast", time_limit_s=1.0)


def plan_of(schedule: Schedule) -> Plan:
    """A plan with this schedule, whichever the solver would choose."""
    case, plan = captured(), solved()
    report, placement = solvers.replay(case.problem, schedule), place_under(case.graph, case.problem, schedule)
    fields = {"schedule": schedule, "report": report, "placement": placement, "peak_bytes": placement.peak_bytes}
    return Plan(**{**vars(plan), **fields, "tensor_bytes": tensor_peak(case.graph, case.problem, schedule)})


def program_of(schedule: Schedule, folder: Path, homes: Homes | None = None) -> Program:
    case, plan = captured(), plan_of(schedule)
    code = codegen.generate(case.graph, plan)
    homes = homes or Homes(case.state, folder)
    engine = make_engine(case.graph, plan, case.state, case.contract, Options(BUDGET_BYTES, folder), None, homes)
    return Program(case.contract, case.graph, plan, code, engine, load(code)[0])


def run_steps(programs: list[Program]) -> dict[str, Any]:
    """Two steps of the captured training from its start, by the programs in turn; what is left, all of it in memory."""
    case = captured()
    case.training.modules[0].load_state_dict(case.start[0])
    case.training.optimizers[0].load_state_dict(copy.deepcopy(case.start[1]))
    returned = []
    for call in range(2):
        program = programs[call % len(programs)]
        program.arrange()
        returned.append(program.run(list(case.training.batch(call))))
    programs[0].materialise()
    return {**describe(returned), **snapshot(case.training)}


def random_schedule(draw: random.Random) -> Schedule:
    """Each movable persistent storage at home here or there, and out of memory across random ops; transfers overlapped or not."""
    problem = captured().problem
    tables = Tables(problem)
    movable = [index for index, may in enumerate(tables.may_leave) if may]
    while True:
        away = {index for index in movable if draw.random() < draw.choice([0.2, 0.5, 1.0])}
        decisions = Decisions([0] * len(problem.ops), away=away)
        for index in movable:
            for _ in range(draw.choice([0, 1, 3])):
                decisions.cut(index, draw.randrange(1, len(problem.ops)))
        try:
            state = evaluate(tables, decisions)
        except DecodeError:
            continue
        transfers = synchronous(state.trace) if draw.random() < 0.5 else placed(tables, state, (draw.choice([1.0, 2.0]),))[1]
        return emit(tables, decisions, state.trace, transfers)


@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_of_persistent_tensors_is_exact(seed: int, disk_folder: Path) -> None:
    """Whatever is at home on disk, and whatever leaves memory in mid-step and comes back, two steps leave eager's bits."""
    program = program_of(random_schedule(random.Random(seed)), disk_folder)
    assert_same(f"seed {seed}", captured().expected, run_steps([program]))


def test_programs_with_other_homes_take_turns(disk_folder: Path) -> None:
    """A step by one schedule, the next by another with other homes: the same bits."""
    homes = Homes(captured().state, disk_folder)
    programs = [program_of(random_schedule(random.Random(seed)), disk_folder, homes) for seed in (100, 101)]
    assert programs[0].plan.schedule.resident != programs[1].plan.schedule.resident
    assert_same("turns", captured().expected, run_steps(programs))


def test_schedules_cover_what_they_claim() -> None:
    """Among the random schedules, storages at home in memory leave it in mid-step, and ones at home on disk are written twice in a step."""
    problem, seen = captured().problem, set()
    for seed in range(12):
        schedule = random_schedule(random.Random(seed))
        offloads = [step.storage for step in schedule.steps if isinstance(step, Offload) and problem.storages[step.storage].persistent]
        seen |= {"resident leaves" for storage in offloads if storage in schedule.resident}
        seen |= {"written twice" for storage in offloads if storage not in schedule.resident and offloads.count(storage) > 1}
        seen |= {"on disk" for storage in offloads if storage not in schedule.resident}
    assert seen == {"resident leaves", "written twice", "on disk"}


@pytest.mark.parametrize("seed", range(3))
def test_the_meter_sees_what_the_plan_promises(seed: int, disk_folder: Path) -> None:
    """Storages alive in a step never take more than the plan's bytes, tensors that leave in mid-step included."""
    program = program_of(random_schedule(random.Random(seed)), disk_folder)
    run_steps([program])
    reading = meter_storages(program, list(captured().training.batch(0)))
    program.materialise()
    assert reading.peak_bytes <= program.plan.tensor_bytes


def test_disk_homes_are_bound_by_transfers_alone(disk_folder: Path) -> None:
    """The program never asks for the state of a tensor whose home is on disk, and its updates end in an offload and a release."""
    program = program_of(random_schedule(random.Random(3)), disk_folder)
    assert program.engine.homes is not None
    assert program.engine.homes.away
    for name in program.engine.homes.away:
        assert f"run.state({name!r})" not in program.code
        assert f"run.prefetch({name!r}" in program.code
        assert f"run.release({name!r})" in program.code


def test_a_tensor_lost_in_mid_step_has_memory_again(disk_folder: Path) -> None:
    """Where a step fails while a parameter at home in memory is out, it is no meta tensor afterwards: a checkpoint can be loaded."""
    case, draw = captured(), random.Random(5)
    resident = next(schedule for schedule in iter(lambda: random_schedule(draw), None) if _leaves_in_mid_step(schedule))
    program = program_of(resident, disk_folder)
    run_steps([program])
    program.arrange()
    lines = program.code.splitlines()
    name = next(name for name in program.engine.homes.resident if f"    run.release({name!r})" in lines)
    code = program.code.replace(f"    run.release({name!r})", f"    run.release({name!r})\n    raise KeyboardInterrupt")
    program.function = load(code)[0]
    with pytest.raises(KeyboardInterrupt):
        program.run(list(case.training.batch(0)))
    program.materialise()
    assert not any(tensor.is_meta for tensor in _tensors(case.training))


def _leaves_in_mid_step(schedule: Schedule) -> bool:
    problem = captured().problem
    return any(isinstance(step, Free) and step.storage in schedule.resident for step in schedule.steps) and bool(problem.storages)


def _tensors(some: Training) -> Iterator[torch.Tensor]:
    yield from some.modules[0].parameters()
    yield from (value for entries in some.optimizers[0].state.values() for value in entries.values() if isinstance(value, torch.Tensor))


# --- packed weights ---


def test_packed_weights_at_home_in_memory_may_leave_it(disk_folder: Path) -> None:
    """A streamed weight that stays in memory between steps, but not throughout them, gives the results of one that always stays."""
    results = []
    for cuts in ([], [2, 5, 9]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 8))
        model[2].requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

        def step(x: torch.Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            loss: torch.Tensor = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        with estimated_costs(), mock.patch.object(solvers, "solve", functools.partial(_solve_with_cuts, cuts=cuts)):
            compiled = compiler.optimize(step, BUDGET_BYTES, state=[model, optimizer], weights="int8", offload=disk_folder, cache=False)
            results.append([compiled(torch.full((4, 64), 0.1)).item() for _ in range(3)])
        assert ("run.prefetch(" in compiled.code) == bool(cuts)
        assert "run.offload(" not in compiled.code  # it is in its store
        assert compiled.plan is not None
        assert compiled.plan.report.written_bytes == 0
        stream = compiled.program.engine.weights
        assert stream is not None
        (name,) = stream.resident
        compiled.program.engine.release(name)
        assert not stream.resident
    assert results[0] == results[1]


def _solve_with_cuts(problem: solvers.Problem, cuts: list[int], **options: Any) -> Solution:
    """Everything at home in memory, weights out of it across the ops `cuts`."""
    tables = Tables(problem)
    decisions = Decisions([0] * len(problem.ops))
    for index, storage in enumerate(problem.storages):
        for boundary in cuts if tables.may_leave[index] and storage.name.endswith("_packed") else ():
            decisions.cut(index, boundary)
    trace = decode(tables, decisions)
    schedule = emit(tables, decisions, trace, synchronous(trace))
    return Solution(schedule, solvers.replay(problem, schedule), 1, "cuts")


# --- single verbs ---


def bare_engine(arena_bytes: int = 4096) -> Engine:
    return Engine(LiveState(State(), {}), {}, arena_bytes)


def test_arena_views_are_aligned_and_overlap_as_asked() -> None:
    """`at` gives the same bytes for the same offset, in any dtype and stride, from an arena that starts on a cache line."""
    engine = bare_engine()
    whole = engine.at(0, (1024,), torch.float32)
    assert whole.data_ptr() % 64 == 0
    whole.copy_(torch.arange(1024.0))
    assert torch.equal(engine.at(256, (2, 3), torch.float32, (1, 2)), torch.arange(64.0, 70.0).as_strided((2, 3), (1, 2)))
    assert raw(engine.at(0, (64,), torch.uint8)) == raw(whole)[:64]


def test_a_repeated_draw_gives_the_same_numbers_and_leaves_the_generator() -> None:
    """`rng_replay` draws again what came first, and `rng_return` continues as if it had not happened."""
    engine = bare_engine()
    engine.rng_save("op")
    first = torch.rand(3)
    state = torch.get_rng_state()
    torch.rand(5)
    later = torch.get_rng_state()
    engine.rng_replay("op")
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)
    engine.rng_return()
    assert torch.equal(torch.get_rng_state(), later)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("trips", [1, 2, 3, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_in_tiles_is_the_product(transposed: bool, trips: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a single one in them pick rows of the weight, whatever the order of the sum."""
    monkeypatch.setattr(openmp, "threads", lambda: threads)
    codes, scales = scheme_named("int4").quantise(torch.randn(320, 448))
    packed = Packed("int4", (320, 448), codes, scales)
    weight = dequantise(packed).t() if transposed else dequantise(packed)
    engine = bare_engine()
    engine.weights = mock.Mock(packed=lambda name, buffer: packed)
    picked = torch.randperm(len(weight))[:50]
    x = torch.eye(len(weight), dtype=torch.bfloat16)[picked]
    out = torch.empty(50, weight.shape[1], dtype=torch.bfloat16)
    result = engine.product(x, "weight", codes, transposed, trips, out=out)
    assert result is out
    assert torch.equal(result, weight[picked])


def test_transfers_of_unknown_storages_are_refused(disk_folder: Path) -> None:
    """A verb on a storage without a place on disk names it."""
    with pytest.raises((DiskError, AssertionError), match="nothing"):
        bare_engine().offload("nothing", torch.zeros(4))


def test_prefetches_name_only_storages_of_the_problem() -> None:
    """The random schedules are schedules: each replays within the budget and runs every op."""
    for seed in range(3):
        schedule = random_schedule(random.Random(seed))
        solvers.replay(captured().problem, schedule)
        assert {step.op for step in schedule.steps if isinstance(step, Run)} == set(range(len(captured().problem.ops)))
        assert all(captured().problem.storages[step.storage].movable for step in schedule.steps if isinstance(step, Prefetch))
