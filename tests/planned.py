"""Planned steps for the tests of what shows, explains and saves a plan: a captured tiny Qwen2, and synthetic chains without torch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import solvers
from mebp_compile import codegen
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.graph import Graph, Op, Ref, Storage, Value, verify
from mebp_compile.place import place_under
from mebp_compile.planning import Costs, OpCost, Plan, build_problem, make_plan, tensor_peak
from solvers.baselines import keep_all


@dataclass(frozen=True)
class Planned:
    """A graph, its plan and its program."""

    graph: Graph
    plan: Plan
    code: str


def planned(graph: Graph, costs: Costs, budget_bytes: int, offload: bool) -> Planned:
    plan = make_plan(graph, build_problem(graph, costs, budget_bytes, offload), effort="fast", time_limit_s=10.0)
    return Planned(graph, plan, codegen.generate(graph, plan))


# --- a captured step ---


@cache
def tiny_graph() -> Graph:
    """Forward, backward and AdamW of a two-layer Qwen2, captured and lowered."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mebp_compile.capture import capture, find_state
    from mebp_compile.lower import lower

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return lower(capture(step, find_state(step), (torch.zeros((2, 64), dtype=torch.int64),), {}))


def costs_by_bytes(graph: Graph) -> Costs:
    """A cost table without measuring: time by bytes touched, more for matmuls, and some workspace."""
    table = {}
    for op in graph.ops:
        size = sum(graph.storages[storage].size_bytes for storage in (*op.creates, *op.reads, *op.writes))
        heavy = "mm" in op.target or "attention" in op.target
        table[op.name] = OpCost(1 + size * (20 if heavy else 1) // 10_000, 4096 if heavy else 0)
    return Costs(table)


@cache
def roomy() -> Planned:
    """The tiny step with all the memory it could want: nothing recomputed, many tensors in the arena."""
    return planned(tiny_graph(), costs_by_bytes(tiny_graph()), 100_000_000, offload=False)


@cache
def tight(offload: bool) -> Planned:
    """The tiny step in 70 % of what keep-all needs: recomputes, and offloads where allowed."""
    return planned(tiny_graph(), costs_by_bytes(tiny_graph()), int(0.7 * roomy().plan.keep_all_bytes), offload)


# --- synthetic steps ---


def chain(layers: int, seed: int = 0) -> Graph:
    """A chain of layers: forward_i makes hidden_i from hidden_{i-1}; backward_i makes its gradient and grad_weight_i; update_i writes weight_i."""
    chance = random.Random(seed)
    storages = [Storage("batch_0", 64, "batch", "batch:0")]
    ops: list[Op] = []
    weight = [
        _add(storages, f"weight_{i}", 64 * chance.randint(1, 64), "parameter", f"parameter:model:layers.{i}.weight") for i in range(layers)
    ]
    hidden = [0]
    for i in range(layers):
        hidden.append(_add(storages, f"hidden_{i}", 64 * chance.randint(64, 512)))
        ops.append(_op(storages, f"forward_{i}", "forward", i, (hidden[i], weight[i]), (hidden[i + 1],)))
    gradient = hidden[layers]
    for i in reversed(range(layers)):
        made = (
            _add(storages, f"grad_{i}", 64 * chance.randint(64, 512)),
            _add(storages, f"grad_weight_{i}", storages[weight[i]].size_bytes),
        )
        ops.append(_op(storages, f"backward_{i}", "backward", i, tuple(dict.fromkeys((gradient, hidden[i], weight[i]))), made))
        ops.append(_op(storages, f"update_{i}", "update", i, (made[1],), (), (weight[i],)))
        gradient = made[0]
    loss = _add(storages, "loss", 64)
    ops.append(_op(storages, "loss_op", "update", -1, (gradient,), (loss,)))
    values = tuple(Value(item.name, index, "uint8", (item.size_bytes,), (1,)) for index, item in enumerate(storages))
    inputs = tuple(storages[index].name for index in (0, *weight))
    graph = Graph("chain", tuple(storages), values, tuple(ops), (), inputs, (("return:0", "loss"),))
    verify(graph)
    return graph


def _add(storages: list[Storage], name: str, size_bytes: int, role: str = "activation", source: str = "") -> int:
    storages.append(Storage(name, size_bytes, role, source))
    return len(storages) - 1


def _op(
    storages: list[Storage],
    name: str,
    phase: str,
    layer: int,
    reads: tuple[int, ...],
    creates: tuple[int, ...],
    writes: tuple[int, ...] = (),
) -> Op:
    return Op(
        name, f"aten.{phase}_thing.default", tuple(Ref(storages[index].name) for index in (*writes, *reads)),
        outputs=tuple(storages[index].name for index in creates), creates=creates, reads=reads, writes=writes, phase=phase,
        module=f"model.layers.{layer}" if layer >= 0 and phase != "update" else "",
        source=f'File "/home/somebody/model.py", line {100 + layer}, in forward' if phase == "forward" else "",
        forward_op=f"forward_{layer}" if phase == "backward" else "",
        out_target="aten.thing.out" if len(creates) == 1 else "", out=("out",) if len(creates) == 1 else (),
    )  # fmt: skip


def random_plan(seed: int) -> Planned:
    """A small chain with random sizes and costs, under a random budget at which a schedule exists; half of them with a disk."""
    chance = random.Random(seed)
    graph = chain(chance.randint(1, 7), seed)
    costs = Costs({op.name: OpCost(chance.randint(1, 500), 64 * chance.randint(0, 40)) for op in graph.ops}, 100.0, 50.0, 30)
    everything = planned(graph, costs, 10**9, offload=False).plan.keep_all_bytes
    offload = chance.random() < 0.5
    try:
        return planned(graph, costs, int(everything * chance.uniform(0.3, 1.1)), offload)
    except BudgetInfeasible as error:
        return planned(graph, costs, error.smallest_bytes, offload)


@cache
def long_plan(layers: int = 1700) -> Planned:
    """A keep-all schedule of more than 10,000 steps."""
    graph = chain(layers)
    problem = build_problem(graph, Costs({op.name: OpCost(10) for op in graph.ops}), 10**12, offload=False)
    schedule = keep_all(problem)
    report = solvers.replay(problem, schedule)
    placement = place_under(graph, problem, schedule)
    tensors = tensor_peak(graph, problem, schedule)
    plan = Plan(
        problem, schedule, report, placement, placement.peak_bytes, tensors, report.peak_bytes, report.time_us, report.time_us, method="keep_all"
    )
    return Planned(graph, plan, codegen.generate(graph, plan))
