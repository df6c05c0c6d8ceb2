"""Tiled loss: head matmul -> [soft-capping] -> log-softmax -> nll loss and their backward become one walk over tiles of the vocabulary.

    logits = mm(x, W^T);  log_softmax;  nll_loss;  ...;  nll_loss_backward;  log_softmax_backward;  dx = mm(dlogits, W);  dW = mm(dlogits^T, x)

becomes  loss, count, direction, softmax = linear_cross_entropy(x, W, target);  ...;  dx = direction * dloss;  dW = head_gradient(...),  for which
neither the logits nor their gradient exist whole (see `kernels.cross_entropy`; `loss_pattern` finds the places). The loss must be the only one
that looks at the logits. Label smoothing and soft-capping are numbers of the op. Where the loss sees a slice of the rows, the targets of the
others are added as ignored ones, so that their gradient is the zero that the slice gives them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from mebp_compile import torch_private
from mebp_compile.kernels.cross_entropy import ROWS
from mebp_compile.passes.loss_pattern import Loss, NotHere, match, places
from mebp_compile.passes.rewrite import finish, new_like

TIER = "reassociate"
SAVES_MEMORY = True
aten, mebp = torch.ops.aten, torch.ops.mebp


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite every loss that can be; a note on each."""
    notes = []
    for node in places(module.graph):
        line = torch_private.node_line(node)
        try:
            loss = match(node)
        except NotHere as reason:
            notes.append(f"tiled loss: not for the loss at {line}, because {reason}")
            continue
        _rewrite(module.graph, loss)
        notes.append(f"tiled loss: {loss.weight.meta['val'].shape[0]:,} logits a token at {line} are never whole{_form(loss)}")
    finish(module)
    return notes


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a loss that can be tiled."""
    for node in places(module.graph):
        try:
            match(node)
        except NotHere:
            continue
        return True
    return False


def _form(loss: Loss) -> str:
    capped = f", soft-capped at {loss.cap:g}" if loss.cap else ""
    return capped + (f", labels smoothed by {loss.smoothing:g}" if loss.smoothing else "")


def _rewrite(graph: torch.fx.Graph, loss: Loss) -> None:
    x, reduction, ignored = loss.head.args[0], *loss.nll.args[3:5]
    with graph.inserting_before(loss.nll):
        target = _target(graph, loss)
        form = (reduction, ignored, loss.smoothing, loss.cap, ROWS)
        made = new_like(graph, mebp.linear_cross_entropy.default, (x, loss.weight, target, *form), loss.head)
        value, count, direction, softmax = (new_like(graph, operator.getitem, (made, index), loss.head) for index in range(4))
    if loss.value is not None:
        loss.value.replace_all_uses_with(value)
    for user in [user for user in loss.nll.users if user.target is operator.getitem and user.args[1] == 1]:
        user.replace_all_uses_with(count)
    for node in loss.to_input:
        with graph.inserting_before(node):
            grown = new_like(graph, aten.mul.Tensor, (direction, loss.gradient), node)
            cast = new_like(graph, aten._to_copy.default, (grown,), node, dtype=node.meta["val"].dtype)
        node.replace_all_uses_with(cast)
    for node in loss.to_weight:
        with graph.inserting_before(node):
            args = (loss.gradient, x, loss.weight, target, softmax, count, *form)
            made = new_like(graph, mebp.head_gradient.default, args, node)
        node.replace_all_uses_with(made)
    _erase(graph, {*loss.gone, *loss.nll.users})


def _target(graph: torch.fx.Graph, loss: Loss) -> Any:
    """The target of every row of the head: those of the loss, and `ignore_index` for the rows that it does not see."""
    target, ignored = loss.nll.args[1], loss.nll.args[4]
    if loss.cut is None:
        return target
    logits: Any = loss.cut.args[0]
    whole, seen = logits.meta["val"].shape[:-1], loss.cut.meta["val"].shape[:-1]
    dim = next(index for index, (most, some) in enumerate(zip(whole, seen, strict=True)) if most != some)
    start: Any = loss.cut.args[2] if len(loss.cut.args) > 2 else None
    before = slice(start, None).indices(whole[dim])[0]
    padding = [0] * (2 * (len(whole) - 1 - dim)) + [before, whole[dim] - seen[dim] - before]
    shaped = new_like(graph, aten.view.default, (target, list(seen)), loss.head)
    padded = new_like(graph, aten.constant_pad_nd.default, (shaped, padding, ignored), loss.head)
    return new_like(graph, aten.view.default, (padded, [-1]), loss.head)


def _erase(graph: torch.fx.Graph, gone: set[Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in gone and not node.users:
            graph.erase_node(node)
