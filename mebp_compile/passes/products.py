"""Products of bf16 matrices in blocks of fp32, where the processor has no instructions for bf16: mm(x, w) -> mebp::mm(x, w), and the
same with a bias.

It comes last: the other passes look for `aten.mm`. Where torch multiplies bf16 itself nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from mebp_compile.kernels import product
from mebp_compile.passes.rewrite import drop, finish, put, value

TIER = "reassociate"
SAVES_MEMORY = False
aten, mebp = torch.ops.aten, torch.ops.mebp
REPLACED = {aten.mm.default: mebp.mm.default, aten.addmm.default: mebp.addmm.default}


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite all of them; a note with how many."""
    found = list(_products(module))
    for node in found:
        put(node, REPLACED[node.target], node.args, node)
        drop([node])
    finish(module)
    return [f"products: {len(found):,} of bf16 matrices in blocks of fp32, because this processor has no instructions for bf16"] if found else []


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a product of bf16 matrices, and the processor does not multiply them."""
    return any(True for _ in _products(module))


def _products(module: torch.fx.GraphModule) -> Iterator[Node]:
    for target in REPLACED:
        for node in module.graph.find_nodes(op="call_function", target=target):
            plain = not node.kwargs and (target is aten.mm.default or value(node.args[0]).dim() == 1)
            if plain and product.widened(value(node)):
                yield node
