"""Low-rank sums: base + s (a b), as LoRA adds to each linear layer, in one walk over base; and its scale s out of the wide gradients.

    add(base, mul(mm(a, b), s))                  ->  add_low_rank(base, a, b, s)            a b never exists whole
    add(add_low_rank(base, a, b, s), other)      ->  add_low_rank(base, a, b, s, other)     a residual, or another gradient; rounded before
    mm(mul(d, s), b), mm(mul(d, s)^T, a)         ->  mul(mm(d, b), s), mul(mm(d^T, a), s)   where these are smaller than d

Found by their shape (the inner dimension of a product is small), not by names; views may stand between. With adapters in fp32 beside a model in
bf16, the sum is fp32 and its cast to bf16 is part of the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mebp_compile.kernels import fused
from mebp_compile.passes.rewrite import DTYPES, VIEWS, drop, finish, fresh, is_number, is_op, only_source, put, value

TIER = "reassociate"
SAVES_MEMORY = False
WIDER = 4  # times the rank that a product has to be, to be low-rank
aten, mebp = torch.ops.aten, torch.ops.mebp


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite what can be; notes with how many."""
    if fused.library() is None:
        return ["low-rank sums: left as they are, because the fused kernels are not built"] if applies(module) else []
    graph = module.graph
    scales = sum(_move_scale(node) for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)))
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        _fuse(node)
    finish(module)
    sums = len(graph.find_nodes(op="call_function", target=mebp.add_low_rank.default))
    notes = [f"low-rank sums: {sums:,} in one walk each"] if sums else []
    return notes + ([f"low-rank sums: {scales:,} scales left the wide gradients"] if scales else [])


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a sum that can be fused."""
    return any(_match(node) is not None for node in module.graph.find_nodes(op="call_function", target=aten.add.Tensor))


@dataclass(frozen=True)
class Sum:
    """base + alpha a b (+ other), which is to take the place of `result`."""

    base: Node
    a: Node
    b: Node
    alpha: Any
    other: Node | None
    result: Node


def _fuse(node: Node) -> None:
    found = _match(node) or _with_residual(node)
    if found is not None:
        put(found.result, mebp.add_low_rank.default, (found.base, found.a, found.b, found.alpha, found.other), found.result)
        drop([found.result])


def _match(node: Node) -> Sum | None:
    """The sum of something and a low-rank product at an add."""
    if not _plain_sum(node):
        return None
    result = _cast_after(node)
    for product, base in ((node.args[1], node.args[0]), (node.args[0], node.args[1])):
        factors = _product(product)
        if factors is not None and is_contiguous_like(base, result):
            return Sum(base, *factors, None, result)  # type: ignore[arg-type]
    return None


def _plain_sum(node: Node) -> bool:
    tensors = len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs
    return tensors and all(value(arg).shape == value(node).shape for arg in node.args)  # type: ignore[arg-type]


def _cast_after(node: Node) -> Node:
    """The cast of an fp32 sum to bf16, where nothing else sees the sum; the sum itself otherwise."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    narrows = user is not None and is_op(user, aten._to_copy.default) and value(user).dtype == torch.bfloat16
    mixed = any(value(arg).dtype != value(node).dtype for arg in node.all_input_nodes)
    return user if user is not None and narrows and mixed else node


def is_contiguous_like(node: Any, result: Node) -> bool:
    """Whether the kernel can add up this and the result: contiguous, of one dtype, bf16 or fp32."""
    both = (value(node), value(result)) if isinstance(node, Node) else ()
    return bool(both) and both[0].dtype == both[1].dtype and both[0].dtype in DTYPES and all(fake.is_contiguous() for fake in both)


def _product(node: Any) -> tuple[Node, Node, Any] | None:
    """(a, b, alpha) of alpha a b, used nowhere else, of low rank."""
    node, alpha = only_source(node), 1.0
    if is_op(node, aten.mul.Tensor) and is_number(node.args[1]):
        node, alpha = only_source(node.args[0]), node.args[1]
    if not is_op(node, aten.mm.default):
        return None
    a, b = node.args
    rank, columns = value(b).shape
    low = 0 < rank <= fused.MOST_RANK and rank * WIDER <= columns
    return (a, b, alpha) if low and value(a).dtype in DTYPES and value(a).numel() > 0 else None


def _with_residual(node: Node) -> Sum | None:
    """A fused sum to which one more tensor is added."""
    if not _plain_sum(node):
        return None
    for inner, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        fits = is_op(inner, mebp.add_low_rank.default) and len(inner.users) == 1 and inner.args[4] is None  # type: ignore[union-attr]
        if fits and is_contiguous_like(inner, node) and is_contiguous_like(other, node):
            return Sum(*inner.args[:4], other, node)  # type: ignore[union-attr, arg-type]
    return None


# --- the scale ---


def _move_scale(node: Node) -> bool:
    """mul(d, s), if only products smaller than d use it: these are scaled instead."""
    wide, scale = node.args
    if not isinstance(wide, Node) or not is_number(scale) or not _same_geometry(wide, node):
        return False
    products = _products_of(node, value(node).numel())
    if not products:
        return False
    node.replace_all_uses_with(wide)
    for product in products:
        with product.graph.inserting_after(product):
            scaled = product.graph.call_function(aten.mul.Tensor)
        scaled.meta = dict(product.meta)
        product.replace_all_uses_with(scaled)
        scaled.args = (product, scale)
        fresh(product)
    drop([node])
    return True


def _same_geometry(a: Node, b: Node) -> bool:
    first, second = value(a), value(b)
    return first.dtype == second.dtype and first.shape == second.shape and first.stride() == second.stride()


def _products_of(node: Node, most: int) -> list[Node]:
    """The matmuls that use a tensor through views, each with a result smaller than `most` numbers; none if there is another use."""
    found: list[Node] = []
    for user in node.users:
        if user.target in VIEWS:
            further = _products_of(user, most)
        else:
            further = [user] if is_op(user, aten.mm.default) and value(user).numel() < most and user.args[0] is not user.args[1] else []
        if not further:
            return []
        found += further
    return list(dict.fromkeys(found))
