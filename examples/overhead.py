"""What the machinery costs where memory is plentiful: paired runs of the user's own step and the compiled one.

    python examples/overhead.py [--layers 24] [--sequence 256] [--pairs 7]

Qwen2.5-0.5B's shape with resident bf16 weights, LoRA rank 8, AdamW, and a budget above eager's peak, so that nothing is recomputed or moved.
Both work on the same objects in turn, one step each; the median of the paired ratios is printed, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import demo
import torch

from mebp_compile import finetune
from mebp_compile.models import CONFIGS
from mebp_compile.progress import Progress


def main() -> int:
    parser = argparse.ArgumentParser(description="Time of the compiled step over eager's, with memory to spare.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--budget", default="4GB")
    given = parser.parse_args()
    os.environ.setdefault("MEBP_CACHE", str(demo.OUT / "cache"))
    CONFIGS["qwen2.5-0.5b"][1]["num_hidden_layers"] = given.layers
    chosen = finetune.Settings("qwen2.5-0.5b", given.budget, sequence=given.sequence, lr=1e-4, effort="fast")
    model, _ = finetune.build_model(chosen)
    step, _ = finetune.make_step(model, chosen)
    compiled = finetune.compile_step(step, chosen, None, Progress())
    source = demo.text_batches(chosen)
    for warm in (step, compiled, step, compiled):
        warm(*next(source))
    ratios, seconds = [], []
    for _ in range(given.pairs):
        batch = next(source)
        started = time.perf_counter()
        step(*batch)
        middle = time.perf_counter()
        compiled(*batch)
        seconds.append((middle - started, time.perf_counter() - middle))
        ratios.append(seconds[-1][1] / seconds[-1][0])
    eager_s, ours_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"{given.layers} layers, sequence {given.sequence}, {torch.get_num_threads()} threads, {given.pairs} pairs")
    print(
        f"eager {eager_s:.3f} s, compiled {ours_s:.3f} s; ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    )
    print(
        f"recomputes {compiled.plan.report.recomputes}, offloads {compiled.plan.report.offloads}, arena {compiled.plan.placement.arena_bytes:,} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
