"""A whole process in 256 MB: Qwen2.5-0.5B's true shape fine-tuned by an interpreter, torch and a generated program, and nothing else.

    python examples/lean.py [--steps 20] [--budget 256MB]        (after `make demo`, whose quantised weights it uses; exits 0 if it holds)

24 layers, sequence 256, batch 1, random weights in int4 on disk, LoRA rank 8 on all seven projections, SGD, numerics "reassociate". The step is
planned and saved by this process, which may use what it likes. It is run by another one, in which no transformers, no PEFT and no solver is ever
imported: RssAnon of everything in it, interpreter and torch included, is sampled every 2 ms, and RLIMIT_DATA is the VmData that the warmed process
has before it loads the step, plus the budget, plus 16 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mebp_compile.config import parse_budget
from mebp_compile.lean_process import Run, become_lean, run, warm_up
from mebp_compile.measure.process import limit_data, rss

OUT = Path(__file__).resolve().parent.parent / "out"
TEXT = Path(pydoc_data.topics.__file__)
SLACK_BYTES = 16_000_000
PLANNER = ("transformers", "peft", "ortools", "networkx", "solvers", "sympy", "mebp_compile.planning", "mebp_compile.compiler", "torch._dynamo")


def save_planned(budget: str, folder: Path) -> None:
    """Plan the step for a process of `budget` and save it with all of its state."""
    from mebp_compile import finetune
    from mebp_compile.progress import Progress

    chosen = finetune.Settings(
        "qwen2.5-0.5b", budget, scope="process", optimizer="sgd", weights="int4", lr=1e-3, numerics="reassociate", effort="fast",
        offload=OUT / "scratch", store=OUT / "qwen2.5-0.5b-int4",
    )  # fmt: skip
    step = finetune.prepare(chosen, Progress()).step
    print(step)
    step.save(folder)


def run_lean(budget_bytes: int, folder: Path, steps: int) -> None:
    """The lean process: prints one JSON line."""
    become_lean()
    warm_up()
    warmed = rss()
    limit_bytes = warmed.data_bytes + budget_bytes + SLACK_BYTES
    seconds: list[float] = []
    last = [time.perf_counter()]

    def told(number: int, loss: float) -> None:
        now = time.perf_counter()
        seconds.append(now - last[0])
        last[0] = now
        print(f"step {number}: loss {loss:.4f}, {seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    with limit_data(limit_bytes):
        ran = run(Run(folder, TEXT, steps, log=folder / "log.jsonl"), told)
        ran.step.save_state(folder / "trained")
    answer = {
        "warmed": vars(warmed), "limit_bytes": limit_bytes, "peak_bytes": ran.peak_bytes, "planned_bytes": ran.planned_bytes,
        "losses": ran.losses, "seconds": statistics.median(seconds[1:]), "planner": [name for name in PLANNER if name in sys.modules],
        "trims": ran.step.engine.pressure.trims if ran.step.engine.pressure else 0,
    }  # fmt: skip
    print(json.dumps(answer))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune Qwen2.5-0.5B's shape in a process of 256 MB.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", default="256MB")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder, budget_bytes = OUT / "lean-step", parse_budget(given.budget)
    if given.run:
        run_lean(budget_bytes, folder, given.steps)
        return 0
    (OUT / "scratch").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MEBP_CACHE", str(OUT / "cache"))
    save_planned(given.budget, folder)
    command = [sys.executable, __file__, "--run", "--steps", str(max(2, given.steps)), "--budget", given.budget]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    return report(answer, budget_bytes)


def report(answer: dict, budget_bytes: int) -> int:  # type: ignore[type-arg]
    """Print what was measured; 0 where it holds."""
    rows = [
        ("RssAnon, interpreter and torch warmed, no step", answer["warmed"]["anon_bytes"]),
        ("the step's share, predicted", answer["planned_bytes"]),
        (f"RssAnon of the whole process, peak of {len(answer['losses'])} steps", answer["peak_bytes"]),
        ("budget of the whole process", budget_bytes),
        ("VmData, warmed", answer["warmed"]["data_bytes"]),
        ("RLIMIT_DATA = warmed VmData + budget + 16 MB", answer["limit_bytes"]),
    ]
    for name, size_bytes in rows:
        print(f"{name:58}{size_bytes / 1e6:>10,.1f} MB")
    print(f"{'seconds a step, median':58}{answer['seconds']:>10.2f}")
    print(f"loss {answer['losses'][0]:.3f} -> {answer['losses'][-1]:.3f}; malloc gave memory back {answer['trims']} times")
    inside = answer["peak_bytes"] <= budget_bytes
    print(f"the whole process inside the budget: {'yes' if inside else 'NO'}; completed under RLIMIT_DATA: yes")
    print(f"of the planner in the lean process: {', '.join(answer['planner']) or 'nothing'}")
    return 0 if inside and not answer["planner"] else 1


if __name__ == "__main__":
    sys.exit(main())
