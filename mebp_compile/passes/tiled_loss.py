"""Tiled loss: head matmul -> log-softmax -> nll loss and their backward become one walk over tiles of the vocabulary.

    logits = mm(x, W^T);  log_softmax;  nll_loss;  ...;  nll_loss_backward;  log_softmax_backward;  dx = mm(dlogits, W);  dW = mm(dlogits^T, x)

becomes  loss, count, direction, softmax = linear_cross_entropy(x, W, target);  ...;  dx = direction * dloss;  dW = head_gradient(...),  for which
neither the logits nor their gradient exist whole (see `kernels.cross_entropy`). Views and casts in between are followed. The loss must be the
only one that looks at the logits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from mebp_compile import torch_private
from mebp_compile.kernels.cross_entropy import ROWS

TIER = "reassociate"
aten, mebp = torch.ops.aten, torch.ops.mebp
SAME_ROWS = (aten.view.default, aten._unsafe_view.default, aten._to_copy.default, aten.detach.default, aten.alias.default)
INSIDE = (
    *SAME_ROWS,
    aten._log_softmax.default,
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
    aten._log_softmax_backward_data.default,
)


@dataclass
class _Loss:
    """One place to rewrite: the nodes between the head and the loss, and what enters and leaves them."""

    nll: Node
    head: Node  # mm(x, W^T)
    weight: Node
    inside: list[Node] = field(default_factory=list)
    backward: Node | None = None  # nll_loss_backward
    to_input: list[Node] = field(default_factory=list)  # mm(dlogits, W)
    to_weight: list[Node] = field(default_factory=list)  # mm(dlogits^T, x)


class _NotHere(Exception):
    """Why a loss can't be tiled."""


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite every loss that can be; a note on each."""
    notes = []
    for node in list(module.graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default)):
        line = torch_private.node_line(node)
        try:
            loss = _match(node)
        except _NotHere as reason:
            notes.append(f"tiled loss: not for the loss at {line}, because {reason}")
            continue
        _rewrite(module.graph, loss)
        notes.append(f"tiled loss: {loss.weight.meta['val'].shape[0]:,} logits a token at {line} are never whole")
    module.recompile()
    return notes


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a loss that can be tiled."""
    for node in module.graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default):
        try:
            _match(node)
        except _NotHere:
            continue
        return True
    return False


def _match(nll: Node) -> _Loss:
    softmax, _, class_weights = nll.args[:3]
    if class_weights is not None:
        raise _NotHere("it weighs the classes")
    if nll.args[3] not in (1, 2):
        raise _NotHere("it is not reduced to a mean or a sum")
    if not _is(softmax, aten._log_softmax.default):
        raise _NotHere("it does not come from log_softmax")
    head = _source(softmax.args[0], SAME_ROWS)
    if not _is(head, aten.mm.default):
        raise _NotHere(f"the logits are made by {getattr(head, 'target', head)}, not by one matmul")
    if head.meta["val"].shape != softmax.meta["val"].shape or softmax.args[1] not in (1, -1):
        raise _NotHere("not every row of the logits is a token of the loss")
    if softmax.meta["val"].dtype != torch.float32:
        raise _NotHere(f"the softmax is in {softmax.meta['val'].dtype}")
    if not _is(head.args[1], aten.t.default):
        raise _NotHere("the head's weight is not stored as [vocabulary, features]")
    loss = _Loss(nll, head, head.args[1].args[0])
    for node in _reached(head):
        _sort(loss, node)
    return loss


def _reached(head: Node) -> Iterator[Node]:
    """The nodes inside, in order, and their users outside."""
    todo, seen = [head], {head}
    while todo:
        node = todo.pop()
        yield node
        if node is head or node.target in INSIDE or _is(node, aten.t.default):
            fresh = [user for user in node.users if user not in seen]
            seen.update(fresh)
            todo += fresh


def _sort(loss: _Loss, node: Node) -> None:
    """File one node that the logits reach."""
    if node is loss.head or node.target in INSIDE or _is(node, aten.t.default):
        if node.target is aten.nll_loss_backward.default:
            if loss.backward is not None:
                raise _NotHere("it is differentiated twice")
            loss.backward = node
        loss.inside.append(node)
    elif node.target is operator.getitem and node.args[0] is loss.nll:
        pass
    elif _is(node, aten.mm.default) and _source(node.args[1], (aten.t.default, *SAME_ROWS)) is _source(loss.weight, SAME_ROWS):
        loss.to_input.append(node)
    elif _is(node, aten.mm.default) and node.args[1] is loss.head.args[0] and _is(node.args[0], aten.t.default):
        loss.to_weight.append(node)
    else:
        what = "the step returns them" if node.op == "output" else f"{node.target} at {torch_private.node_line(node)} uses them"
        raise _NotHere(f"the logits have another use: {what}")


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _source(node: Any, through: tuple[Any, ...]) -> Any:
    """Where a node comes from, seen through ops of these kinds."""
    while isinstance(node, Node) and node.target in through:
        node = node.args[0]
    return node


# --- rewriting ---


def _rewrite(graph: torch.fx.Graph, loss: _Loss) -> None:
    x, target, reduction, ignored = loss.head.args[0], loss.nll.args[1], *loss.nll.args[3:5]
    with graph.inserting_before(loss.nll):
        made = _new(graph, mebp.linear_cross_entropy.default, (x, loss.weight, target, reduction, ignored, ROWS), loss.head)
        value, count, direction, softmax = (_new(graph, operator.getitem, (made, index), loss.head) for index in range(4))
    for user in [user for user in loss.nll.users if user.target is operator.getitem]:
        user.replace_all_uses_with(value if user.args[1] == 0 else count)
    if loss.backward is not None:
        scale = loss.backward.args[0]
        for node in loss.to_input:
            with graph.inserting_before(node):
                grown = _new(graph, aten.mul.Tensor, (direction, scale), node)
                cast = _new(graph, aten._to_copy.default, (grown,), node, dtype=node.meta["val"].dtype)
            node.replace_all_uses_with(cast)
        for node in loss.to_weight:
            with graph.inserting_before(node):
                args = (scale, x, loss.weight, target, softmax, count, reduction, ignored, ROWS)
                made = _new(graph, mebp.head_gradient.default, args, node)
            node.replace_all_uses_with(made)
            _refresh_views(made)
    _erase(graph, {*loss.inside, *loss.to_input, *loss.to_weight, *(user for user in loss.nll.users)})


def _new(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
    """A node of the same module, line and phase as `like`, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: item for key, item in like.meta.items() if key not in ("val", "tensor_meta")}
    fakes = torch.fx.map_arg(args, lambda arg: arg.meta["val"])
    with torch_private.mode_of(like.meta["val"]):
        node.meta["val"] = target(*fakes, **kwargs)
    return node


def _refresh_views(node: Node) -> None:
    """Views of what a node made before are views of what it makes now."""
    for user in node.users:
        if user.target in (aten.t.default, aten.view.default, aten.detach.default, aten.alias.default):
            with torch_private.mode_of(node.meta["val"]):
                user.meta["val"] = user.target(*torch.fx.map_arg(user.args, lambda arg: arg.meta["val"]))
            _refresh_views(user)


def _erase(graph: torch.fx.Graph, gone: set[Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in gone and not node.users:
            graph.erase_node(node)
