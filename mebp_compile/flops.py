"""Floating-point operations of a step's matrix products, each counted once: what a schedule's time is to be judged by. Torch-free.

A multiplication and an addition are two. Attention counts half its square where it is causal, and its backward 5 products for the forward's 2
(Dao, FlashAttention-2, arXiv 2307.08691, section 4.1). What an op computes a second time for itself (the head's logits in `head_gradient`) is not
counted, and neither is a recompute: both are ways to save memory, not work that the step asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mebp_compile.graph import Graph, Op, Value

Shapes = Callable[[int], tuple[int, ...]]


def step_flops(graph: Graph) -> int:
    """Of all ops of the step, each run once."""
    return sum(op_flops(graph, op) for op in graph.ops)


def op_flops(graph: Graph, op: Op) -> int:
    """Of one op; 0 for what is no matrix product."""
    counts = COUNTS.get(op.target)
    return counts(op, _shapes(graph, op)) if counts else 0


def _shapes(graph: Graph, op: Op) -> Shapes:
    def shape(position: int) -> tuple[int, ...]:
        value: Value = graph.value[op.args[position].name]
        return value.shape

    return shape


def _product(first: int) -> Callable[[Op, Shapes], int]:
    """[..., m, k] x [..., k, n], from argument number `first` on."""
    return lambda op, shape: 2 * math.prod(shape(first)) * shape(first + 1)[-1]


def _attention(products: int, query: int, causal: int) -> Callable[[Op, Shapes], int]:
    """`products` products of [heads, tokens, size] with [heads, size, keys]."""

    def count(op: Op, shape: Shapes) -> int:
        whole = 2 * products * math.prod(shape(query)) * shape(query + 1)[-2]
        return whole // 2 if len(op.args) > causal and op.args[causal] is True else whole

    return count


def _head(products: int, x: int) -> Callable[[Op, Shapes], int]:
    """`products` products of x [tokens, features] with rows of the head."""
    return lambda op, shape: 2 * products * math.prod(shape(x)) * shape(x + 1)[0]


COUNTS: dict[str, Callable[[Op, Shapes], int]] = {
    "aten.mm.default": _product(0),
    "mebp.mm.default": _product(0),
    "aten.bmm.default": _product(0),
    "aten.addmm.default": _product(1),
    "mebp.addmm.default": _product(1),
    "aten.baddbmm.default": _product(1),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention(2, 0, 4),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": _attention(5, 1, 7),
    "mebp.attention.default": _attention(2, 0, 3),
    "mebp.attention_backward.default": _attention(5, 1, 6),
    "mebp.add_low_rank.default": _product(1),
    "mebp.linear_cross_entropy.default": _head(2, 0),
    "mebp.cross_entropy_rows_.default": _head(2, 0),
    "mebp.head_gradient.default": _head(1, 1),
    "mebp.head_rows_gradient.default": _head(1, 1),
}
