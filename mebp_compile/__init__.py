"""mebp_compile: a PyTorch training step, rewritten to run inside a hard memory budget, bit for bit the same.

The public names load lazily, so that tools which only read artifacts (`mebp check`, `mebp show`) never import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOME = {
    "optimize": "compiler",
    "plan": "compiler",
    "CompiledStep": "compiler",
    "Budget": "config",
    "WeightStore": "runtime.weights",
    "load_lean": "lean",
}
__all__ = ["Budget", "CompiledStep", "WeightStore", "errors", "load_lean", "optimize", "plan"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("mebp_compile.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'mebp_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mebp_compile.{_HOME[name]}"), name)
