"""Law 1: the compiled step leaves what the user's own step leaves, bit for bit.

`assert_same_training` builds a training twice, runs one eagerly and one compiled, and compares raw bytes after every call: what the step
returned, every gradient, parameter, entry of optimizer state and buffer, and the generator's state. What a caller kept from earlier calls
must not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from models import Training

from mebp_compile import compiler
from mebp_compile.chunk_cost import at_blocks, price_chunks, value_bytes
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.graph import CHUNKS, Graph, LoopChoice, Op, block_ops, inputs_of
from mebp_compile.planning import Costs, OpCost

Make = Callable[[], Training]


def assert_same_training(
    make: Make, budget: int | str = "1GB", calls: int = 3, offload: str | Path | None = None, effort: str = "fast", **options: Any
) -> CompiledStep:
    """Run `calls` steps both ways and compare after each; returns the compiled step for further looks."""
    own, other = make(), make()
    assert_same("before the first step", snapshot(own), snapshot(other))
    with estimated_costs():
        compiled = optimize(other.step, budget, offload=offload, effort=effort, **{"cache": False, **options})
        run_both(own, other, compiled, calls)
    return compiled


def run_both(own: Training, other: Training, compiled: CompiledStep, calls: int) -> None:
    """`calls` steps of `own` eagerly and of `other` compiled, from the same state of the generator, compared after each."""
    kept: list[tuple[Any, dict[str, Any]]] = []
    for call in range(calls):
        before = torch.get_rng_state()
        expected = own.step(*own.batch(call))
        drawn = torch.get_rng_state()
        torch.set_rng_state(before)
        returned = compiled(*other.batch(call))
        where = f"call {call}"
        assert raw(torch.get_rng_state()) == raw(drawn), f"{where}: the generator is in another state"
        assert_same(f"{where}: returned", describe(expected), describe(returned))
        compiled.materialise()  # with offload, state may lie on disk between calls
        assert_same(where, snapshot(own), snapshot(other))
        for number, (item, bits) in enumerate(kept):
            assert describe(item) == bits, f"{where} rewrote what call {number} had returned or left in .grad"
        grads = {name: p.grad for name, p in named_parameters(other) if p.grad is not None}
        kept.append((returned, describe(returned)))
        kept += [(grads, describe(grads))] if own.fresh_gradients else []
        own.between(call)
        other.between(call)


@contextlib.contextmanager
def estimated_costs() -> Iterator[None]:
    """Inside, plans are made from estimates: measuring every op of every tiny model would take longer than all else, and bits don't
    depend on it.
    """
    with mock.patch.object(compiler, "measure_costs", lambda graph, *rest: (estimate(graph), in_one_block(graph))):
        yield


def estimate(graph: Graph) -> Costs:
    """Costs from bytes alone; of a region, those of its parts."""
    costs = {}
    for op in graph.ops:
        whole = LoopChoice(1, op.reads)
        if op.target == CHUNKS and op.body is not None:
            body = at_blocks(op.body, 1)
            parts = [(part.target, sum(value_bytes(body, name) for name in named(part) if name in body.value)) for part in block_ops(op, whole)]
            costs[op.name] = OpCost(sum(guess_us(*part) for part in parts), price_chunks(op, whole, {}).workspace_bytes)
        else:
            touched = sum(graph.storages[storage].size_bytes for storage in (*op.creates, *op.reads, *op.writes))
            costs[op.name] = OpCost(guess_us(op.target, touched))
    return Costs(costs)


def guess_us(target: str, touched_bytes: int) -> int:
    return 1 + touched_bytes * (20 if "mm" in target or "attention" in target else 1) // 10_000


def named(op: Op) -> tuple[str, ...]:
    return (*inputs_of(op), *(name for name in op.outputs if name))


def in_one_block(graph: Graph) -> Graph:
    """The graph with its regions whole: no measurement has shown their blocks to leave the same bits."""
    return replace(graph, ops=tuple(replace(op, menu=()) if op.target == CHUNKS else op for op in graph.ops))


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in index order: NaN payloads and signs of zero count."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def bits(leaf: Any) -> Any:
    """Something comparable that tells apart all that eager training could tell apart."""
    if isinstance(leaf, torch.Tensor):
        return ("tensor", leaf.dtype, tuple(leaf.shape), tuple(leaf.stride()), raw(leaf))
    return ("float", leaf.hex()) if isinstance(leaf, float) else (type(leaf), leaf)


def describe(tree: Any) -> dict[str, Any]:
    """Every leaf of a pytree by its path, and the shape of the tree itself."""
    leaves, spec = pytree.tree_flatten_with_path(tree)
    return {"tree": (type(tree), str(spec)), **{pytree.keystr(path): bits(leaf) for path, leaf in leaves}}


def named_parameters(training: Training) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for number, module in enumerate(training.modules):
        yield from ((f"{number}.{name}", parameter) for name, parameter in module.named_parameters())


def snapshot(training: Training) -> dict[str, Any]:
    """All state of a training as comparable bytes."""
    state: dict[str, Any] = {}
    for name, parameter in named_parameters(training):
        state[f"parameter {name}"] = bits(parameter)
        state[f"gradient {name}"] = None if parameter.grad is None else bits(parameter.grad)
    for number, module in enumerate(training.modules):
        state |= {f"buffer {number}.{name}": bits(buffer) for name, buffer in module.named_buffers()}
        state[f"modes {number}"] = [child.training for child in module.modules()]
    names = {id(parameter): name for name, parameter in named_parameters(training)}
    for number, optimizer in enumerate(training.optimizers):
        state |= optimizer_state(f"optimizer {number}", optimizer, names)
    return state


def optimizer_state(label: str, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Every entry of an optimizer's state, and its param groups. Empty entries (state that no step made yet) don't count."""
    state: dict[str, Any] = {}
    for parameter, entries in optimizer.state.items():
        state |= {f"{label} {names[id(parameter)]}.{key}": bits(value) for key, value in entries.items()}
    for index, group in enumerate(optimizer.param_groups):
        state |= {f"{label} group {index}.{key}": bits(value) for key, value in group.items() if key != "params"}
    return state


def assert_same(where: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Fail with the names of the first differing entries, and how they differ."""
    different = [key for key in {**expected, **found} if expected.get(key, "absent") != found.get(key, "absent")]
    lines = [f"  {key}: {_difference(expected.get(key, 'absent'), found.get(key, 'absent'))}" for key in different[:8]]
    assert not different, f"{where}: {len(different)} of {len(expected)} entries differ from eager:\n" + "\n".join(lines)


def _difference(expected: Any, found: Any) -> str:
    if not (isinstance(expected, tuple) and isinstance(found, tuple) and expected[0] == found[0] == "tensor"):
        return f"expected {_short(expected)}, found {_short(found)}"
    if expected[1:4] != found[1:4]:
        return f"expected {expected[1:4]}, found {found[1:4]}"
    wrong = sum(left != right for left, right in zip(expected[4], found[4], strict=True))
    return f"{wrong} of {len(expected[4])} bytes"


def _short(item: Any) -> str:
    return str(item[:4] if isinstance(item, tuple) else item)[:200]


def smallest_budget(make: Make, fraction: float, offload: Path | None = None) -> int:
    """A tight budget in bytes: the part of keep-all's need that lies `fraction` of the way above the smallest budget found."""
    training = make()
    with estimated_costs():
        try:
            dry = optimize(training.step, 1 << 10, offload=offload, effort="fast", cache=False)
            dry.prepare(*training.batch(0))
        except BudgetInfeasible as error:
            smallest = error.smallest_bytes
        keep_all = optimize(training.step, 1 << 34, effort="fast", cache=False)
        keep_all.prepare(*training.batch(0))
    return int(smallest + fraction * (keep_all.plan.keep_all_bytes - smallest))
