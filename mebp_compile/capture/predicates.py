"""Predicates of the batch: `if attention_mask.all()` is evaluated on the real batch and becomes a guard.

While the step is traced, a tensor whose value is asked for in Python (`.item()`, `bool()`, `torch.equal`) is looked up: where it was
computed from batch tensors and constants alone, the very same ops are run on the example batch and the answer is used; the graph is then
valid as long as the answer is the same, and the predicate, a small fx graph of its own, is kept to ask again at each call.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile import torch_private

ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)


@dataclass(frozen=True)
class Predicate:
    """A question about the batch: `graph` of the batch tensors named in `sources` gives a number or truth value, which was `expect`.

    `line` is where the step asked it. The graph is kept as text with its constants, so that a predicate can be saved.
    """

    code: str
    constants: dict[str, torch.Tensor]
    sources: tuple[str, ...]
    expect: Any
    line: str

    @functools.cached_property
    def graph(self) -> Any:
        scope: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
        exec(compile(self.code, "<predicate>", "exec"), scope)
        owner = types.SimpleNamespace(**self.constants)
        return lambda *tensors: scope["forward"](owner, *tensors)

    def to_data(self) -> dict[str, Any]:
        constants = {name: tensor_data(tensor) for name, tensor in self.constants.items()}
        return {"code": self.code, "constants": constants, "sources": self.sources, "expect": self.expect, "line": self.line}

    @staticmethod
    def from_data(data: dict[str, Any]) -> Predicate:
        constants = {name: data_tensor(item) for name, item in data["constants"].items()}
        return Predicate(data["code"], constants, tuple(data["sources"]), data["expect"], data["line"])

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
        code, constants, sources = _program_of(func, args, asked, sliced, names)
        predicate = Predicate(code, constants, sources, None, torch_private.user_line())
        with torch_private.outside_tracing():
            return replace(predicate, expect=predicate.graph(*[self.real[source] for source in sources]))


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


def _program_of(
    func: Any, args: Any, asked: list[Any], nodes: list[torch.fx.Node], names: dict[Any, str]
) -> tuple[str, dict[str, torch.Tensor], tuple[str, ...]]:
    """(text of a function of the batch tensors, the constants that it uses, the sources of its arguments)."""
    graph, copies, sources, constants = torch.fx.Graph(), {}, [], {}
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
            sources.append(names[node])
    for node in nodes:
        if node.op == "get_attr":
            constants[str(node.target)] = torch_private.constant_of(node)
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    asked_args = tuple(copies[node] if node is not None else arg for node, arg in zip(asked, args, strict=True))
    graph.output(graph.call_function(func, asked_args))
    return graph.python_code("self").src, constants, tuple(sources)


LARGEST_CONSTANT = 1 << 16


def tensor_data(tensor: torch.Tensor) -> dict[str, Any]:
    """A small tensor as data: dtype, shape, and its bytes in hexadecimal."""
    if tensor.numel() > LARGEST_CONSTANT:
        raise ValueError("a constant too large to be saved")
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "hex": raw.hex()}


def data_tensor(data: dict[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray.fromhex(data["hex"]) or bytearray(1), dtype=torch.uint8)[: len(data["hex"]) // 2]
    return raw.clone().view(getattr(torch, data["dtype"])).reshape(data["shape"])
