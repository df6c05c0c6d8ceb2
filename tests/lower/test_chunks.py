"""Regions of a step in blocks of tokens: the same results, less memory, as predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from law1 import assert_same, describe, estimated_costs, named_parameters, snapshot
from models import Recipe, Training

from mebp_compile import compiler, torch_private
from mebp_compile.artifacts import check_artifacts
from mebp_compile.chunk_cost import chunk_requests, price_chunks
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import BudgetInfeasible
from mebp_compile.graph import CHUNKS, Graph, LoopChoice, Op, from_json, to_json
from mebp_compile.kernels import fused
from mebp_compile.lower.chunks import TRIPS, in_chunks
from mebp_compile.lower.cuts import block_counts, block_rows
from mebp_compile.planning import Costs, OpCost

BLOCKS = (16, 24, 40, 60, 1000, 4096)
FAMILIES = {
    "qwen2": Recipe("qwen2", optimizer="sgd"),
    "gemma3": Recipe("gemma3", optimizer="adamw"),
    "gpt2": Recipe("gpt2", optimizer="sgd"),
    "vit": Recipe("vit", optimizer="sgd"),
    "bfloat16": Recipe("qwen2", optimizer="sgd", dtype=torch.bfloat16),
    "gemma3 in bfloat16": Recipe("gemma3", optimizer="sgd", dtype=torch.bfloat16),
    "adapters": Recipe("qwen2", optimizer="sgd", dtype=torch.bfloat16, lora="float32"),
    "autocast": Recipe("llama", optimizer="sgd", autocast=True),
    "dropout": Recipe("gpt2", optimizer="sgd", dropout=0.1),
    "micro-batches": Recipe("qwen2", optimizer="adamw", micro_batches=2, zero="first"),
}
Pick = Callable[[Op, Costs], tuple[OpCost, tuple[LoopChoice, ...]]]


@contextlib.contextmanager
def chunked(pick: Pick) -> Iterator[None]:
    """Inside, steps are planned in blocks of tokens, from estimates; `pick` gives the cost and the menu of each region."""
    with estimated_costs():
        estimate = compiler.measure_costs

    def measured(graph: Graph, *rest: object) -> tuple[Costs, Graph]:
        costs, _ = estimate(graph, *rest)
        picked = {op.name: pick(op, costs) for op in graph.ops if op.target == CHUNKS}
        ops = tuple(replace(op, menu=picked[op.name][1]) if op.name in picked else op for op in graph.ops)
        return replace(costs, ops={**costs.ops, **{name: cost for name, (cost, _) in picked.items()}}), replace(graph, ops=ops)

    planned = compiler._planned
    only = lambda graph, *rest: planned(in_chunks(graph), *rest)  # noqa: E731
    with mock.patch.object(compiler, "measure_costs", measured), mock.patch.object(compiler, "_planned", only), never_before():
        yield


def never_before() -> contextlib.AbstractContextManager[object]:
    """Inside, the compiler itself puts nothing in blocks."""
    return mock.patch.object(compiler, "in_chunks", lambda graph, *_: graph)


def whole(op: Op, costs: Costs) -> tuple[OpCost, tuple[LoopChoice, ...]]:
    """Each region in one block."""
    return costs.ops[op.name], ()


def in_blocks(trips: int) -> Pick:
    """Each region in `trips` blocks, or as many as there may be, where that is cheaper than whole."""

    def pick(op: Op, costs: Costs) -> tuple[OpCost, tuple[LoopChoice, ...]]:
        menu = sorted((choice for choice in op.menu if choice.reads == op.reads), key=lambda choice: abs(choice.trips - trips))
        return OpCost(1_000_000), (replace(price_chunks(op, menu[0], {}), time_us=1),)

    return pick


def by_size(op: Op, costs: Costs) -> tuple[OpCost, tuple[LoopChoice, ...]]:
    """Each region with its whole menu, a little slower the more blocks there are."""
    priced = [replace(price_chunks(op, choice, {}), time_us=100 + choice.trips) for choice in (LoopChoice(1, op.reads), *op.menu)]
    return OpCost(100, priced[0].workspace_bytes), tuple(priced[1:])


def planned(training: Training, pick: Pick, budget: int | str = "1GB", **options: object) -> CompiledStep:
    with chunked(pick):
        step = optimize(training.step, budget, effort="fast", cache=False, **{"numerics": "reassociate", **options})  # type: ignore[arg-type]
        step.prepare(*training.batch(0))
    assert any(op.target == CHUNKS for op in step.graph.ops)
    return step


@pytest.mark.parametrize("tokens", BLOCKS)
def test_blocks_cover_the_tokens(tokens: int) -> None:
    """For every number of trips offered the blocks are that many, disjoint, and end at the last token."""
    for trips in block_counts(tokens, TRIPS):
        starts = range(0, tokens, block_rows(tokens, trips))
        assert len(starts) == trips
        assert starts[-1] < tokens <= starts[-1] + block_rows(tokens, trips)


@pytest.mark.parametrize("recipe", FAMILIES.values(), ids=FAMILIES)
def test_in_one_block_it_is_the_same_step(recipe: Recipe) -> None:
    """Regions with one block each leave what eager leaves, bit for bit: nothing is computed differently, only elsewhere."""
    own, other = recipe.build(), recipe.build()
    with mock.patch.object(compiler, "run_passes", return_value=[]):
        step = planned(other, whole)
    for call in range(2):
        state = torch.get_rng_state()
        expected = own.step(*own.batch(call))
        torch.set_rng_state(state)
        assert_same(f"call {call}: returned", describe(expected), describe(step(*other.batch(call))))
        assert_same(f"call {call}", snapshot(own), snapshot(other))


@pytest.mark.parametrize(("name", "sequence", "trips"), [*((name, 16, 2) for name in FAMILIES), ("qwen2", 15, 4), ("gpt2", 61, 4)])
def test_in_blocks_it_is_the_same_up_to_rounding(name: str, sequence: int, trips: int) -> None:
    """In several blocks, the last of them shorter or not, gradients are eager's but for the rounding of sums over the tokens."""
    recipe = FAMILIES[name].but(sequence=sequence, zero="never", micro_batches=1, optimizer="sgd")
    own, other = recipe.build(), recipe.build()
    with mock.patch.object(compiler, "run_passes", return_value=[]):
        step = planned(other, in_blocks(trips))
    state = torch.get_rng_state()
    expected = own.step(*own.batch(0))
    torch.set_rng_state(state)
    torch.testing.assert_close(step(*other.batch(0)), expected, rtol=1e-3 if recipe.dtype is torch.bfloat16 else 1e-5, atol=0)
    assert_near(own, other, 2e-2 if recipe.dtype is torch.bfloat16 or recipe.autocast else 1e-5)


def assert_near(own: Training, other: Training, bound: float) -> None:
    """Gradients are alike, relative to their norms."""
    for (label, left), (_, right) in zip(named_parameters(own), named_parameters(other), strict=True):
        if left.grad is not None and right.grad is not None:
            assert (left.grad - right.grad).norm() <= bound * max(float(left.grad.norm()), 1e-4), label  # some are zero but for rounding


@pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no compiler)")
def test_fused_ops_go_in_blocks() -> None:
    """Gated units, which a pass has made of an MLP's elementwise ops, are part of its regions, and give in blocks what they give whole."""
    recipe = FAMILIES["adapters"].but(sequence=32, zero="never", lora="model")
    own, other = recipe.build(), recipe.build()
    with estimated_costs():
        whole_step = optimize(own.step, "1GB", effort="fast", cache=False, numerics="reassociate")
        expected = whole_step(*own.batch(0))
    step = planned(other, in_blocks(2), numerics="reassociate")
    torch.testing.assert_close(step(*other.batch(0)), expected, rtol=1e-3, atol=0)
    assert_near(own, other, 2e-2)
    inside = {op.target for region in step.graph.ops if region.body is not None for op in region.body.ops}
    assert {"mebp.gated.default", "mebp.gated_backward.default"} <= inside
    asked: set[str] = set()
    for region in (op for op in step.graph.ops if op.body is not None):
        chunk_requests(region, lambda _, op: asked.add(op.target))
    assert {"mebp.gated.default", "mebp.gated_backward.default"} <= asked
    assert not any(op.target == "mebp.gated.default" for op in step.graph.ops)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3 in bfloat16", "adapters"])
def test_the_peak_is_as_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest budget found, below that of the same step without blocks, the measured peak of tensors is the predicted one."""
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", lambda: True)  # blocks alone: products in fp32 need more than a tiny step has
    recipe = FAMILIES[name].but(sequence=64, optimizer="sgd", config=(("intermediate_size", 512),) if name != "gpt2" else ())
    smallest = {}
    for kind, context in (("whole", estimated_costs()), ("blocks", chunked(by_size))):
        training = recipe.build()
        numerics = "reassociate" if kind == "blocks" else "exact"
        with context, never_before():
            step = optimize(training.step, 1000, effort="fast", cache=False, numerics=numerics)
            with pytest.raises(BudgetInfeasible) as refusal:
                step.prepare(*training.batch(0))
        smallest[kind] = refusal.value.smallest_bytes
    assert smallest["blocks"] < smallest["whole"]
    training = recipe.build()
    comparison = planned(training, by_size, smallest["blocks"]).compare(*training.batch(0))
    assert comparison.measured_bytes <= comparison.predicted_bytes <= comparison.measured_bytes * 1.02 + 65536


def test_blocks_dequantise_their_weights(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With streamed weights a region may read them packed and make each just before it needs it; the gradients are those of the whole step."""
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", lambda: True)  # nothing is measured here, so no op may have a workspace
    recipe = FAMILIES["adapters"].but(zero="never", sequence=32)

    def packed(op: Op, costs: Costs) -> tuple[OpCost, tuple[LoopChoice, ...]]:
        menu = [choice for choice in op.menu if choice.reads != op.reads] or list(op.menu)
        return OpCost(1_000_000), (replace(price_chunks(op, menu[1], {}), time_us=1),)

    training = recipe.build()
    step = planned(training, packed, weights="int4", offload=disk_folder)
    assert ", 'layers_0_mlp_gate_proj_weight', layers_0_mlp_gate_proj_weight_packed, True, 1)" in step.code
    before = {name: p.detach().clone() for name, p in named_parameters(training) if p.requires_grad}
    comparison = step.compare(*training.batch(0))
    assert comparison.measured_bytes <= comparison.predicted_bytes
    reference = recipe.build()
    with estimated_costs():
        plain = optimize(reference.step, "1GB", effort="fast", cache=False, weights="int4", offload=disk_folder / "other")
        plain(*reference.batch(0))
    step(*training.batch(0))
    for (name, left), (_, right) in zip(named_parameters(reference), named_parameters(training), strict=True):
        if name in before:
            assert (left.grad - right.grad).norm() <= 2e-2 * left.grad.norm(), name


def test_a_saved_step_is_proven(tmp_path: Path) -> None:
    """Graph and body survive JSON, and every claim of `mebp check` holds for the saved step."""
    step = planned(FAMILIES["qwen2"].build(), by_size)
    assert from_json(to_json(step.graph)) == step.graph
    assert check_artifacts(step.save(tmp_path / "step")).count("ok  ") == 6


def test_where_memory_is_no_matter_nothing_is_in_blocks() -> None:
    """A budget that holds the whole step is planned without blocks, which would compute the forward's part again."""
    training = FAMILIES["qwen2"].build()
    with estimated_costs():
        step = optimize(training.step, "1GB", effort="fast", cache=False, numerics="reassociate", example=training.batch(0))
    assert not any(op.target == CHUNKS for op in step.graph.ops)


def test_the_program_reads_as_a_loop() -> None:
    """A region prints as a `for` over blocks of tokens with its ops one a line, inputs cut and outputs put in place."""
    code = planned(FAMILIES["qwen2"].build(), in_blocks(2)).code
    assert "    for tile in run.blocks(32, 2):\n        layers_0_mlp_gate_proj_view_rows = layers_0_mlp_gate_proj_view[tile]\n" in code
    assert "        layers_0_mlp_down_proj_mm[tile] = layers_0_mlp_down_proj_mm_rows\n" in code
    assert "run.gather(layers_0_mlp_down_proj_mm_2, layers_0_mlp_down_proj_mm_2_part, tile)\n" in code
