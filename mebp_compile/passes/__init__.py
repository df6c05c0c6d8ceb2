"""Passes: fx -> fx, above the line. They may change the arithmetic, each within the numerics tier that it declares.

A pass is one file with `TIER`, `run(module) -> notes`, which rewrites the graph of the module in place and says, a sentence a place, what it did or
why a place that it looks for could not be rewritten, `applies(module)`, which tells without changing anything whether it would, and `SAVES_MEMORY`:
whether a budget that is refused may fit with it (the others save time).
"""

from __future__ import annotations

import torch

from mebp_compile.config import TIERS
from mebp_compile.passes import attention, gated_units, low_rank, norms, products, rotary, row_losses, tiled_loss

PASSES = (tiled_loss, row_losses, low_rank, gated_units, norms, rotary, attention, products)


def better_tier(module: torch.fx.GraphModule, tier: str, device: str = "") -> str:
    """What to ask for so that a smaller budget may do, as advice; empty if no other pass would help."""
    if device:
        return ""
    above = [step for step in PASSES if step.SAVES_MEMORY and TIERS.index(step.TIER) > TIERS.index(tier) and step.applies(module)]
    return ", ".join(f'numerics="{step.TIER}" ({step.__name__.rpartition(".")[2]})' for step in above)


def run_passes(module: torch.fx.GraphModule, tier: str, device: str = "") -> list[str]:
    """Every pass that the tier allows, in order; their notes. None on an accelerator: the kernels of all of them are for the CPU so far."""
    if device:
        return [f"no passes: their kernels are for the CPU, the step runs on {device}"]
    allowed = [step for step in PASSES if TIERS.index(step.TIER) <= TIERS.index(tier)]
    return [note for step in allowed for note in step.run(module)]
