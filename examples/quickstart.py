"""The smallest whole example: an ordinary training step, then the same step, bit for bit, inside 4 MB.

    python examples/quickstart.py [--budget 4MB]          writes timeline.html and program.py in out/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import mebp_compile
from mebp_compile.compiler import CompiledStep

OUT = Path(__file__).resolve().parent.parent / "out" / "quickstart"


def main(budget: str = "4MB", rows: int = 512, steps: int = 20, folder: Path = OUT) -> CompiledStep:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128)) for _ in range(6)]
    model = nn.Sequential(*blocks, nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # nothing in here knows of mebp_compile
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x, y = torch.randn(rows, 128), torch.randint(0, 10, (rows,))
    compiled = mebp_compile.optimize(step, budget, example=(x, y), effort="fast")
    print(compiled, compiled.explain("model.5"), compiled.compare(x, y), sep="\n\n")
    losses = [float(compiled(x, y)) for _ in range(steps)]
    folder = compiled.save(folder)
    print(f"\nloss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps")
    print(f"wrote {folder / 'program.py'} and {compiled.show(folder / 'timeline.html')}")
    return compiled


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An ordinary training step inside a budget.")
    parser.add_argument("--budget", default="4MB")
    main(parser.parse_args().budget)
