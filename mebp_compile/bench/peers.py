"""The contestants, as they run inside their own process: each is a training step on the same weights and batches.

Peers hold the dequantised weights in memory, as their users do; ours streams them from the same store. What a peer's step takes is counted as
ours is: everything that it keeps between steps and everything that a step adds.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mebp_compile import finetune
from mebp_compile.capture import State, find_state
from mebp_compile.compare import live_tensors
from mebp_compile.errors import BudgetInfeasible, OptionError
from mebp_compile.measure.meter import StorageMeter
from mebp_compile.progress import Progress
from mebp_compile.runtime.bind import bind_weights, dense_weights
from mebp_compile.runtime.metering import ProcessReading, meter_call, meter_process, meter_storages, storage_bytes

MEZO_EPSILON = 1e-3
ROOM = 1.03  # over the peak of a fixed schedule, for what placing it adds
Json = dict[str, Any]
Batch = tuple[torch.Tensor, ...]


@dataclass
class Runner:
    """A contestant that is ready: its step, and the same step under the meters."""

    step: Callable[[Batch], float]
    storages: Callable[[Batch], int]
    process: Callable[[Batch], Json]
    facts: Json
    held: Any = None  # what has to stay alive


def prepare(kind: str, settings: finetune.Settings) -> Runner:
    """`kind`: "ours", "eager", "checkpointing" (of transformers), "mezo", or "schedule:NAME", a fixed schedule run by our engine."""
    if kind == "ours" or kind.startswith("schedule:"):
        return _compiled(settings, kind.partition(":")[2] or None)
    model, store = finetune.build_model(settings)
    step_fn, _ = finetune.make_step(model, settings)
    state = find_state(step_fn)
    held = contextlib.ExitStack()
    held.enter_context(dense_weights(state, bind_weights(state, store, None)))
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    elif kind == "mezo":
        step_fn = mezo_step(model, settings.lr)
    elif kind != "eager":
        raise OptionError(f"no contestant is called {kind!r}", 'use "ours", "eager", "checkpointing", "mezo" or "schedule:per_layer"')
    return _plain(step_fn, state, held)


def _plain(step_fn: Callable[..., torch.Tensor], state: State, held: contextlib.ExitStack) -> Runner:
    """A user's own step. `held` keeps what it needs alive."""

    def storages(batch: Batch) -> int:
        with StorageMeter() as meter:
            meter.watch(*live_tensors(state), *batch)
            step_fn(*batch)
        return meter.peak_bytes

    def process(batch: Batch) -> Json:
        return _bytes(meter_call(lambda: step_fn(*batch), storage_bytes(live_tensors(state))))

    return Runner(lambda batch: float(step_fn(*batch).item()), storages, process, {}, held)


def _bytes(reading: ProcessReading) -> Json:
    return {"malloc_bytes": reading.malloc_bytes, "anon_bytes": reading.anon_bytes, "resident_bytes": reading.resident_bytes}


def _compiled(settings: finetune.Settings, solver: str | None) -> Runner:
    model, store = finetune.build_model(settings)
    step_fn, _ = finetune.make_step(model, settings)
    if solver is not None:
        settings = _at_its_own_peak(step_fn, settings, store, solver)
    compiled = finetune.compile_step(step_fn, settings, store, Progress(quiet=True))
    return Runner(
        lambda batch: float(compiled(*batch).item()),
        lambda batch: meter_storages(compiled.prepare(*batch), list(batch)).peak_bytes,
        lambda batch: _bytes(meter_process(compiled.prepare(*batch), list(batch))),
        {"predicted_us": compiled.plan.time_us, "predicted_bytes": compiled.plan.peak_bytes},
    )


def _at_its_own_peak(step_fn: Callable[..., Any], settings: finetune.Settings, store: Any, solver: str) -> finetune.Settings:
    """The settings with the least budget that a fixed schedule fits."""
    try:
        finetune.compile_step(step_fn, replace(settings, budget="1", solver=solver), store, Progress(quiet=True))
    except BudgetInfeasible as refusal:
        return replace(settings, budget=str(int(refusal.smallest_bytes * ROOM)), solver=solver)
    raise AssertionError("a budget of one byte was accepted")


def mezo_step(model: torch.nn.Module, lr: float) -> Callable[..., torch.Tensor]:
    """Memory-efficient zeroth-order SGD (Malladi et al., arXiv 2305.17333, algorithm 1): two forwards, a perturbation that a seed remakes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seeds = itertools.count()

    def shift(seed: int, scale: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=scale)

    @torch.no_grad()
    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seed = next(seeds)
        shift(seed, MEZO_EPSILON)
        above: torch.Tensor = model(input_ids=input_ids, labels=labels).loss
        shift(seed, -2 * MEZO_EPSILON)
        below: torch.Tensor = model(input_ids=input_ids, labels=labels).loss
        shift(seed, MEZO_EPSILON - lr * float(above - below) / (2 * MEZO_EPSILON))
        return above

    return step
