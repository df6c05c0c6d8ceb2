"""Find hyper-parameters that a trace lost: numbers that Python turned into something that `hyper` can't follow (through numpy, or C code).

The step is traced with two sets of stand-ins. Where a number was followed, both graphs name the same expression; where it was lost, the two
graphs hold two different numbers, and the line that holds them is named. The optimizers of torch.optim are known to lose none
(`tests/capture/test_hyper.py` holds them to that), so the second trace is made only for others, and where the step's own code reads param
groups.
"""

from __future__ import annotations

from typing import Any

import torch

from mebp_compile import torch_private
from mebp_compile.capture.find import State
from mebp_compile.capture.hyper import stand_in
from mebp_compile.capture.trace import Traced

KNOWN = tuple(
    getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "NAdam", "Adamax", "RMSprop", "Adadelta", "Adagrad")
)


def may_lose(state: State) -> bool:
    """Whether code outside this package's knowledge reads the param groups."""
    optimizers = state.optimizers.values()
    held = any(id(part) in state.reach.seen for optimizer in optimizers for part in (optimizer.param_groups, *optimizer.param_groups))
    hooked = any(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks for optimizer in optimizers)
    strange = any(type(optimizer) not in KNOWN for optimizer in optimizers)
    return bool(state.optimizers) and (held or hooked or strange or "param_groups" in state.reach.names)


def lost_number(first: Traced, second: Traced) -> str | None:
    """The line of the first difference between two traces of the step with different stand-ins, or None where they agree."""
    left, right = list(first.module.graph.nodes), list(second.module.graph.nodes)
    for one, other in zip(left, right, strict=False):
        if _plain(first, one) != _plain(second, other):
            return torch_private.node_line(one)
    return "the end of the step" if len(left) != len(right) else None


def _plain(traced: Traced, node: torch.fx.Node) -> Any:
    """A node as data in which hyper-parameters are expressions, whatever stood for them."""
    if node.op == "get_attr":
        constant = torch_private.constant_of(node)
        content = (
            None
            if constant.is_meta or torch_private.is_fake(constant)
            else constant.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        )
        return traced.hyper.expression_of(constant) or (str(constant.dtype), content)
    return str(node.target), _argument(traced, node.args), _argument(traced, dict(node.kwargs))


def _argument(traced: Traced, item: Any) -> Any:
    if isinstance(item, torch.fx.Node):
        return item.name
    if isinstance(item, (list, tuple)):
        return [_argument(traced, part) for part in item]
    if isinstance(item, dict):
        return {key: _argument(traced, part) for key, part in item.items()}
    if isinstance(item, float):
        bare = stand_in(item)
        return traced.hyper.expressions.get(bare, bare.hex())
    return str(item)
