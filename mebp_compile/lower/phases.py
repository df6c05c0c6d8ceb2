"""Where each fx node belongs: phase (forward, backward, update), module path, source line, and the forward op that a backward op serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mebp_compile import torch_private


@dataclass(frozen=True)
class Places:
    phase: str
    module: str
    source: str
    forward_op: str


def places(graph: torch.fx.Graph) -> dict[torch.fx.Node, Places]:
    """Forward nodes carry their module; backward nodes find it through the sequence number of the forward op that they differentiate."""
    modules: dict[int, str] = {}
    forward: dict[int, torch.fx.Node] = {}
    result: dict[torch.fx.Node, Places] = {}
    for node, phase in _phases(graph):
        sequence = node.meta.get("seq_nr")
        module = (node.meta.get("custom") or {}).get("fqn", "")
        made_by = ""
        if phase == "forward" and sequence is not None:
            modules.setdefault(sequence, module)  # ops without a gradient share the number of the one before them
            forward.setdefault(sequence, node)
        elif phase == "backward":
            module = modules.get(sequence, "")  # type: ignore[arg-type]
            made_by = forward[sequence].name if sequence in forward else ""
        source = torch_private.node_line(node) if phase == "forward" else ""
        result[node] = Places(phase, module, source, made_by)
    return result


def _phases(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, str]]:
    """A node with the backward mark is backward; from `Optimizer.step` to its end is update; what follows backward unmarked is update
    too.
    """
    phase, updating = "forward", False
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        if "_record_function_enter" in str(node.target):
            updating = updating or _is_step(node)
        elif "_record_function_exit" in str(node.target):
            updating = updating and not _is_step(node.args[0])
        if updating:
            phase = "update"
        elif node.meta.get("autograd_backward"):
            phase = "backward"
        elif (node.meta.get("custom") or {}).get("fqn"):
            phase = "forward"
        elif phase == "backward":
            phase = "update"
        yield node, phase


def _is_step(enter: Any) -> bool:
    return bool(enter.args) and str(enter.args[0]).startswith("Optimizer.step")
