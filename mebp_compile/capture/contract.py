"""The contract of a captured step: all that a program must know of the capture besides its graph. It can be saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture.predicates import Predicate, data_tensor, tensor_data
from mebp_compile.capture.trace import Traced
from mebp_compile.graph import Guard


@dataclass(frozen=True)
class Contract:
    """What the capture relied on (guards on hyper-parameters, predicates of the batch), how results are returned, and real constants."""

    guards: tuple[Guard, ...]
    predicates: tuple[Predicate, ...]
    return_spec: pytree.TreeSpec
    return_constants: dict[int, Any]
    return_hypers: dict[int, str]
    cleared: tuple[str, ...]
    gradients_given: tuple[str, ...]
    constants: dict[str, torch.Tensor]


def contract_of(traced: Traced) -> Contract:
    names = [str(node.target) for node in traced.module.graph.nodes if node.op == "get_attr"]
    constants = {name: getattr(traced.module, name) for name in names if name not in traced.held}
    return Contract(
        tuple(traced.hyper.guards.values()),
        tuple(traced.predicates),
        traced.return_spec,
        dict(traced.return_constants),
        dict(traced.return_hypers),
        traced.cleared,
        traced.gradients_given,
        constants,
    )


def to_json(contract: Contract) -> str | None:
    """JSON text of a contract, or None where it holds something that has no text (a container of the user's own, an odd constant)."""
    try:
        data = {
            "guards": [[guard.kind, guard.subject, guard.expect] for guard in contract.guards],
            "predicates": [predicate.to_data() for predicate in contract.predicates],
            "return_spec": pytree.treespec_dumps(contract.return_spec),
            "return_constants": [[index, value] for index, value in contract.return_constants.items()],
            "return_hypers": [[index, text] for index, text in contract.return_hypers.items()],
            "cleared": contract.cleared,
            "gradients_given": contract.gradients_given,
            "constants": {name: tensor_data(tensor) for name, tensor in contract.constants.items()},
        }
        return json.dumps(data)
    except (TypeError, NotImplementedError, ValueError):
        return None


def from_json(text: str) -> Contract:
    """The contract that `to_json` wrote. Raises ValueError, KeyError or TypeError for any other text."""
    data = json.loads(text)
    return Contract(
        tuple(Guard(*guard) for guard in data["guards"]),
        tuple(Predicate.from_data(item) for item in data["predicates"]),
        pytree.treespec_loads(data["return_spec"]),
        dict(data["return_constants"]),
        dict(data["return_hypers"]),
        tuple(data["cleared"]),
        tuple(data["gradients_given"]),
        {name: data_tensor(item) for name, item in data["constants"].items()},
    )
