"""Rotary embeddings of halves in one walk, forward and backward.

    x * cos + cat(-x2, x1) * sin                                                      ->  rope(x, cos, sin, False)
    pad(-(g * sin)1, second half) + pad((g * sin)2, first half) + g * cos             ->  rope(g, cos, sin, True)

x1, x2 are the halves of the last dimension. Where the gradient is then copied into the order of a transposed view, it is written in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mebp_compile import torch_private
from mebp_compile.kernels import fused
from mebp_compile.passes.rewrite import DTYPES, drop, is_op, other_argument, put, value

TIER = "reassociate"
SAVES_MEMORY = False
aten, mebp = torch.ops.aten, torch.ops.mebp


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite what can be; a note with how many."""
    found = _places(module)
    if found and fused.library() is None:
        return ["rotary: embeddings are left as they are, because the fused kernels are not built"]
    for result, args in found:
        _rewrite(result, args)
    module.recompile()
    return [f"rotary: {len(found):,} embeddings in one walk each"] if found else []


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is one that can be fused."""
    return bool(_places(module))


Arguments = tuple[Node, Node, Node, bool]


def _places(module: torch.fx.GraphModule) -> list[tuple[Node, Arguments]]:
    """The last sum of each embedding and of each gradient of one, and the arguments of the op that takes its place."""
    sums = module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    found = [(node, _forward(node) or _backward(node)) for node in sums]
    return [(node, args) for node, args in found if args is not None and _fits(node, args) and _strides(node, args[0])]


def _fits(node: Node, args: Arguments) -> bool:
    x, cos, sin, _ = args
    fakes = [value(part) for part in (x, cos, sin)]
    batch, _, tokens, size = fakes[0].shape if fakes[0].dim() == 4 else (0, 0, 0, 0)
    turn = fakes[1].shape
    same = len({fake.dtype for fake in fakes}) == 1 and fakes[0].dtype in DTYPES and fakes[2].shape == turn and fakes[0].numel() > 0
    return same and len(turn) == 4 and turn[0] in (1, batch) and tuple(turn[1:]) == (1, tokens, size) and value(node).shape == fakes[0].shape


def _strides(node: Node, x: Node) -> bool:
    """Whether the op can give its result the strides that are wanted: those of x, or the contiguous ones."""
    return _copy_after(node, x) is not None or value(node).stride() == value(x).stride() or value(node).is_contiguous()


def _products(node: Any) -> list[Node]:
    """The terms of a sum that are products and used nowhere else."""
    if not is_op(node, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
        return []
    return [part for part in node.args if is_op(part, aten.mul.Tensor) and len(part.users) == 1]


def _forward(node: Node) -> Arguments | None:
    """(x, cos, sin, False) where the sum is x * cos + turned(x) * sin."""
    products = _products(node)
    for straight, crossed in (products, products[::-1]) if len(products) == 2 else ():
        for turned, sin in (crossed.args, crossed.args[::-1]):
            x = _turned(turned)
            if x is not None and x in straight.args and isinstance(sin, Node):
                cos = other_argument(straight, x)
                return (x, cos, sin, False) if isinstance(cos, Node) else None
    return None


def _turned(node: Any) -> Node | None:
    """x where the node is cat(-x2, x1)."""
    if not is_op(node, aten.cat.default) or len(node.args[0]) != 2 or len(node.users) != 1:
        return None
    negative, first = node.args[0]
    second = negative.args[0] if is_op(negative, aten.neg.default) else None
    dim = node.args[1] if len(node.args) > 1 else 0
    last = value(node).dim() - 1
    if dim not in (-1, last) or not is_op(first, aten.slice.Tensor) or not is_op(second, aten.slice.Tensor) or first.args[0] is not second.args[0]:
        return None
    x: Node = first.args[0]
    middle, size = value(x).shape[-1] // 2, value(x).shape[-1]
    return x if _span(first, size) == (last, 0, middle) and _span(second, size) == (last, middle, size) and size == 2 * middle else None


def _span(node: Node, size: int) -> tuple[int, int, int] | None:
    """(dimension, start, end) of a slice without gaps, of a dimension of this size."""
    args: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    if args[3] != 1 or not isinstance(args[0], int):
        return None
    start, end, _ = slice(args[1], args[2]).indices(size)
    return args[0] % value(node).dim(), start, end


def _backward(node: Node) -> Arguments | None:
    """(grad, cos, sin, True) where the sum is grad * cos + turned back(grad * sin)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for turned, straight in (node.args, node.args[::-1]):
        crossed = _turned_back(turned)
        if crossed is None or not is_op(straight, aten.mul.Tensor):
            continue
        for grad, sin in (crossed.args, crossed.args[::-1]):
            cos = other_argument(straight, grad) if grad in straight.args else None  # type: ignore[union-attr, arg-type]
            if isinstance(cos, Node) and isinstance(sin, Node) and isinstance(grad, Node) and value(grad).shape == value(node).shape:
                return grad, cos, sin, True
    return None


def _turned_back(node: Any) -> Node | None:
    """The product y where the node is pad(y2, first half) - pad(y1, second half)."""
    if not is_op(node, aten.add.Tensor) or len(node.users) != 1 or not all(is_op(part, aten.slice_backward.default) for part in node.args):
        return None
    for late, early in (node.args, node.args[::-1]):
        negative, second = late.args[0], early.args[0]
        first = negative.args[0] if is_op(negative, aten.neg.default) else None
        if not is_op(first, aten.slice.Tensor) or not is_op(second, aten.slice.Tensor) or first.args[0] is not second.args[0]:
            continue
        y, size = first.args[0], value(node).shape[-1]
        middle, last = size // 2, value(node).dim() - 1
        spans = (_span(first, size), _span(second, size), _padded(early, size), _padded(late, size))
        lower, upper = (last, 0, middle), (last, middle, size)
        if is_op(y, aten.mul.Tensor) and spans == (lower, upper, lower, upper) and value(y).shape == value(node).shape and size == 2 * middle:
            return y  # type: ignore[no-any-return]
    return None


def _padded(node: Node, size: int) -> tuple[int, int, int] | None:
    """(dimension, start, end) of where slice_backward puts its argument."""
    _, _, dim, start, end, step = node.args
    if step != 1:
        return None
    first, last, _ = slice(start, end).indices(size)  # type: ignore[misc, arg-type]
    return dim % value(node).dim(), first, last  # type: ignore[operator, return-value]


def _rewrite(result: Node, args: Arguments) -> None:
    copy = _copy_after(result, args[0])
    if copy is not None:
        _write_turned(result, copy)
    contiguous = value(result).stride() != value(args[0]).stride()
    put(result, mebp.rope.default, (*args, contiguous), result)
    drop([result])


def _copy_after(result: Node, x: Node) -> Node | None:
    """The contiguous copy of the result's transpose(1, 2), if that is all that uses the result, and x lies in memory as the copy does."""
    turned = next(iter(result.users)) if len(result.users) == 1 else None
    copy = next(iter(turned.users)) if turned is not None and is_op(turned, aten.transpose.int) and len(turned.users) == 1 else None
    if turned is None or copy is None or tuple(turned.args[1:]) != (1, 2) or not is_op(copy, aten.clone.default):
        return None
    return copy if value(copy).is_contiguous() and value(copy).transpose(1, 2).stride() == value(x).stride() else None


def _write_turned(result: Node, copy: Node) -> None:
    """The result takes the copy's storage, where its gradient has such strides, and the copy goes."""
    turned: Any = copy.args[0]
    with torch_private.mode_of(value(copy)):
        result.meta["val"] = value(copy).transpose(1, 2)
    turned.meta["val"] = value(copy)
    copy.replace_all_uses_with(turned)
    drop([copy])
