"""What a lean process does: hold still while its memory is measured, or run a saved step on a data file. Torch is imported inside, after malloc
was told to spare memory.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_compile.data import TokenFile, batches, open_log
from mebp_compile.errors import LeanError, OptionError
from mebp_compile.measure.child import run_child
from mebp_compile.measure.process import PeakRss, malloc_trim, rss, spare_memory

if TYPE_CHECKING:
    from mebp_compile.lean import LeanStep

SAMPLE_S = 0.002
TRIAL_STEPS = 3


def become_lean() -> None:
    """To be called before torch is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which nothing here uses
    spare_memory()


# --- the baseline ---


def baseline(request: Mapping[str, Any]) -> dict[str, Any]:
    """A child's function: {"anon_bytes", "data_bytes"} of a process that has everything but a step."""
    become_lean()
    warm_up()
    gc.collect()
    malloc_trim()
    found = rss()
    return {"anon_bytes": found.anon_bytes, "data_bytes": found.data_bytes}


def warm_up() -> None:
    """Import the runtime and start what starts once: torch's threads, its matmuls and attention, our kernels, the disk thread."""
    import torch

    from mebp_compile import kernels, quant
    from mebp_compile.measure.transfer import DiskThread

    importlib.import_module("mebp_compile.lean")
    for owner in (kernels.native, kernels.fused, kernels.attention, quant.native):
        owner.library()
    torch.ones(1 << 18).exp()
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, dtype=dtype)
        torch.mm(square, square)
        heads = square.view(1, 1, 64, 64)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    with DiskThread() as thread:
        thread.submit(lambda: None).wait()


# --- a trial ---


def try_out(folder: Path, steps: int = TRIAL_STEPS) -> dict[str, int]:
    """Run a saved step in a child, on batches of zeros: {"peak_bytes": RssAnon of the whole process, "data_bytes": VmData}. What is saved stays
    as it is. Raises what `load_lean` raises."""
    return run_child("mebp_compile.lean_process", "trial", {"folder": str(folder.resolve()), "steps": steps})


def trial(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's side."""
    become_lean()
    import torch

    from mebp_compile.lean import load_lean

    with PeakRss(SAMPLE_S) as peak:
        step = load_lean(request["folder"])
        for _ in range(request["steps"]):
            step(*(torch.zeros(shape, dtype=dtype) for shape, dtype in step.batch_tensors()))
    return {"peak_bytes": peak.peak_anon_bytes, "data_bytes": peak.after.data_bytes}


# --- a run ---


@dataclass(frozen=True)
class Run:
    """What to run: a saved step, a data file (bytes are tokens unless `tokenizer` names a tokenizer.json), and where results go."""

    folder: Path
    data: Path
    steps: int
    tokenizer: Path | None = None
    seed: int = 0
    log: Path | None = None
    state: Path | None = None
    offload: Path | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"--steps is {self.steps}", "give a positive number")
        if not self.data.is_file():
            raise OptionError(f"there is no data file {self.data}", "give a UTF-8 .txt or .jsonl file")


@dataclass(frozen=True)
class Ran:
    """What came of it. peak_bytes: the largest RssAnon of the whole process from loading the step to its last call, sampled every 2 ms;
    budget_bytes: of the process, if it has one; planned_bytes: of the step alone."""

    step: LeanStep
    losses: list[float]
    peak_bytes: int
    planned_bytes: int
    budget_bytes: int | None


def run(wanted: Run, told: Callable[[int, float], None] = lambda number, loss: None) -> Ran:
    """Load the step and run it on the data's batches. `told` hears each step's number and loss. Raises what `load_lean` raises, OptionError."""
    from mebp_compile.lean import load_lean

    losses = []
    with PeakRss(SAMPLE_S) as peak:
        step = load_lean(wanted.folder, state=wanted.state, offload=wanted.offload)
        rows, sequence = batch_shape(step)
        with blocks_of(wanted, sequence) as blocks, open_log(wanted.log) as write:
            source = batches(blocks, rows, wanted.seed)
            for number in range(1, wanted.steps + 1):
                started = time.perf_counter()
                losses.append(_loss(step(*next(source))))
                write({"step": number, "loss": losses[-1], "seconds": round(time.perf_counter() - started, 4)})
                told(number, losses[-1])
    return Ran(step, losses, peak.peak_anon_bytes, step.binding.peak_bytes, step.saved.process_bytes)


def batch_shape(step: LeanStep) -> tuple[int, int]:
    """(rows, sequence) of a step of (input_ids, labels). Raises LeanError for a step with another batch."""
    shapes = [shape for shape, _ in step.batch_tensors()]
    if len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise LeanError(f"the step takes a batch of {shapes}, not (input_ids, labels)", "load it with load_lean and call it on batches of your own")
    return shapes[0][0], shapes[0][1]


@contextlib.contextmanager
def blocks_of(wanted: Run, sequence: int) -> Iterator[TokenFile]:
    """The data as blocks in a file of tokens, which a child process writes and nobody keeps."""
    with tempfile.TemporaryDirectory(prefix="mebp-tokens-") as folder:
        out = Path(folder) / "tokens"
        tokenizer = str(wanted.tokenizer) if wanted.tokenizer is not None else None
        request = {"data": str(wanted.data), "out": str(out), "sequence": sequence, "tokenizer": tokenizer}
        run_child("mebp_compile.data", "tokenise", request)
        with TokenFile(out, sequence) as blocks:
            yield blocks


def _loss(result: Any) -> float:
    """The loss that a step returned: itself, or the first of several results."""
    first = next(iter(result.values())) if isinstance(result, dict) else result[0] if isinstance(result, (tuple, list)) else result
    return float(first)
