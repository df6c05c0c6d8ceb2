"""Names that a person can follow: `layers_3_mlp_up_proj_mm`, `layers_3_mlp_up_proj_weight`, `lr`."""

from __future__ import annotations

import keyword
import re
from typing import Any

BORING = ("base_model", "model", "module", "transformer", "base_layer", "default")
RESERVED = {"run", "torch", "aten", "math"}


class Namer:
    """Gives each thing a name that is unique, a valid identifier, and the same for the same trace."""

    def __init__(self) -> None:
        self.taken: set[str] = set(RESERVED)

    def unique(self, wish: str) -> str:
        wish = re.sub(r"\W+", "_", wish).strip("_") or "value"
        if wish[0].isdigit() or keyword.iskeyword(wish):
            wish = f"x_{wish}"
        name, number = wish, 2
        while name in self.taken:
            name, number = f"{wish}_{number}", number + 1
        self.taken.add(name)
        return name

    def persistent(self, source: str) -> str:
        """From "parameter:model:layers.0.mlp.up_proj.weight" and its kin."""
        kind, *rest = source.split(":")
        if kind == "optimizer":
            return self.unique(f"{short_path(rest[2])}_{rest[3]}")
        if kind == "gradient":
            return self.unique(f"{short_path(rest[1])}_grad")
        if kind == "batch":
            return self.unique(f"batch_{rest[0]}")
        return self.unique(short_path(rest[-1].strip()))

    def op(self, module: str, opname: str, node: Any) -> str:
        """The module's short path and the op: long enough to find the line of the model that made it."""
        return self.unique(f"{short_path('.'.join(module.split('.')[1:]))}_{opname.strip('_')}")

    def hyper(self, expression: str) -> str:
        """`lr` for a plain entry of a param group; `minus_`, `one_minus_` forms are left as `hyper`."""
        match = re.fullmatch(r"\w+\.param_groups\[(\d+)\]\['(\w+)'\](?:\[(\d+)\])?", expression)
        if match is None:
            return self.unique("hyper")
        return self.unique(match[2] + (str(int(match[3]) + 1) if match[3] else ""))


def short_path(path: str) -> str:
    """A module path without the components that every model has."""
    return "_".join(part for part in path.split(".") if part not in BORING)
