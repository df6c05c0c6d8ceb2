"""Attention without a mask or dropout by this package's own kernel, in the place of torch's for the CPU.

    _scaled_dot_product_flash_attention_for_cpu(q, k, v, 0, causal)            ->  attention(q, k, v, causal, scale)
    _scaled_dot_product_flash_attention_for_cpu_backward(d, q, k, v, out, ...)  ->  attention_backward(d, q, k, v, out, sums, causal, scale)

Arguments, results and what is saved between the two are the same. Its tiles need 32 registers of 512 bits to be faster than torch's: elsewhere
torch's stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mebp_compile.kernels import attention
from mebp_compile.passes.rewrite import NotHere, any_matches, drop, put, rewrite_each, value

TIER = "reassociate"
SAVES_MEMORY = False
aten, mebp = torch.ops.aten, torch.ops.mebp
FORWARD, BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def run(module: torch.fx.GraphModule) -> list[str]:
    """Put the kernel where it fits; a note with how many, and one for each place that is left, with the reason."""
    return rewrite_each(module, "attention", _places(module), _rewrite, kernels=attention)


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a place that it fits."""
    return any_matches(_places(module), _match)


def _places(module: torch.fx.GraphModule) -> list[Node]:
    return [node for target in (FORWARD, BACKWARD) for node in module.graph.find_nodes(op="call_function", target=target)]


def _match(node: Node) -> tuple[Any, tuple[Any, ...]]:
    """The op for a place and its arguments. Raises NotHere."""
    if not attention.is_fast():
        raise NotHere("this processor has no vectors of 512 bits")
    tensors = node.args[: 3 if node.target is FORWARD else 6]
    dropout, causal = (*node.args[len(tensors) :], 0.0, False)[:2]
    mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    if mask is not None or dropout:
        raise NotHere("it has a mask" if mask is not None else "it has dropout")
    heads = [value(x) for x in tensors if isinstance(x, Node)][:5]  # all but the sums
    if not attention.takes(*heads):
        raise NotHere("its tensors are not of one dtype, bf16 or fp32, with heads of a multiple of 16 numbers side by side, 256 at most")
    size = heads[0].shape[-1]
    op = mebp.attention.default if node.target is FORWARD else mebp.attention_backward.default
    return op, (*tensors, causal, size**-0.5 if scale is None else scale)


def _rewrite(node: Node) -> None:
    op, args = _match(node)
    put(node, op, args, node)
    drop([node])
