"""What passes over elementwise ops share: looking through views, putting one op in the place of others, and dropping what nothing uses.

A node that is replaced hands its fake value on to the op that takes its place, so that views of it stay views of the same storage.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from mebp_compile import torch_private
from mebp_compile.kernels import fused

aten = torch.ops.aten
SAME = (aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.alias.default)  # the same numbers in the same order
VIEWS = (*SAME, aten.t.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default)
DTYPES = (torch.bfloat16, torch.float32)


class NotHere(Exception):
    """Why a place can't be rewritten."""


def rewrite_each(module: torch.fx.GraphModule, what: str, nodes: Iterable[Node], rewrite: Callable[[Node], None], kernels: Any = fused) -> list[str]:
    """Rewrite around each of the nodes with what is in `kernels`; a note with how many were, and one for each place that is left, with the
    reason."""
    notes, done = [], 0
    for node in nodes:
        try:
            if kernels.library() is None:
                raise NotHere("the kernels for it are not built")
            rewrite(node)
            done += 1
        except NotHere as reason:
            notes.append(f"{what}: not for the one at {torch_private.node_line(node)}, because {reason}")
    finish(module)
    return [*([f"{what}: {done:,} in one walk each"] if done else []), *dict.fromkeys(notes)]


def any_matches(nodes: Iterable[Node], match: Callable[[Node], object]) -> bool:
    """Whether `match` takes one of the nodes."""
    for node in nodes:
        with contextlib.suppress(NotHere):
            match(node)
            return True
    return False


def is_op(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets


def value(node: Node) -> torch.Tensor:
    """The node's fake value."""
    made: torch.Tensor = node.meta["val"]
    return made


def source(node: Any) -> Any:
    """What a chain of reshaping views shows."""
    while is_op(node, *SAME):
        node = node.args[0]
    return node


def only_source(node: Any) -> Any:
    """The same, as long as the node and each one on the way has no other use; None where one has."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target not in SAME:
            return node
        node = node.args[0]
    return None


def peeled(node: Any) -> Any:
    """What a chain of detach and alias shows."""
    while is_op(node, aten.detach.default, aten.alias.default):
        node = node.args[0]
    return node


def uses(node: Node) -> list[Node]:
    """The users of a node, and those of its detach and alias."""
    found = [each for user in node.users for each in (uses(user) if peeled(user) is not user else [user])]
    return list(dict.fromkeys(found))


def other_argument(node: Node, one: Any) -> Any:
    """Of the two arguments of a sum or product the one that is not `one`."""
    return peeled(node.args[1] if peeled(node.args[0]) is peeled(one) else node.args[0])


def is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def alike(*nodes: Any) -> bool:
    """Whether these are contiguous tensors of one shape and one dtype that the kernels take."""
    fakes = [value(node) for node in nodes if isinstance(node, Node)]
    first = fakes[0]
    same = all(fake.shape == first.shape and fake.dtype == first.dtype and fake.is_contiguous() for fake in fakes)
    return same and len(fakes) == len(nodes) and first.dtype in DTYPES and first.numel() > 0


def put(before: Node, target: Any, args: tuple[Any, ...], replaced: Node) -> Node:
    """A call in front of `before`, in the place of `replaced`: of its module, line, phase and geometry."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta = dict(replaced.meta)
    replaced.replace_all_uses_with(node)
    return node


def put_several(before: Node, target: Any, args: tuple[Any, ...], replaced: tuple[Node, ...]) -> Node:
    """The same for an op with several results, each in the place of one node."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
        node.meta = {**replaced[0].meta, "val": tuple(value(each) for each in replaced)}
        for index, each in enumerate(replaced):
            part = before.graph.call_function(operator.getitem, (node, index))
            part.meta = dict(each.meta)
            each.replace_all_uses_with(part)
    return node


def new_like(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
    """A node of the same module, line and phase as `like`, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: item for key, item in like.meta.items() if key not in ("val", "tensor_meta")}
    fakes = torch.fx.map_arg(args, lambda arg: arg.meta["val"])
    with torch_private.mode_of(_first(like.meta["val"])):
        node.meta["val"] = target(*fakes, **kwargs)
    return node


def _first(made: Any) -> torch.Tensor:
    return made[0] if isinstance(made, (list, tuple)) else made  # type: ignore[no-any-return]


def fresh(node: Node) -> None:
    """Give a node a fake value of its own, of the geometry that it had, where the old one now is another node's."""
    old = value(node)
    node.meta["val"] = torch_private.dense_fake(torch_private.mode_of(old), old)


def finish(module: torch.fx.GraphModule) -> None:
    """The end of a pass: views, whose fake values still show the storage of what was replaced, show that of what took its place."""
    module.recompile()
    for node in module.graph.nodes:
        origin = torch_private.viewed(node.target, node.args)
        if isinstance(origin, Node) and not _shows(node, origin):
            with torch_private.mode_of(value(origin)):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
                node.meta["val"] = node.target(*args, **kwargs)


def _shows(node: Node, origin: Node) -> bool:
    made = node.meta["val"]
    parts = made if isinstance(made, (list, tuple)) else (made,)
    memory, *_ = torch_private.memory_of(value(origin))
    return all(torch_private.memory_of(part)[0] == memory for part in parts)


def drop(nodes: Iterable[Node]) -> None:
    """Erase those of the nodes that nothing uses, and then what only they used; ops that write or draw random numbers stay."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.users or node.op != "call_function" or getattr(node, "_erased", False) or not _pure(node.target):
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)


def _pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and not torch_private.is_random(target)
