"""optimize(): the whole pipeline on one screen. Read this first.

step_fn -> capture -> passes -> lower -> cost -> plan (problem, solve, check, place) -> codegen -> run
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree

from mebp_compile import artifacts, cache, codegen, explain, viz
from mebp_compile.capture import State, Traced, capture, find_state
from mebp_compile.capture.contract import Contract, contract_of
from mebp_compile.capture.devices import device_of
from mebp_compile.capture.optimizers import forget_state, initialise_used, optimizer_state_of
from mebp_compile.compare import Comparison, compare
from mebp_compile.config import Budget, Options, as_budget, debug_level, dump_dir, offload_folder
from mebp_compile.cost import measure_costs
from mebp_compile.errors import BudgetInfeasible, LeanError, MebpError, OptionError, StepPoisoned
from mebp_compile.graph import Graph, Op
from mebp_compile.lower import drop_gradients, lower
from mebp_compile.lower.chunks import in_chunks
from mebp_compile.lower.stream import Record, stream_weights
from mebp_compile.lower.tables import split_tables
from mebp_compile.measure.accelerator import accelerator_of
from mebp_compile.passes import better_tier, run_passes
from mebp_compile.planning import Plan, build_problem, make_plan
from mebp_compile.process_budget import checked_baseline_bytes, in_process, left_for_step, own_bytes
from mebp_compile.runtime.ahead import state_after
from mebp_compile.runtime.all_state import state_dict
from mebp_compile.runtime.bind import Streamed, bind_weights, give_back
from mebp_compile.runtime.guards import batch_tensors, holds, signature
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.program import Program, load
from mebp_compile.runtime.setup import make_engine
from mebp_compile.runtime.state import LiveState
from mebp_compile.runtime.weights import WeightStore
from mebp_compile.saving import Subject, save_step

Progress = Callable[[str], None]
SLOW = 1.1  # times what a step takes with all the memory it could want: from there on blocks of tokens are tried


def optimize(
    step_fn: Callable[..., Any],
    budget: int | float | str | Budget,
    *,
    example: tuple[Any, ...] | None = None,
    state: Iterable[Any] | None = None,
    weights: str | WeightStore | None = None,
    offload: str | Path | None = None,
    numerics: str = "exact",
    grads: str = "keep",
    effort: str = "balanced",
    time_limit_s: float = 20.0,
    solver: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> CompiledStep:
    """A step with the signature and the results of `step_fn` that never needs more memory than `budget`.

    `step_fn` does forward, backward and update in any order; its modules and optimizers are found in its closure or named in `state`. It is
    captured at the first call, or now if `example` gives a batch. `weights` names a scheme for the frozen weights ("int4", "nf4", "int8"), or is
    a WeightStore that has them; `offload` is a folder on a disk for activations and state; on an accelerator it is "host", the memory that
    `Budget(device=..., host=...)` bounds. `numerics` is the tier that passes may use: "reassociate" allows the tiled loss. `solver` names a fixed
    schedule to compare with ("keep_all", "per_layer", "mebp", "mesp", "recompute_all"). `progress` is told what is going on. With
    `Budget(..., scope="process")` the step is planned for a lean process: `save` it, and run it with `load_lean` or `mebp run`.
    Raises BudgetError, OptionError, CaptureError, StoreError, and BudgetInfeasible with the smallest budget found.
    """
    if not callable(step_fn):
        raise OptionError(
            f"step_fn is a {type(step_fn).__name__}, not a callable", "pass the function that does forward, backward and update"
        )
    wanted, found = as_budget(budget), find_state(step_fn, state)
    folder = offload_folder(offload, wanted, device_of(found), weights is not None)
    options = Options(wanted.size_bytes, folder, numerics, grads, effort, time_limit_s, cache, solver, wanted.scope, host_bytes=wanted.host_bytes)
    if wanted.scope == "process":
        options = replace(options, baseline_bytes=checked_baseline_bytes(wanted.size_bytes))
    step = CompiledStep(step_fn, found, options, bind_weights(found, weights, options.offload_dir), progress)
    if example is not None:
        try:
            step.prepare(*example)
        except BaseException:
            give_back(found, step.streamed)
            raise
    return step


def plan(step_fn: Callable[..., Any], budget: int | float | str | Budget, *, example: tuple[Any, ...], **options: Any) -> Plan:
    """A dry run: the plan of `optimize` with the same arguments. Nothing is allocated for the step, and nothing runs. Weights that a scheme's name
    quantised for it are in memory again afterwards, dequantised."""
    step = optimize(step_fn, budget, **options)
    try:
        return step.dry_run(*example)
    finally:
        give_back(step.state, step.streamed)


def build(
    step_fn: Callable[..., Any], state: State, options: Options, batch: Any, streamed: Streamed | None, tell: Progress
) -> cache.Found:
    """Capture, lower, cost, plan, generate: one program for one batch geometry, as (contract, graph, plan, code)."""
    records = streamed.records if streamed else {}
    tell("capturing the step")
    traced = capture(step_fn, state, *batch)
    higher = better_tier(traced.module, options.numerics, traced.device)
    for note in run_passes(traced.module, options.numerics, traced.device):
        tell(note)
    graph, saves = _lowered(traced, options)
    if options.offload_dir is not None:
        graph = split_tables(graph, options.budget_bytes, tell)
    graph, solved = _planned_best(graph, options, records, ", ".join(filter(None, (saves, higher))), tell, contract_of(traced))
    return contract_of(traced), graph, solved, codegen.generate(graph, solved)


def _planned_best(
    graph: Graph, options: Options, records: dict[str, Record], advice: str, tell: Progress, contract: Contract
) -> tuple[Graph, Plan]:
    """The graph and its plan, with in blocks of tokens what costs no time; where the budget refuses that, or makes it slow, the better of it and
    the same with everything in blocks that can be."""
    found: tuple[Graph, Plan] | None = None
    refusals: list[BudgetInfeasible] = []
    tried: list[tuple[Op, ...]] = []
    for again in (False, True):
        if again and found and found[1].time_us <= SLOW * found[1].keep_all_time_us:
            break
        blocks = graph if graph.device else in_chunks(graph, options.numerics == "exact", again, tell)
        if blocks.ops in tried:
            break
        tried.append(blocks.ops)
        try:
            made = _planned(blocks, options, records, advice, tell)
        except BudgetInfeasible as refusal:
            refusal.refused = (contract, refusal.refused)
            refusals.append(refusal)
            continue
        found = made if found is None or made[1].time_us < found[1].time_us else found
    if found is None:
        raise min(refusals, key=lambda refusal: refusal.smallest_bytes) from None
    return found


def _planned(graph: Graph, options: Options, records: dict[str, Record], advice: str, tell: Progress) -> tuple[Graph, Plan]:
    """Weights streamed, costs measured, solved: the final graph and its plan. A refusal carries the graph."""
    costs, graph = measure_costs(stream_weights(graph, records), options, records, tell)
    own = own_bytes(options, graph, costs.kernel_bytes)
    problem = build_problem(graph, costs, left_for_step(options, own), options.offloads, host_bytes=options.host_bytes)
    tell(f"solving for {len(graph.ops):,} ops on {len(graph.storages):,} storages")
    try:
        return graph, make_plan(graph, problem, options.effort, options.time_limit_s, advice=advice, tell=tell, solver=options.solver)
    except BudgetInfeasible as error:
        refusal = in_process(error, own) if own else error
        refusal.refused = graph
        raise refusal from None


def _lowered(traced: Traced, options: Options) -> tuple[Graph, str]:
    """The Graph, and what another choice about gradients would save, as advice."""
    graph = lower(traced)
    if options.grads == "drop":
        return drop_gradients(graph, traced.cleared), ""
    kept_bytes = sum(graph.storages[graph.storage_of(name)].size_bytes for path, name in graph.results if path.startswith("gradient:"))
    if not kept_bytes or not traced.cleared:
        return graph, ""
    return graph, f'grads="drop" (frees {kept_bytes:,} bytes of .grad that the next zero_grad would discard)'


def say(text: str) -> None:
    """What MEBP_DEBUG=1 and above prints: each stage, on standard error."""
    print(f"mebp_compile: {text}", file=sys.stderr, flush=True)


class CompiledStep:
    """A training step inside a budget: call it as the original. One program is kept for each batch geometry and set of guards."""

    def __init__(
        self,
        step_fn: Callable[..., Any],
        state: State,
        options: Options,
        streamed: Streamed | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.step_fn, self.state, self.options, self.streamed = step_fn, state, options, streamed
        self.tell: Progress = progress or (say if debug_level() else lambda text: None)
        self.programs: dict[Any, list[Program]] = {}
        self.current: Program | None = None
        self.poisoned = ""
        self.dumped = 0
        self.foreseen: dict[Any, cache.Found] = {}
        self.accelerator = accelerator_of(device_of(state))
        place = self.accelerator if options.host_bytes is not None else options.offload_dir
        self.homes = Homes(state, place) if place is not None else None
        self.ignored_gradients: frozenset[str] = frozenset()

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        self._refuse_poisoned()
        if self.options.scope == "process":
            raise LeanError(
                "a process budget can't be kept here: this process has captured and planned, and holds far more than a lean one",
                'save(folder), then `mebp run folder` or load_lean(folder) in a process of its own; or give a budget of scope="step"',
            )
        program = self.prepare(*batch, **kwargs)
        program.arrange()
        try:
            return program.run(pytree.tree_leaves((batch, kwargs)))
        except BaseException as error:
            self.poisoned = f"{type(error).__name__}: {error}"
            raise

    def _refuse_poisoned(self) -> None:
        if self.poisoned:
            raise StepPoisoned(
                f"an earlier call failed in mid-step ({self.poisoned}); the model may be half updated",
                "materialise(force=True), load a checkpoint into the model and the optimizer, then optimize again",
            )

    # --- state ---

    def materialise(self, force: bool = False) -> None:
        """Bring all parameters and optimizer state that lie on disk back into memory, under the same objects; the next call moves them again.

        Call it before you load a checkpoint, and before you let go of the compiled step: its disk space goes with it. Needs the memory, whatever
        the budget. After a failed call raises StepPoisoned, unless everything that the step updates lies on disk: then the state of before that
        call comes back and the step works again. `force` brings back what there is, perhaps of two generations, to load a checkpoint over it.
        """
        restorable = self.current is not None and self.current.restorable
        if not force and not restorable:
            self._refuse_poisoned()
        if self.homes is not None:
            self.homes.materialise(force)
        if self.poisoned and restorable and not force:
            self.poisoned, self.current = "", None
            self.programs.clear()

    def state_dict(self) -> dict[str, Any]:
        """Copies of all state as `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`, wherever it lies; nothing moves.

        With several modules or optimizers the keys are the names that the step has for them. Streamed weights stay in their store and are left
        out. Raises StepPoisoned after a failed call.
        """
        self._refuse_poisoned()
        return state_dict(self.state, self.homes)

    # --- programs ---

    def prepare(self, *batch: Any, **kwargs: Any) -> Program:
        """The program for this batch: a known one whose guards hold, or a new one. Runs nothing."""
        leaves = pytree.tree_leaves((batch, kwargs))
        known = self.programs.get(self._signature(batch, kwargs), [])
        program = next((program for program in known if program.applies(leaves)), None)
        if program is None:
            contract, graph, solved, code = self._planned_with_next(batch, kwargs)
            engine = make_engine(graph, solved, self.state, contract, self.options, self.streamed, self.homes, self.accelerator)
            program = Program(contract, graph, solved, code, engine, load(code)[0])
            self.programs.setdefault(self._signature(batch, kwargs), []).append(program)
        self.current = program
        return program

    def dry_run(self, *batch: Any, **kwargs: Any) -> Plan:
        """The plan for this batch, without anything that would run it. Optimizer state that the capture made is given up again."""
        had = optimizer_state_of(self.state)
        try:
            return self._planned_with_next(batch, kwargs)[2]
        finally:
            forget_state(self.state, keep=had)

    def _signature(self, batch: Any, kwargs: Any) -> Any:
        return signature(self.state, (batch, kwargs), self.ignored_gradients)

    def _planned_with_next(self, batch: Any, kwargs: Any) -> cache.Found:
        """The program of this call; and, planned before it runs, that of the next one where the state that this call makes (SGD's momentum)
        asks for another. Either may be refused, and then no state is left behind."""
        had = optimizer_state_of(self.state)
        made = self.foreseen.pop(self._signature(batch, kwargs), None)
        try:
            if made is None or not self._holds(made[0], batch, kwargs):
                made = self._planned(batch, kwargs)
        except BudgetInfeasible as error:
            raise self._larger(error, batch, kwargs) from None
        self.ignored_gradients |= frozenset(made[0].cleared)
        try:
            with state_after(self.state, made[1], self.ignored_gradients) as differs:
                if differs:
                    self.tell("planning the calls after the first, which find more state")
                    self.foreseen[self._signature(batch, kwargs)] = self._planned(batch, kwargs)
        except BaseException:
            forget_state(self.state, keep=had)
            raise
        return made

    def _larger(self, refusal: BudgetInfeasible, batch: Any, kwargs: Any) -> BudgetInfeasible:
        """Of the refusals of this call's program and of the next one's, the one that asks for more."""
        contract, graph = refusal.refused
        try:
            with state_after(self.state, graph, self.ignored_gradients | frozenset(contract.cleared)) as differs:
                if differs:
                    self._planned(batch, kwargs)
        except BudgetInfeasible as later:
            return max(refusal, later, key=lambda error: error.smallest_bytes)
        return refusal

    def _planned(self, batch: Any, kwargs: Any) -> cache.Found:
        """From the cache where its guards hold, or built."""
        key = self._key(batch, kwargs)
        made = cache.find(key, lambda contract: self._holds(contract, batch, kwargs)) if key else None
        if made is None:
            had = optimizer_state_of(self.state)
            try:
                made = build(self.step_fn, self.state, self.options, (batch, kwargs), self.streamed, self.tell)
            except BaseException:
                forget_state(self.state, keep=had)
                raise
            for each in {key, self._key(batch, kwargs)} - {""}:  # as the optimizer was before its state was made, and as it is now
                cache.keep(each, *made)
        else:
            initialise_used(self.state, {storage.source for storage in made[1].storages})
        if (folder := dump_dir()) is not None:
            self.dumped += 1
            artifacts.save_artifacts(folder / f"{self.dumped:02d}", *made[1:])
        return made

    def _holds(self, contract: Contract, batch: Any, kwargs: Any) -> bool:
        return holds(contract, LiveState(self.state, {}).hyper, batch_tensors(pytree.tree_leaves((batch, kwargs))))

    def _key(self, batch: Any, kwargs: Any) -> str:
        if not self.options.cache:
            return ""
        return cache.program_key(self.step_fn, self.state, self.options, self._signature(batch, kwargs), self.streamed)

    # --- inspection ---

    @property
    def program(self) -> Program:
        if self.current is None:
            raise MebpError("the step has not been captured yet", "call it once, or give optimize an example batch")
        return self.current

    @property
    def code(self) -> str:
        """The program that runs, as text."""
        return self.program.code

    @property
    def graph(self) -> Graph:
        return self.program.graph

    @property
    def plan(self) -> Plan:
        return self.program.plan

    def __str__(self) -> str:
        return explain.summary(self.graph, self.plan) if self.current is not None else "a step that has not been captured yet"

    def explain(self, module: str | None = None) -> str:
        """What the plan does, in words and a table; for one module if named."""
        return explain.explain(self.graph, self.plan, module)

    def why(self, name: str) -> str:
        """The life of one storage, value or op."""
        return explain.why(self.graph, self.plan, name)

    def show(self, path: str | Path) -> Path:
        """Write a picture: the memory timeline (.html), the graph (.svg, .dot), or a Perfetto trace (.json)."""
        return viz.write(path, self.graph, self.plan)

    def compare(self, *batch: Any, **kwargs: Any) -> Comparison:
        """Run the user's own step and the compiled one from the same state and compare every byte; both are undone. Needs eager's memory."""
        bring_back = functools.partial(self.materialise, force=True)
        return compare(self.step_fn, (batch, kwargs), self.prepare(*batch, **kwargs), self.state, self.streamed, bring_back)

    def save(self, folder: str | Path) -> Path:
        """Write graph, problem, schedule, offsets and program as files, for `mebp check` and `mebp show`; and all state, for `load_lean` and
        `mebp run` in a process that has nothing but torch. After a failed step the state is left out. Raises DiskError."""
        program = self.program
        facts = next(facts for facts, programs in self.programs.items() if any(known is program for known in programs))
        own = (self.state, self.options, self.streamed, self.homes, self.ignored_gradients)
        return save_step(folder, Subject(program, *own, facts, self.poisoned))

    def use_code(self, path: str | Path) -> None:
        """Run an edited program text from now on, for the batch that was used last."""
        program = self.program
        code = Path(path).read_text()
        function, _ = load(code)
        edited = replace(program, code=code, function=function)
        for programs in self.programs.values():
            programs[:] = [edited if known is program else known for known in programs]
        self.current = edited
