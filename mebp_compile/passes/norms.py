"""RMSNorm in one walk, forward and backward, where its weight is frozen.

    x * rsqrt(mean(x^2) + eps) * weight   ->  rms_norm(x, weight, eps)                      casts included; weight: w, or 1 + w as Gemma has it
    its gradient, a dozen ops             ->  rms_norm_backward(grad, x, weight, r, other)  other: what the sum after it adds

The norm is found by its reciprocal root. Of the backward only x and one number a row are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mebp_compile.passes.rewrite import (
    DTYPES,
    NotHere,
    alike,
    any_matches,
    drop,
    is_number,
    is_op,
    other_argument,
    peeled,
    put,
    put_several,
    rewrite_each,
    uses,
    value,
)

TIER = "reassociate"
SAVES_MEMORY = False
aten, mebp = torch.ops.aten, torch.ops.mebp
CAST = aten._to_copy.default


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite what can be; a note with how many, and one for each place that is left, with the reason."""
    return rewrite_each(module, "norms", _roots(module), lambda node: _rewrite(_match(node)))


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is one that can be fused."""
    return any_matches(_roots(module), _match)


@dataclass(frozen=True)
class Norm:
    """root: r. result: what the forward gives. Of the backward (None without one): grad, of the result, and to_x, which makes the gradient of x."""

    root: Node
    x: Node
    weight: Node
    eps: Any
    result: Node
    grad: Node | None
    to_x: Node | None


def _roots(module: torch.fx.GraphModule) -> list[Node]:
    """Every 1 / sqrt(mean(x^2) + eps) over the last dimension."""
    return [node for node in module.graph.find_nodes(op="call_function", target=aten.rsqrt.default) if _squared(node) is not None]


def _squared(root: Node) -> Node | None:
    """x, in fp32, of such a root."""
    shifted: Any = root.args[0]
    mean: Any = shifted.args[0] if is_op(shifted, aten.add.Tensor) and is_number(shifted.args[1]) else None
    if not is_op(mean, aten.mean.dim) or mean.args[1:] != ([-1], True):
        return None
    square = mean.args[0]
    return peeled(square.args[0]) if is_op(square, aten.pow.Tensor_Scalar) and square.args[1] == 2 else None


def _match(root: Node) -> Norm:
    """The norm around a root. Raises NotHere."""
    wide: Any = _squared(root)
    x = peeled(wide.args[0]) if is_op(wide, CAST) and value(wide).dtype == torch.float32 else wide
    normed = _products(wide, root)[:1]
    if not normed:
        raise NotHere("x is not multiplied by the root")
    narrow = _only_cast(normed[0])
    result, weight = _weighted(narrow)
    final = _only_cast(result)
    if not alike(x, final) or value(weight).shape != value(x).shape[-1:] or value(weight).dtype not in DTYPES:
        raise NotHere("x and the result are not contiguous tensors of one dtype, bf16 or fp32, or the weight is no vector")
    grad, to_x = _backward(root, wide, normed[0], result, weight)
    return Norm(root, x, weight, root.args[0].args[1], final, grad, to_x)  # type: ignore[union-attr]


def _only_cast(node: Node) -> Node:
    """The cast that is a node's only use, or the node."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and is_op(user, CAST) else node


def _products(one: Node, other: Node) -> list[Node]:
    """Where the two are multiplied, in the graph's order."""
    return sorted(user for user in uses(one) if user in uses(other) and is_op(user, aten.mul.Tensor))


def _weighted(normed: Node) -> tuple[Node, Node]:
    """The product with the weight, and the weight: the only use of what was normed."""
    users = uses(normed)
    if len(users) == 2:
        raise NotHere("its weight is trained")
    if len(users) != 1 or not is_op(users[0], aten.mul.Tensor) or not isinstance(other_argument(users[0], normed), Node):
        raise NotHere("it has no weight, or another use")
    return users[0], other_argument(users[0], normed)


# --- the backward: r g + (-1/2 sum(g x) r^3 / n) 2 x, g = grad * weight ---


def _backward(root: Node, wide: Node, normed: Node, result: Node, weight: Node) -> tuple[Node | None, Node | None]:
    """(grad, what makes the gradient of x), or two None where there is no backward. Raises NotHere for another use of x in fp32, or of r."""
    scaled = [user for user in uses(root) if is_op(user, aten.mul.Tensor) and user is not normed]
    cube = [user for user in uses(root) if is_op(user, aten.pow.Tensor_Scalar)]
    if not scaled and not cube and len(uses(root)) == 1:
        return None, None
    if len(scaled) != 1 or len(cube) != 1 or cube[0].args[1] != 3:
        raise NotHere("its root has another use")
    pulled = other_argument(scaled[0], root)
    total = next(iter(scaled[0].users))
    product = _products(wide, pulled)
    if len(product) != 1 or not is_op(total, aten.add.Tensor) or not _is_mean_part(other_argument(total, scaled[0]), wide, product[0], cube[0]):
        raise NotHere("its backward is not the one of RMSNorm")
    if wide.target is CAST and len(uses(wide)) != 4:
        raise NotHere("x in fp32 has another use")
    grad = _gradient_of(pulled, weight)
    to_x = _only_cast(total) if wide.target is CAST else total
    if not alike(grad, to_x):
        raise NotHere("the gradients are not contiguous tensors of one dtype")
    return grad, to_x


def _is_mean_part(node: Any, wide: Node, product: Node, cube: Node) -> bool:
    """Whether this is (-1/2 sum(product) r^3 / n) * (2 x^1), as torch writes the derivative of a mean of squares."""
    if not is_op(node, aten.mul.Tensor):
        return False
    mean, twice = node.args
    power = twice.args[0] if is_op(twice, aten.mul.Scalar) and twice.args[1] == 2.0 else None
    if not is_op(power, aten.pow.Tensor_Scalar) or (peeled(power.args[0]), power.args[1]) != (wide, 1.0):
        return False
    if not is_op(mean, aten.div.Scalar) or mean.args[1] != value(wide).shape[-1] or not is_op(mean.args[0], aten.expand.default):
        return False
    cubed = mean.args[0].args[0]
    half = other_argument(cubed, cube) if is_op(cubed, aten.mul.Tensor) and cube in map(peeled, cubed.args) else None
    total = half.args[0] if is_op(half, aten.mul.Scalar) and half.args[1] == -0.5 else None
    return is_op(total, aten.sum.dim_IntList) and total.args[0] is product and total.args[1] == [value(wide).dim() - 1]


def _gradient_of(pulled: Any, weight: Node) -> Node:
    """The gradient of the result: what was multiplied by the weight, before casts on either side."""
    inner = pulled.args[0] if is_op(pulled, CAST) and is_op(pulled.args[0], aten.mul.Tensor) else pulled
    if not is_op(inner, aten.mul.Tensor) or weight not in map(peeled, inner.args):
        raise NotHere("the gradient does not come through the weight")
    grad = other_argument(inner, weight)
    if is_op(grad, CAST) and value(grad.args[0]).dtype == torch.bfloat16 and inner is pulled:
        grad = grad.args[0]
    if not isinstance(grad, Node):
        raise NotHere("the gradient does not come through the weight")
    return grad


def _rewrite(norm: Norm) -> None:
    made = put_several(norm.result, mebp.rms_norm.default, (norm.x, norm.weight, norm.eps), (norm.result, norm.root))
    scale = next(user for user in made.users if user.args[1] == 1)
    drop([norm.result, norm.root])
    if norm.grad is None or norm.to_x is None:
        return
    place, other = norm.to_x, None
    after = next(iter(norm.to_x.users)) if len(norm.to_x.users) == 1 else None
    if is_op(after, aten.add.Tensor) and not after.kwargs and alike(norm.to_x, after, other_argument(after, norm.to_x)):  # type: ignore[union-attr, arg-type]
        place, other = after, other_argument(after, norm.to_x)  # type: ignore[assignment, arg-type]
    put(place, mebp.rms_norm_backward.default, (norm.grad, norm.x, norm.weight, scale, other), place)
    drop([place])
