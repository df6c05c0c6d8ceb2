"""Run contestants side by side: each in a process of its own, all on the same batches, their timed steps taken in turn.

Steps are paired: in each round every contestant does one timed step, so that a machine that is busy for a while is busy for all. A contestant
waits on a pipe meanwhile and uses no processor; then its code and its files may have left the caches, the page cache included, so an untimed step
comes before the timed one, as in a training that goes on. A contestant that is alone waits for nobody, and does fewer rounds where they are long.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mebp_compile.finetune import Settings
from mebp_compile.measure.malloc_meter import library_path, preload_environment
from mebp_compile.measure.process import small_heap
from mebp_compile.progress import Progress

Json = dict[str, Any]
ALONE_S = 60.0  # of timed steps, after which a contestant that is alone has shown what it takes
OFFLINE = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no downloads, and no helper processes beside a contestant's own


@dataclass(frozen=True)
class Contestant:
    """A row of the table: `kind` as in `peers.prepare`, and the settings of its run."""

    name: str
    kind: str
    settings: Settings


@dataclass
class Result:
    """What was measured. Bytes above the process without the model; seconds of each timed step; flops: of its matrix products, each counted
    once; error: why it could not run."""

    name: str
    kind: str
    budget: str = ""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tensor_bytes: int = 0
    malloc_bytes: int = 0
    anon_bytes: int = 0
    resident_bytes: int = 0
    predicted_bytes: int = 0
    predicted_us: int = 0
    flops: int = 0
    error: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def peak_bytes(self) -> int:
        """malloc's peak, or that of tensors where malloc is not metered."""
        return self.malloc_bytes or self.tensor_bytes


def race(contestants: Sequence[Contestant], rounds: int, text: Path, progress: Progress) -> list[Result]:
    """A result for each contestant, in order. A contestant that fails has an `error`, and the others go on."""
    results = [Result(each.name, each.kind, each.settings.budget if each.kind == "ours" else "") for each in contestants]
    runners: list[tuple[_Runner, Result]] = []
    try:
        for each, result in zip(contestants, results, strict=True):
            progress.say(f"preparing {each.name}")
            runner = _Runner(each, text)
            runners.append((runner, result))
            _take(result, runner.ask("prepare"))
            _take(result, runner.ask("step"))  # warms the kernels and touches the pages
        alone = len(runners) == 1
        for number in range(rounds):
            if all(result.error for result in results):
                break
            for runner, result in runners:
                _timed(result, runner, alone)
            progress.say(f"round {number + 1} of {rounds}: " + ", ".join(f"{r.name} {r.seconds[-1]:.2f} s" for _, r in runners if r.seconds))
            if alone and sum(results[0].seconds) > ALONE_S:
                break
        for runner, result in runners:
            for question in ("process", "storages"):
                _take(result, runner.ask(question))
    finally:
        for runner, _ in runners:
            runner.close()
    return results


def _timed(result: Result, runner: _Runner, alone: bool) -> None:
    if not result.error:
        if not alone:
            _take(result, runner.ask("step"))
        answer = runner.ask("step")
        _take(result, answer)
        result.seconds += [answer["seconds"]] if "seconds" in answer else []


def _take(result: Result, answer: Json) -> None:
    """File an answer's facts in the result."""
    if "error" in answer:
        result.error = result.error or str(answer["error"])
    if "loss" in answer:
        result.losses.append(answer["loss"])
    for key in ("tensor_bytes", "malloc_bytes", "anon_bytes", "resident_bytes", "predicted_bytes", "predicted_us", "flops"):
        if answer.get(key) is not None:
            setattr(result, key, answer[key])


def _ended(status: int) -> str:
    """A process that ended too early, in words."""
    if status < 0:
        return f"its process was killed by signal {-status}{' (out of memory, most likely)' if status == -signal.SIGKILL else ''}"
    return f"its process ended with status {status}"


class _Runner:
    """A contestant's process, asked line by line."""

    def __init__(self, contestant: Contestant, text: Path) -> None:
        meter = preload_environment() if library_path() is not None else {}
        environment = {**os.environ, **OFFLINE, **small_heap(os.environ), **meter}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mebp_compile.bench.serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.failed = ""
        settings = {key: str(item) if isinstance(item, Path) else item for key, item in asdict(contestant.settings).items()}
        self._send({"kind": contestant.kind, "settings": settings, "text": str(text)})

    def ask(self, question: str) -> Json:
        """The answer to "prepare", "step", "process" or "storages"; {"error": ...} once something went wrong."""
        if self.failed:
            return {"error": self.failed}
        self._send(question)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: Json = json.loads(line) if line else {"error": _ended(self.process.wait())}
        self.failed = str(answer.get("error", ""))
        return answer

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.failed = self.failed or _ended(self.process.wait())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with self.process:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
