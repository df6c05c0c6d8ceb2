"""The contestants, as they run inside their own process: each is a training step on the same weights and batches.

Peers hold the dequantised weights in memory, as their users do; ours streams them from the same store, and bitsandbytes packs them its own way.
What a peer's step takes is counted as ours is: everything that it keeps between steps and everything that a step adds.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mebp_compile import finetune
from mebp_compile.bench import nf4, torch_compile
from mebp_compile.bench.torch_private import allocated_peak
from mebp_compile.capture import State, find_state
from mebp_compile.compare import live_tensors
from mebp_compile.cost import product_us
from mebp_compile.errors import BudgetInfeasible, OptionError
from mebp_compile.flops import step_flops
from mebp_compile.measure.meter import StorageMeter
from mebp_compile.progress import Progress
from mebp_compile.runtime.bind import bind_weights, dense_weights
from mebp_compile.runtime.metering import ProcessReading, meter_call, meter_process, meter_storages, storage_bytes

MEZO_EPSILON = 1e-3
PRODUCTS = 24  # pairs of products of a step of "matmul"
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


@dataclass
class Dense:
    """A user's own step, its weights in memory while `held` is open."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: Callable[..., torch.Tensor]
    state: State
    held: contextlib.ExitStack


def prepare(kind: str, settings: finetune.Settings) -> Runner:
    """`kind`: "ours"; "schedule:NAME", a fixed schedule run by our engine; "matmul", the machine's rate; or a name of PEERS, with what it takes
    after a colon."""
    name, _, detail = kind.partition(":")
    if name in ("ours", "schedule"):
        return _compiled(settings, detail or None)
    if name == "matmul":
        return _matmul(settings)
    if name not in PEERS:
        known = ("ours", "schedule:per_layer", "schedule:mebp", "schedule:mesp", *PEERS)
        raise OptionError(f"no contestant is called {kind!r}", f"use one of {', '.join(known)}")
    if name == "bnb":
        nf4.require_bitsandbytes()
    runner = PEERS[name](_dense(settings), detail, settings)
    gc.collect()
    return runner


def _dense(settings: finetune.Settings) -> Dense:
    model, store = finetune.build_model(settings)
    step_fn, optimizer = finetune.make_step(model, settings)
    state, held = find_state(step_fn), contextlib.ExitStack()
    held.enter_context(dense_weights(state, bind_weights(state, store, None)))
    return Dense(model, optimizer, step_fn, state, held)


# --- peers ---


def _eager(dense: Dense, _: str, settings: finetune.Settings) -> Runner:
    return _plain(dense.step, dense)


def _checkpointing(dense: Dense, _: str, settings: finetune.Settings) -> Runner:
    """transformers' own gradient checkpointing: a layer's input is kept, the layer runs again in the backward."""
    dense.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return _plain(dense.step, dense)


def _torch_compile(dense: Dense, budget: str, settings: finetune.Settings) -> Runner:
    return _plain(torch_compile.compiled_step(dense.model, dense.step, budget), dense, compiled=True)


def _remat_by_tags(dense: Dense, backend: str, settings: finetune.Settings) -> Runner:
    step = torch_compile.remat_by_tags_step(dense.model, dense.optimizer, backend or "aot_eager")
    return _plain(step, dense, compiled=True)


def _mezo(dense: Dense, _: str, settings: finetune.Settings) -> Runner:
    return _plain(mezo_step(dense.model, settings.lr), dense)


def _bnb(dense: Dense, _: str, settings: finetune.Settings) -> Runner:
    """The dense weights only pass through memory, on their way to the packed ones."""
    model = nf4.nf4_model(dense.model, finetune.DTYPES[settings.dtype])
    dense.held.close()
    step_fn, optimizer = finetune.make_step(model, settings)
    packed = Dense(model, optimizer, step_fn, find_state(step_fn), contextlib.ExitStack())
    return _plain(step_fn, packed, hidden=list(nf4.hidden_tensors(model)))


PEERS: dict[str, Callable[[Dense, str, finetune.Settings], Runner]] = {
    "eager": _eager,
    "checkpointing": _checkpointing,
    "compile": _torch_compile,
    "remat_by_tags": _remat_by_tags,
    "mezo": _mezo,
    "bnb": _bnb,
}


def _plain(step_fn: Callable[..., torch.Tensor], dense: Dense, compiled: bool = False, hidden: Iterable[torch.Tensor] = ()) -> Runner:
    """A step without a plan. compiled: by torch, so that StorageMeter can't be used; hidden: tensors kept that its state does not show."""

    def storages(batch: Batch) -> int:
        kept = [*live_tensors(dense.state), *hidden, *batch]
        if compiled:
            return storage_bytes(kept) + allocated_peak(lambda: step_fn(*batch))
        with StorageMeter() as meter:
            meter.watch(*kept)
            step_fn(*batch)
        return meter.peak_bytes

    def process(batch: Batch) -> Json:
        return _bytes(meter_call(lambda: step_fn(*batch), storage_bytes([*live_tensors(dense.state), *hidden])))

    return Runner(lambda batch: float(step_fn(*batch).item()), storages, process, {}, dense)


def _bytes(reading: ProcessReading) -> Json:
    return {"malloc_bytes": reading.malloc_bytes, "anon_bytes": reading.anon_bytes, "resident_bytes": reading.resident_bytes}


# --- ours ---


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
        {"predicted_us": compiled.plan.time_us, "predicted_bytes": compiled.plan.peak_bytes, "flops": step_flops(compiled.graph)},
    )


def _at_its_own_peak(step_fn: Callable[..., Any], settings: finetune.Settings, store: Any, solver: str) -> finetune.Settings:
    """The settings with the least budget that a fixed schedule fits."""
    try:
        finetune.compile_step(step_fn, replace(settings, budget="1", solver=solver), store, Progress(quiet=True))
    except BudgetInfeasible as refusal:
        return replace(settings, budget=str(int(refusal.smallest_bytes * ROOM)), solver=solver)
    raise AssertionError("a budget of one byte was accepted")


# --- the machine ---


def _matmul(settings: finetune.Settings) -> Runner:
    """No training: the model's largest matrix products, its MLP's, again and again, as a measure of what this machine can do."""
    config, dtype = finetune.config_of(settings), finetune.DTYPES[settings.dtype]
    tokens, hidden, inner = settings.batch * settings.sequence, config.hidden_size, config.intermediate_size
    x, up, down = (torch.randn(shape, dtype=dtype) for shape in ((tokens, hidden), (hidden, inner), (inner, hidden)))

    def step(_: Batch) -> float:
        for _ in range(PRODUCTS):
            torch.mm(torch.mm(x, up), down)
        return 0.0

    predicted_us = PRODUCTS * sum(product_us(tokens, *sizes, dtype) for sizes in ((hidden, inner), (inner, hidden)))
    return Runner(step, lambda _: 0, lambda _: {}, {"flops": PRODUCTS * 4 * tokens * hidden * inner, "predicted_us": predicted_us})


# --- MeZO ---


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
