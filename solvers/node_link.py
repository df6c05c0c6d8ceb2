"""Graphs in networkx's node-link JSON, as published with Checkmate and MOCCASIN, as problems.

A node is an op and what it makes; its cost in time and bytes is called cost_cpu and cost_ram, or duration and out_cost. Values live up to
their last reader, nothing is persistent, and there is no disk. Ops come in the order that the file gives, else in networkx's topological order.
Sizes and times are divided by what they all have in common, so that times are not microseconds: only their ratios mean something.
"""

from __future__ import annotations

import json
import math
from typing import Any

from solvers.problem import Choice, Op, Problem, ProblemError, Storage

COSTS = (("cost_cpu", "cost_ram"), ("duration", "out_cost"))
ENDS = (("source", "target"), ("0", "1"))


def problem_of(text: str) -> Problem:
    """The problem, with all the bytes it needs as its budget. Raises ProblemError for text that is no such graph."""
    try:
        return _problem(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        if isinstance(error, ProblemError):
            raise
        raise ProblemError(f"not a graph in node-link JSON with costs: {error!r}") from error


def _problem(data: dict[str, Any]) -> Problem:
    import networkx as nx

    time_key, size_key = next(keys for keys in COSTS if all(keys[0] in node for node in data["nodes"]))
    nodes = {node.get("id", node.get("name")): node for node in data["nodes"]}
    links = data.get("links", data.get("edges", ()))
    tail, head = next((keys for keys in ENDS if all(keys[0] in link for link in links)), ENDS[0])
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((link[tail], link[head]) for link in links)
    if len(graph) != len(nodes) or not nx.is_directed_acyclic_graph(graph):
        raise ProblemError("the graph has a cycle, or a link to a node that it does not list")
    order = data["graph"].get("order") or list(nx.topological_sort(graph))
    if sorted(map(str, order)) != sorted(map(str, nodes)):
        raise ProblemError("the graph's order does not list each node once")
    place = {node: k for k, node in enumerate(order)}
    times, sizes = ([int(nodes[node][key]) for node in order] for key in (time_key, size_key))
    time_unit, size_unit = math.gcd(*times) or 1, math.gcd(*sizes) or 1
    reads = [tuple(sorted(place[before] for before in graph.predecessors(node))) for node in order]
    names = [str(nodes[node].get("name", node)) for node in order]
    phases = ["backward" if nodes[node].get("backward") else "forward" for node in order]
    ops = tuple(Op(names[k], (Choice(reads[k], time_us=times[k] // time_unit),), (k,), phase=phases[k]) for k in range(len(order)))
    storages = tuple(Storage(name, size // size_unit) for name, size in zip(names, sizes, strict=True))
    problem = Problem(ops, storages, sum(sizes) // size_unit, can_offload=False, name=str(data["graph"].get("name", "")))
    problem.validate()
    return problem
