"""Operations counted in a step against torch's own counter."""

from __future__ import annotations

import pytest
from models import Recipe
from torch.utils.flop_counter import FlopCounterMode

from mebp_compile.capture import capture, find_state
from mebp_compile.flops import op_flops, step_flops
from mebp_compile.graph import Graph, Op, Ref, Storage, Value
from mebp_compile.lower import lower
from mebp_compile.passes import run_passes


def graph_of(recipe: Recipe, tier: str = "exact") -> Graph:
    training = recipe.build()
    traced = capture(training.step, find_state(training.step, None), training.batch(0), {})
    run_passes(traced.module, tier)
    return lower(traced)


@pytest.mark.parametrize(("family", "lora"), [("qwen2", None), ("qwen2", "float32"), ("gpt2", None), ("vit", None)])
def test_products_are_those_that_torch_counts(family: str, lora: str | None) -> None:
    """Matrix products of the captured step, attention apart, are those that torch's flop counter sees in the eager one."""
    recipe = Recipe(family, lora=lora)
    training, graph = recipe.build(), graph_of(recipe)
    with FlopCounterMode(display=False) as counter:
        training.step(*training.batch(0))
    seen = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    expected = sum(count for op, count in seen.items() if op.split(".")[1] in ("mm", "addmm", "bmm", "baddbmm"))
    counted = sum(op_flops(graph, op) for op in graph.ops if op.target.split(".")[1] in ("mm", "addmm", "bmm", "baddbmm"))
    assert counted == expected > 0


@pytest.mark.parametrize("lora", [None, "float32"])
def test_the_tiled_loss_counts_as_the_products_that_it_replaces(lora: str | None) -> None:
    """One walk over the vocabulary is the head's product and its gradient; a trained head's second walk counts for its gradient alone."""
    recipe = Recipe("qwen2", lora=lora)
    assert step_flops(graph_of(recipe, "reassociate")) == step_flops(graph_of(recipe))


def test_causal_attention_counts_half() -> None:
    """Of two calls that differ in is_causal, one counts half of the other, and the backward 5 products for 2."""
    values = tuple(Value(name, 0, "float32", (1, 2, 8, 4)) for name in "gqkv")
    graph = Graph("step", (Storage("s", 1, "batch"),), values, (), (), (), ())
    forward = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    q, k, v, g = Ref("q"), Ref("k"), Ref("v"), Ref("g")
    full, half = (op_flops(graph, Op("a", forward, (q, k, v, 0.0, causal))) for causal in (False, True))
    backward = op_flops(graph, Op("b", forward.replace(".default", "_backward.default"), (g, q, k, v, v, v, 0.0, False)))
    assert (full, half, backward) == (2 * 2 * (2 * 8 * 4) * 8, full // 2, full * 5 // 2)
