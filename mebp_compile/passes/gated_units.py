"""Gated units: act(gate) * up of SwiGLU (silu) and GeGLU (gelu in its tanh form) in one walk, and both gradients in one.

    mul(act(gate), up)                                                              ->  gated(gate, up)
    mul(d, act(gate));  act_backward(mul(d, up), gate)                              ->  gated_backward(d, gate, up)

The activation is no longer saved for the backward, which needs gate and up alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mebp_compile.passes.rewrite import NotHere, alike, any_matches, drop, is_op, other_argument, put, put_several, rewrite_each

TIER = "reassociate"
SAVES_MEMORY = False
aten, mebp = torch.ops.aten, torch.ops.mebp
BACKWARD = {aten.silu.default: aten.silu_backward.default, aten.gelu.default: aten.gelu_backward.default}


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite what can be; a note with how many, and one for each place that is left, with the reason."""
    return rewrite_each(module, "gated units", _activations(module), lambda node: _rewrite(_match(node)))


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is one that can be fused."""
    return any_matches(_activations(module), _match)


@dataclass(frozen=True)
class Unit:
    """forward: act(gate) * up. Of the backward (None without one): grad, and the nodes that make the gradients of gate and up."""

    act: Node
    up: Node
    forward: Node
    grad: Node | None
    to_gate: Node | None
    to_up: Node | None


def _activations(module: torch.fx.GraphModule) -> list[Node]:
    """The activations that are multiplied with something."""
    found = [node for target in BACKWARD for node in module.graph.find_nodes(op="call_function", target=target)]
    return [node for node in found if any(_is_product(user) for user in node.users)]


def _is_product(node: Any) -> bool:
    return is_op(node, aten.mul.Tensor) and all(isinstance(arg, Node) for arg in node.args)


def _kind(act: Node) -> str:
    if act.target is aten.silu.default:
        return "silu"
    if act.kwargs.get("approximate") != "tanh":
        raise NotHere("only the tanh form of gelu has a kernel")
    return "gelu_tanh"


def _match(act: Node) -> Unit:
    """The unit around an activation. Raises NotHere."""
    _kind(act)
    gate, users = act.args[0], list(act.users)
    products = sorted(user for user in users if _is_product(user))
    if len(products) != len(users) or len(users) > 2:
        other = next((str(user.target) for user in users if user not in products), "more than one product")
        raise NotHere(f"the activation has another use: {other}")
    forward, up = products[0], other_argument(products[0], act)
    if not alike(gate, up, act):
        raise NotHere("gate and what it gates are not contiguous tensors of one shape, bf16 or fp32")
    if len(products) == 1:
        return Unit(act, up, forward, None, None, None)
    to_up = products[1]
    grad = other_argument(to_up, act)
    inner = next((user for user in grad.users if _is_product(user) and other_argument(user, grad) is up and len(user.users) == 1), None)
    to_gate = next(iter(inner.users)) if inner is not None else None
    if to_gate is None or to_gate.target is not BACKWARD[act.target] or to_gate.args[:2] != (inner, gate) or not alike(gate, grad):
        raise NotHere("its backward is not the one of a gated unit")
    return Unit(act, up, forward, grad, to_gate, to_up)


def _rewrite(unit: Unit) -> None:
    gate, kind = unit.act.args[0], _kind(unit.act)
    put(unit.forward, mebp.gated.default, (gate, unit.up, kind), unit.forward)
    if unit.to_gate is not None and unit.to_up is not None:
        inner: Any = unit.to_gate.args[0]
        first = min(inner, unit.to_up)
        put_several(first, mebp.gated_backward.default, (unit.grad, gate, unit.up, kind), (unit.to_gate, unit.to_up))
        drop([unit.to_gate, unit.to_up])
    drop([unit.forward])
