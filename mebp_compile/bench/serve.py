"""A contestant's process: reads questions from standard input, a JSON line each, and answers on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mebp_compile.bench.peers import Batch, Runner, prepare
from mebp_compile.bench.unavailable import in_short
from mebp_compile.finetune import Settings, byte_batches

FOLDERS = ("offload", "store")


def serve() -> None:
    """Answer until standard input ends. What libraries print goes to standard error. Where memory runs out, this process is the first to go."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    fields = {key: Path(item) if key in FOLDERS and item is not None else item for key, item in first["settings"].items()}
    settings = Settings(**fields)
    source, runner = byte_batches(settings, Path(first["text"])), None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question == "prepare":
                runner = prepare(first["kind"], settings)
                answer: dict[str, Any] = runner.facts
            else:
                assert runner is not None
                answer = ask(runner, question, source)
        except Exception as error:
            answer = {"error": in_short(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def ask(runner: Runner, question: str, source: Iterator[Batch]) -> dict[str, Any]:
    """One step, timed or metered, on the next batch."""
    batch = next(source)
    if question == "storages":
        return {"tensor_bytes": runner.storages(batch)}
    if question == "process":
        return runner.process(batch)
    started = time.perf_counter()
    loss = runner.step(batch)
    return {"seconds": time.perf_counter() - started, "loss": loss}


if __name__ == "__main__":
    serve()
