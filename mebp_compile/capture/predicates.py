"""Predicates of the batch: `if attention_mask.all()` is evaluated on the real batch and becomes a guard.

While the step is traced, a tensor whose value is asked for in Python (`.item()`, `bool()`, `torch.equal`) is looked up: where it was computed
from batch tensors and constants alone, the very same ops are run on the example batch and the answer is used; the graph is then
valid as long as the answer is the same, and the predicate, a small fx graph of its own, is kept to ask again at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile import torch_private

ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)


@dataclass(frozen=True)
class Predicate:
    """A question about the batch: `graph` of the batch tensors named in `sources` gives a number or truth value, which was `expect`."""

    graph: torch.fx.GraphModule
    sources: tuple[str, ...]
    expect: Any
    line: str

    def ask(self, batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return self.graph(*[batch[source] for source in self.sources])


class PredicateMode(TorchDispatchMode):
    """Answers questions about the batch concretely; leaves all others to the tracer (a returned `loss.item()` stays symbolic)."""

    def __init__(self, given: dict[str, torch.Tensor], real: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.given, self.real = given, real
        self.guards: list[Predicate] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ASKS:
            predicate = self._predicate(func, args)
            if predicate is not None:
                if predicate.sources:
                    self.guards.append(predicate)
                return predicate.expect
        return func(*args, **(kwargs or {}))

    def _predicate(self, func: Any, args: tuple[Any, ...]) -> Predicate | None:
        names = {torch_private.proxy_node(self.given[source]): source for source in self.real}
        asked = [torch_private.proxy_node(arg) if isinstance(arg, torch.Tensor) else None for arg in args]
        if any(node is None for node, arg in zip(asked, args, strict=True) if isinstance(arg, torch.Tensor)):
            return None
        sliced = _slice([node for node in asked if node is not None], names)
        if sliced is None:
            return None
        graph, sources = _graph_of(func, args, asked, sliced, names)
        with torch_private.outside_tracing():
            expect = graph(*[self.real[source] for source in sources])
        return Predicate(graph, sources, expect, torch_private.user_line())


def _slice(roots: list[torch.fx.Node], names: dict[Any, str]) -> list[torch.fx.Node] | None:
    """The nodes that compute `roots` from batch placeholders, in order; None where anything else is involved."""
    needed: dict[torch.fx.Node, None] = {}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        if node.op == "placeholder" and node not in names:
            return None
        if node.op == "call_function" and torch_private.is_random(node.target):
            return None
        needed[node] = None
        pending += node.all_input_nodes
    order = {node: index for index, node in enumerate(roots[0].graph.nodes)} if roots else {}
    return sorted(needed, key=order.__getitem__)


def _graph_of(func: Any, args: Any, asked: list[Any], nodes: list[torch.fx.Node], names: dict[Any, str]) -> tuple[torch.fx.GraphModule, tuple[str, ...]]:
    graph, copies, sources = torch.fx.Graph(), {}, []
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
            sources.append(names[node])
    root = torch.nn.Module()
    for node in nodes:
        if node.op == "get_attr":
            root.register_buffer(str(node.target), torch_private.constant_of(node), persistent=False)
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    asked_args = tuple(copies[node] if node is not None else arg for node, arg in zip(asked, args, strict=True))
    graph.output(graph.call_function(func, asked_args))
    return torch.fx.GraphModule(root, graph), tuple(sources)
