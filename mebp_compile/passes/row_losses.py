"""Row losses: a cross-entropy loss first takes from each row the one number that it needs, so that everything wide in it goes row by row.

    loss, count = nll_loss_forward(log_probs, target)

becomes  picked = gather(log_probs, target);  loss = nll_loss_forward(picked, 0 or ignored);  count: the same of the targets alone

The sum over the rows then reads one number a row, in the order in which it read them before, and the backward waits for no more than the targets:
its gradient starts from ones, which look at no loss. Bits are eager's: no arithmetic changes (tier "exact"). It is what lets logits,
log-softmax and their gradients run in blocks of tokens (see `lower.chunks`), each made once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from mebp_compile.passes.rewrite import finish, is_op, new_like, value

TIER = "exact"
SAVES_MEMORY = True
IGNORED = -100  # a target that is no class, whatever the loss ignores
aten = torch.ops.aten


def run(module: torch.fx.GraphModule) -> list[str]:
    """Rewrite every loss that can be; a note with how many."""
    nodes = [node for node in module.graph.nodes if _fits(node)]
    if not nodes:
        return []
    for node in nodes:
        _rewrite(module.graph, node)
    for ones in [node for node in module.graph.nodes if is_op(node, aten.ones_like.default)]:
        _forget_what_it_is_like(module.graph, ones)
    finish(module)
    return [f"row losses: {len(nodes)} of one number a token"]


def applies(module: torch.fx.GraphModule) -> bool:
    """Whether there is a loss of this form."""
    return any(_fits(node) for node in module.graph.nodes)


def _fits(node: Node) -> bool:
    """A mean or sum of [rows, several classes] without class weights."""
    if not is_op(node, aten.nll_loss_forward.default):
        return False
    log_probs, _, weight, reduction = node.args[:4]
    assert isinstance(log_probs, Node)
    return weight is None and reduction != 0 and value(log_probs).dim() == 2 and value(log_probs).shape[1] > 1


def _rewrite(graph: torch.fx.Graph, node: Node) -> None:
    log_probs, target, _, reduction, ignored = node.args
    like = value(log_probs)  # type: ignore[arg-type]

    def new(function: Any, *args: Any, **kwargs: Any) -> Node:
        return new_like(graph, function, args, node, **kwargs)

    with graph.inserting_before(node):
        seen = new(aten.ne.Scalar, target, ignored)
        rows = new(aten.where.ScalarOther, seen, target, IGNORED)  # a tensor of its own, where the target is a slice of a longer one
        index = new(aten.unsqueeze.default, new(aten.where.ScalarOther, seen, target, 0), 1)
        first = new(aten.where.Scalar, seen, 0, IGNORED)
        picked = new(aten.gather.default, log_probs, 1, index)
        made = new(aten.nll_loss_forward.default, picked, first, None, reduction, IGNORED)
        blank = new(aten.full.default, [like.shape[0], 1], 0.0, dtype=like.dtype, device=like.device)
        counted = new(aten.nll_loss_forward.default, blank, first, None, reduction, IGNORED)
        loss, count = new(operator.getitem, made, 0), new(operator.getitem, counted, 1)
    for user in list(node.users):
        user.replace_all_uses_with(loss if user.args[1] == 0 else count)
        graph.erase_node(user)
    graph.erase_node(node)
    for backward in [user for user in log_probs.users if is_op(user, aten.nll_loss_backward.default)]:  # type: ignore[union-attr]
        if backward.args[2:] == (target, None, reduction, ignored, count):
            backward.args = (*backward.args[:2], rows, None, reduction, IGNORED, count)


def _forget_what_it_is_like(graph: torch.fx.Graph, node: Node) -> None:
    """`ones_like(x)` without its x, of which it needs the form alone."""
    fake = value(node)
    if fake.is_contiguous():
        with graph.inserting_before(node):
            made = new_like(graph, aten.full.default, (list(fake.shape), 1), node, dtype=fake.dtype, device=fake.device)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
