"""The MeSP schedule: what it keeps of a layer that runs again, and what it makes once more, where."""

import re
from dataclasses import replace

import pytest
from generators import layered, small, transformer

from solvers.baselines import keep_all, mebp, mesp, per_layer
from solvers.check import replay
from solvers.problem import Choice, Op, Problem, Storage
from solvers.schedule import Run

ATTENTION, MLP = ("q", "k", "v", "o", "sdpa"), ("gate", "up", "down", "silu", "product", "up.in", "gate.in")
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def module_of(name: str) -> str:
    """The module path that PEFT gives an op of the generator: 'layers.0.q.lora_a' -> 'layers.0.self_attn.q_proj.lora_A.default'."""
    match = re.match(r"(layers\.\d+)\.([^.]+)\.?(.*)", name)
    if match is None:
        return name.partition(".")[0]
    layer, part, rest = match.groups()
    if part in NORMS:
        return f"{layer}.{NORMS[part]}"
    block = "self_attn" if part in ATTENTION else "mlp" if part in MLP else ""
    if not block or part not in ("q", "k", "v", "o", "gate", "up", "down") or rest.startswith(("rope", "in.")):
        return f"{layer}.{block}".rstrip(".")
    inner = {"lora_a": ".lora_A.default", "lora_b": ".lora_B.default", "mm": ".base_layer", "dequantise": ".base_layer"}
    return f"{layer}.{block}.{part}_proj{inner.get(rest, '')}"


def named(problem: Problem) -> Problem:
    """The generator's step with the names that a capture of a PEFT model gives."""
    ops = tuple(
        replace(op, module=module_of(op.name), name=op.name.replace("sdpa", "scaled_dot_product")) if op.phase != "update" else op
        for op in problem.ops
    )
    return replace(problem, ops=ops)


def runs(problem: Problem) -> list[str]:
    """Names of the ops in the order in which MeSP runs them."""
    return [problem.ops[step.op].name for step in mesp(problem).steps if isinstance(step, Run)]


def last_run(order: list[str], name: str, before: int) -> int:
    """The position of the op's last run before the given one."""
    return max(k for k in range(before) if order[k] == name)


def test_mesp_needs_less_memory_than_per_layer_and_more_time() -> None:
    """The paper's claim against MeBP, for the schedules: smaller peak, some more recompute, and both far below keep-all."""
    problem = named(transformer(4, 32, 64, adam=False))
    kept, again, structured = (replay(problem, schedule(problem), False) for schedule in (keep_all, per_layer, mesp))
    assert structured.peak_bytes < again.peak_bytes < kept.peak_bytes
    assert kept.time_us < again.time_us < structured.time_us
    assert again.recomputes < structured.recomputes


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_mesp_keeps_of_a_second_run(layer: int) -> None:
    """Normalised inputs, the residual, attention's output, gate and up run twice, no more: the second run stays for every use."""
    order = runs(named(transformer(3, 16, 16, adam=False)))
    stored = ("norm1.to", "norm2.to", "residual1", "scaled_dot_product", "gate.add", "up.add")
    assert {name: order.count(f"layers.{layer}.{name}") for name in stored} == dict.fromkeys(stored, 2)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_h_is_made_right_before_its_use(layer: int, name: str) -> None:
    """Between the last run of h = xA and its use in the backward no other op of the backward runs."""
    order = runs(named(transformer(3, 16, 16, adam=False)))
    use = order.index(f"layers.{layer}.{name}.grad_b")
    made = last_run(order, f"layers.{layer}.{name}.lora_a", use)
    assert not [other for other in order[made:use] if ".grad" in other]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("made", "reader", "begin"),
    [
        ("q.rope", "scaled_dot_product.grad", "o.grad_b"),
        ("k.rope", "scaled_dot_product.grad", "o.grad_b"),
        ("v.add", "scaled_dot_product.grad", "o.grad_b"),
        ("norm2.float", "norm2.grad.to", "norm2.grad.float"),
        ("norm1.float", "norm1.grad.to", "norm1.grad.float"),
    ],
)
def test_what_a_block_makes_once_more(layer: int, made: str, reader: str, begin: str) -> None:
    """q, k, v and the insides of norms run again after the backward of their block began."""
    order = runs(named(transformer(3, 16, 16, adam=False)))
    use, begun = (order.index(f"layers.{layer}.{name}") for name in (reader, begin))
    assert begun < last_run(order, f"layers.{layer}.{made}", use) < use


def test_h_is_dropped_after_the_second_run() -> None:
    """Of a layer's second run, h = xA that the structured backward needs later is made a third time; per_layer keeps it."""
    problem = named(transformer(2, 16, 16, adam=False))
    kept = [problem.ops[step.op].name for step in per_layer(problem).steps if isinstance(step, Run)]
    for name in ("q", "gate", "up"):
        assert kept.count(f"layers.0.{name}.lora_a") == 2
        assert runs(problem).count(f"layers.0.{name}.lora_a") >= 3


def head_problem(packed_time_us: int) -> Problem:
    """A head whose weight an optional op dequantises, or that reads it packed, in the given time."""
    storages = (
        Storage("packed", 100, persistent=True), Storage("dense", 400), Storage("x", 10), Storage("loss", 1, output=True),
    )  # fmt: skip
    ops = (
        Op("embed", (Choice((), 0, 5),), (2,), module="embed"),
        Op("dequantise", (Choice((0,), 0, 10),), (1,), module="lm_head", optional=True),
        Op("loss", (Choice((1, 2), 0, 20), Choice((0, 2), 50, packed_time_us), Choice((0, 2), 9, packed_time_us + 1)), (3,), module="lm_head"),
    )
    problem = Problem(ops, storages, 10**6)
    problem.validate()
    return problem


def test_mesp_reads_the_head_packed() -> None:
    """Outside of layers it takes the fastest way that needs no dequantised weight, where per_layer takes the fastest of all."""
    problem = head_problem(60)
    assert [step for step in mesp(problem).steps if isinstance(step, Run)] == [Run(0, 0), Run(2, 1)]
    assert [step.op for step in per_layer(problem).steps if isinstance(step, Run)] == [0, 1, 2]


def test_mebp_runs_the_head_whole() -> None:
    """Outside of layers each op runs whole, where per_layer takes the fastest way; inside they are alike."""
    problem = head_problem(5)
    assert [step for step in per_layer(problem).steps if isinstance(step, Run)] == [Run(0, 0), Run(2, 1)]
    assert [step for step in mebp(problem).steps if isinstance(step, Run)] == [Run(0, 0), Run(1, 0), Run(2, 0)]
    layers = transformer(2, 16, 16)
    assert mebp(layers) == per_layer(layers)


def test_any_problem_has_a_mesp_schedule() -> None:
    """Random problems, without modules to go by: a valid schedule, whatever can't be recomputed or is written in place."""
    for problem in (*(small(seed) for seed in range(120)), *(layered(seed, 30) for seed in range(3)), transformer(1, 16, 8)):
        schedule = mesp(problem)
        assert replay(problem, schedule, enforce_budget=False).runs >= sum(not op.optional for op in problem.ops)
