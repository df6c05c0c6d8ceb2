"""How far gradients are from float64: eager's own in bfloat16, and those of the compiled step, exact and reassociate.

    python examples/gradients.py [--model qwen2.5-0.5b] [--sequence 256] [--budget 64MB] [--seed 0]

One forward and backward of a LoRA training (rank 8 on every linear layer, random int4 base) on one batch. The reference holds the same
dequantised weights and adapters in float64; what the model itself computes in float32 (norms, rotary tables, the loss) stays so. Errors are
|g - g64| / |g64| in the 2-norm, for every trainable tensor. Exits 0 if "exact" equals eager bit for bit and the median error of "reassociate"
is at most 1.1 times eager's.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mebp_compile import finetune, optimize
from mebp_compile.capture import find_state
from mebp_compile.runtime.bind import bind_weights, dense_weights
from mebp_compile.runtime.weights import WeightStore

OUT = Path(__file__).resolve().parent.parent / "out"
Gradients = dict[str, torch.Tensor]


def make_step(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Forward and backward; gradients stay in .grad."""

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=input_ids, labels=labels).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step


def taken(model: Any) -> Gradients:
    """The gradients, taken from the model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def eager(model: Any, store: WeightStore, batch: tuple[torch.Tensor, ...]) -> tuple[Gradients, Gradients]:
    """In bfloat16 as the user's own step, and in float64."""
    step = make_step(model)
    state = find_state(step)
    with dense_weights(state, bind_weights(state, store, None)):
        step(*batch)
        narrow = taken(model)
        wide = copy.deepcopy(model).double()
    make_step(wide)(*batch)
    return narrow, taken(wide)


def compiled(model: Any, store: WeightStore, batch: tuple[torch.Tensor, ...], settings: finetune.Settings, numerics: str) -> Gradients:
    """Of the step planned inside the budget."""
    step = optimize(
        make_step(model), settings.budget, weights=store, offload=settings.offload, numerics=numerics, effort="fast", example=batch
    )
    step(*batch)
    step.materialise()
    return taken(model)


def errors(found: Gradients, reference: Gradients) -> list[float]:
    """Relative error of each tensor."""
    return [float((found[name].double() - true).norm() / true.norm()) for name, true in reference.items()]


def line(name: str, values: list[float]) -> str:
    return f"{name:12} median {statistics.median(values):.2e}, largest {max(values):.2e}, of {len(values)} tensors"


def main() -> int:
    """Print the table; 0 if both claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--budget", default="64MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = OUT / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    settings = finetune.Settings(
        args.model, args.budget, sequence=args.sequence, weights="int4", offload=folder, store=OUT / f"{Path(args.model).name}-int4", seed=args.seed
    )
    model, store = finetune.build_model(settings)
    assert store is not None
    torch.manual_seed(args.seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter, which would leave nothing to compare in A
            torch.nn.init.normal_(parameter, std=0.02)
    batch = next(finetune.byte_batches(settings, Path(pydoc_data.topics.__file__)))
    narrow, wide = eager(model, store, batch)
    exact = compiled(model, store, batch, replace(settings, budget="1GB"), "exact")
    tiled = compiled(model, store, batch, settings, "reassociate")
    same = all(torch.equal(narrow[name], exact[name]) for name in narrow)
    own, ours = errors(narrow, wide), errors(tiled, wide)
    print(f"exact        equal to eager bit for bit: {'yes' if same else 'NO'}")
    print(line("eager", own))
    print(line("reassociate", ours))
    return 0 if same and statistics.median(ours) <= 1.1 * statistics.median(own) else 1


if __name__ == "__main__":
    raise SystemExit(main())
