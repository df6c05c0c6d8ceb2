"""The budget is hard: the demo's step under RLIMIT_DATA, where plain PyTorch's step can't allocate.

    python examples/limit.py                (after `make demo`; prints a line for each, exits 0 if ours completes and the plain one does not)

RLIMIT_DATA bounds VmData, which holds more than the tensors (threads, the interpreter, torch), so the limit is what the warmed process has
without its tensors, plus the budget, plus 5 % and 16 MB.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys

import demo

from mebp_compile import finetune
from mebp_compile.capture import find_state
from mebp_compile.compare import live_tensors
from mebp_compile.config import parse_budget
from mebp_compile.measure.meter import malloc_trim
from mebp_compile.measure.process import limit_data, rss
from mebp_compile.progress import Progress
from mebp_compile.runtime.bind import bind_weights, dense_weights
from mebp_compile.runtime.metering import kept_storage_bytes, storage_bytes

NO_MEMORY = 3  # exit code of a step that could not allocate


def limit_above(tensor_bytes: int, budget_bytes: int) -> int:
    """VmData without the tensors that it holds now, plus the budget and the slack."""
    malloc_trim()
    return rss().data_bytes - tensor_bytes + budget_bytes + budget_bytes // 20 + 16_000_000


def ours(budget: str) -> None:
    chosen = demo.settings(budget)
    model, store = finetune.build_model(chosen)
    step, _ = finetune.make_step(model, chosen)
    compiled = finetune.compile_step(step, chosen, store, Progress())
    source = demo.text_batches(chosen)
    first = next(source)
    compiled(*first)
    program = compiled.program
    limit = limit_above(program.engine.arena.nbytes + kept_storage_bytes(program, list(first)), parse_budget(budget))
    with limit_data(limit):
        losses = [compiled(*batch).item() for batch in itertools.islice(source, 3)]
    print(f"mebp_compile: 3 steps under RLIMIT_DATA = {limit:,} bytes completed, losses {losses}")


def plain(budget: str) -> None:
    chosen = demo.settings(budget)
    model, store = finetune.build_model(chosen)
    step, _ = finetune.make_step(model, chosen)
    state = find_state(step)
    source = demo.text_batches(chosen)
    with dense_weights(state, bind_weights(state, store, None)):
        step(*next(source))
        limit = limit_above(storage_bytes(live_tensors(state)), parse_budget(budget))
        batch = next(source)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        try:
            step(*batch)
        except RuntimeError as error:
            print(f"plain PyTorch: one step under RLIMIT_DATA = {limit:,} bytes failed: {str(error).splitlines()[0][:160]}")
            sys.exit(NO_MEMORY)
    print("plain PyTorch: the step completed")


def main() -> int:
    parser = argparse.ArgumentParser(description="The demo's step and plain PyTorch's under the same limit on memory.")
    parser.add_argument("--budget", default="512MB")
    parser.add_argument("--run", choices=("ours", "plain"))
    given = parser.parse_args()
    (demo.OUT / "scratch").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MEBP_CACHE", str(demo.OUT / "cache"))
    if given.run:
        (ours if given.run == "ours" else plain)(given.budget)
        return 0
    done = [subprocess.run([sys.executable, __file__, "--budget", given.budget, "--run", which]).returncode for which in ("ours", "plain")]
    as_promised = done == [0, NO_MEMORY]
    print("as promised: ours completes, plain PyTorch can't allocate" if as_promised else f"NOT as promised: exit codes {done}")
    return 0 if as_promised else 1


if __name__ == "__main__":
    sys.exit(main())
