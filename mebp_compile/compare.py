"""compare(): the user's own step against the compiled one, from the same state, once, byte by byte; then everything is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture import State
from mebp_compile.config import format_bytes
from mebp_compile.measure.meter import StorageMeter
from mebp_compile.runtime.bind import Streamed, dense_weights
from mebp_compile.runtime.metering import meter_storages
from mebp_compile.runtime.program import Program

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """What differs in raw bytes (names; empty: equal bit for bit), and what was predicted and measured."""

    different: tuple[str, ...]
    compared: int
    predicted_bytes: int
    budget_bytes: int
    measured_bytes: int
    eager_bytes: int

    @property
    def equal(self) -> bool:
        return not self.different

    def __str__(self) -> str:
        verdict = "equal bit for bit" if self.equal else f"{len(self.different)} differ, first {', '.join(self.different[:3])}"
        return (
            f"{self.compared} tensors (results, gradients, parameters, optimizer state, buffers, generator): {verdict}\n"
            f"storages  predicted {self.predicted_bytes:,} bytes, measured {self.measured_bytes:,} bytes; "
            f"eager {self.eager_bytes:,} bytes ({format_bytes(self.eager_bytes)}); budget {self.budget_bytes:,} bytes"
        )


def compare(
    step_fn: Callable[..., Any], batch: Any, program: Program, state: State, streamed: Streamed | None, bring_back: Callable[[], None]
) -> Comparison:
    """Run both from the state as it is, and put it back, also where one of them fails. `batch` is (args, kwargs). Needs eager's memory, and
    copies of all state. bring_back: what brings all state into memory after a failure."""
    program.materialise()
    before = snapshot(state)
    try:
        with dense_weights(state, streamed), StorageMeter() as meter:
            meter.watch(*live_tensors(state))
            returned = step_fn(*batch[0], **batch[1])
        wanted = {**_results(returned), **snapshot(state)}
    finally:
        restore(state, before)
    try:
        reading = meter_storages(program, pytree.tree_leaves(batch))
        program.materialise()
        given = {**_results(reading.result), **snapshot(state)}
    except BaseException:
        bring_back()  # whatever there is of a half-made step: what was before is put over it
        raise
    finally:
        restore(state, before)
    names = sorted(wanted.keys() | given.keys())
    different = tuple(name for name in names if not same_bytes(wanted.get(name), given.get(name)))
    plan = program.plan
    return Comparison(different, len(names), plan.tensor_bytes, plan.problem.budget_bytes, reading.peak_bytes, meter.peak_bytes)


def live_tensors(state: State) -> Iterator[torch.Tensor]:
    """Every parameter, buffer and tensor of optimizer state that the user's objects hold."""
    yield from (parameter for _, _, parameter in state.parameters())
    yield from (buffer for module in state.modules.values() for buffer in module.buffers())
    yield from (entries[name] for _, _, entries, name in _optimizer_entries(state) if isinstance(entries[name], torch.Tensor))


def _results(returned: Any) -> Tensors:
    leaves = pytree.tree_leaves(returned)
    return {
        f"result {index}": torch.as_tensor(leaf).detach().clone()
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, (torch.Tensor, float, int))
    }


def snapshot(state: State) -> Tensors:
    """Copies of all that a step may change: parameters, gradients, buffers, optimizer state, the generator."""
    found: Tensors = {"generator": torch.get_rng_state()}
    for root, path, parameter in state.parameters():
        if parameter.device.type != "meta":
            found[f"parameter {root}.{path}"] = parameter.detach().clone()
        if parameter.grad is not None:
            found[f"gradient {root}.{path}"] = parameter.grad.detach().clone()
    for root, module in state.modules.items():
        found |= {f"buffer {root}.{path}": buffer.detach().clone() for path, buffer in module.named_buffers()}
    for root, key, entries, name in _optimizer_entries(state):
        if isinstance(entries[name], torch.Tensor):
            found[f"optimizer {root} {key} {name}"] = entries[name].detach().clone()
    return found


def _optimizer_entries(state: State) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    names = {id(parameter): f"{root}.{path}" for root, path, parameter in state.parameters()}
    for root, optimizer in state.optimizers.items():
        for parameter, entries in optimizer.state.items():
            for name in list(entries):
                yield root, names[id(parameter)], entries, name


def restore(state: State, saved: Tensors) -> None:
    """Put a snapshot back; optimizer state and gradients that did not exist then are dropped."""
    torch.set_rng_state(saved["generator"])
    with torch.no_grad():
        for root, path, parameter in state.parameters():
            if f"parameter {root}.{path}" in saved:
                parameter.copy_(saved[f"parameter {root}.{path}"])
            grad = saved.get(f"gradient {root}.{path}")
            parameter.grad = None if grad is None else grad.clone()
        for root, module in state.modules.items():
            for path, buffer in module.named_buffers():
                buffer.copy_(saved[f"buffer {root}.{path}"])
        for root, key, entries, name in list(_optimizer_entries(state)):
            old = saved.get(f"optimizer {root} {key} {name}")
            if old is not None:
                entries[name].copy_(old)
            elif isinstance(entries[name], torch.Tensor):
                del entries[name]
    for optimizer in state.optimizers.values():
        for parameter in [parameter for parameter, entries in optimizer.state.items() if not entries]:
            del optimizer.state[parameter]


def same_bytes(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Equal dtype, shape and raw bytes, NaN and -0.0 included."""
    if left is None or right is None or left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8))
