"""Make the frozen problems of this folder that are no real steps: random layered graphs, and adversarial ones.

    python tests/instances/synthetic.py [NAME ...]

Each adversarial family is hard in one known way, which its docstring names.
"""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "solvers"))

from generators import Builder, layered  # noqa: E402

from solvers.baselines import keep_all  # noqa: E402
from solvers.check import replay  # noqa: E402
from solvers.problem import Problem  # noqa: E402


def chain(b: Builder, draw: random.Random, count: int, reads_of: Callable[[int], list[int]]) -> None:
    """f0 .. f(count-1), op k reading the values of `reads_of(k)`, then the loss and their backward ops, each reading what its forward did."""
    batch = b.storage("batch", 100_000, persistent=True, movable=False)
    made: list[int] = []
    reads: list[list[int]] = []
    for k in range(count):
        reads.append([made[j] for j in reads_of(k)] or [batch])
        made.append(b.storage(f"v{k}", draw.randint(10_000, 100_000)))
        b.op(f"f{k}", reads[k], [made[k]], draw.randint(500, 5_000), draw.randint(0, 20_000))
    gradient = b.storage("g_last", 50_000)
    b.op("loss", [made[-1]], [gradient], 500)
    for k in reversed(range(count)):
        new = b.storage(f"g{k}", draw.randint(10_000, 60_000), output=k == 0)
        b.op(f"b{k}", [gradient, made[k], *reads[k]], [new], draw.randint(1_000, 8_000), phase="backward")
        gradient = new


def ladder() -> Problem:
    """v(k) reads v(k-1) and v(k-2): what is recomputed without care is recomputed Fibonacci-many times."""
    b = Builder()
    chain(b, random.Random(1), 60, lambda k: [j for j in (k - 1, k - 2) if j >= 0])
    return b.problem(10**9, can_offload=False, name="ladder")


def long_skips() -> Problem:
    """Every op also reads the value of its mirror in the first half: all of them live across the middle, and the chains are long."""
    b = Builder()
    chain(b, random.Random(2), 60, lambda k: [j for j in dict.fromkeys((k - 1, 59 - k if k >= 30 else k - 1)) if j >= 0])
    return b.problem(10**9, can_offload=False, name="long-skips")


def star(loss_reads_all: bool, name: str) -> Problem:
    """60 values made from the batch alone, each used by one backward op; the loss reads a small part of each of them, or none."""
    b, draw = Builder(), random.Random(3)
    batch = b.storage("batch", 1_000, persistent=True, movable=False)
    made, parts = [], []
    for k in range(60):
        size = draw.randint(50_000, 150_000)
        made.append(b.storage(f"v{k}", size))
        parts.append(b.storage(f"part{k}", 10))
        b.op(f"f{k}", [batch], [made[k], parts[k]], size // 50 + draw.randint(-30, 30))
    gradient = b.storage("g_last", 1_000)
    b.op("loss", parts if loss_reads_all else [batch], [gradient], 500)
    for k in reversed(range(60)):
        new = b.storage(f"g{k}", 1_000, output=k == 0)
        b.op(f"b{k}", [gradient, made[k]], [new], 2_000, phase="backward")
        gradient = new
    return b.problem(10**9, can_offload=False, name=name)


def knapsack() -> Problem:
    """Values whose time to recompute is almost proportional to their bytes: which ones to keep is a subset sum, rounding is all there is."""
    return star(True, "knapsack")


def late_starts() -> Problem:
    """The loss depends on none of the values: in another order each is made once, just before its use, and nothing is run again."""
    return star(False, "late-starts")


def giant_in_the_middle() -> Problem:
    """Halfway through the forward one op needs most of the budget: what is live there must leave for a moment, though its use is near, and at the
    border of forward and backward nothing shows of it."""
    b = Builder()
    chain(b, random.Random(4), 50, lambda k: [j for j in (k - 1, k - 4) if j >= 0])
    ops = b.ops
    big = replace(ops[25].choices[0], workspace_bytes=900_000)
    ops[25] = replace(ops[25], choices=(big,))
    return b.problem(10**9, read_bytes_per_us=100.0, write_bytes_per_us=50.0, latency_us=100, interference=0.25, name="giant-in-the-middle")


def updated_at_once() -> Problem:
    """Each layer's weight is updated in place right after its backward: what needs its old value can't be made again after that, and weights may
    live on a slow disk."""
    b, draw = Builder(), random.Random(5)
    value = b.storage("batch", 50_000, persistent=True, movable=False)
    weights = [b.storage(f"w{k}", draw.randint(50_000, 200_000), persistent=True) for k in range(40)]
    inputs = []
    for k, weight in enumerate(weights):
        inputs.append(value)
        value = b.storage(f"v{k}", draw.randint(20_000, 120_000))
        b.op(f"f{k}", [inputs[k], weight], [value], draw.randint(1_000, 5_000))
    gradient = b.storage("g_last", 50_000)
    b.op("loss", [value], [gradient], 500)
    for k in reversed(range(40)):
        new, step = b.storage(f"g{k}", draw.randint(20_000, 60_000), output=k == 0), b.storage(f"gw{k}", b.storages[weights[k]].size_bytes)
        b.op(f"b{k}", [gradient, inputs[k], weights[k]], [new, step], draw.randint(2_000, 9_000), phase="backward")
        b.op(f"u{k}", [step], [], 200, writes=(weights[k],), phase="update")
        gradient = new
    return b.problem(10**9, read_bytes_per_us=100.0, write_bytes_per_us=50.0, latency_us=100, interference=0.25, name="updated-at-once")


def random_layers(seed: int, op_count: int, offload: bool) -> Problem:
    """The layered graphs of the solver tests; with `offload` a disk about as fast as recomputing."""
    problem = layered(seed, op_count)
    return replace(problem, can_offload=offload, interference=0.25 if offload else 0.0, name=f"layered-{op_count}{'-disk' if offload else ''}")


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ladder": ladder, "long-skips": long_skips, "knapsack": knapsack, "late-starts": late_starts,
    "giant-in-the-middle": giant_in_the_middle, "updated-at-once": updated_at_once, "layered-100": lambda: random_layers(11, 100, False),
    "layered-100-disk": lambda: random_layers(12, 100, True), "layered-250": lambda: random_layers(13, 250, False),
    "layered-500-disk": lambda: random_layers(14, 500, True),
}  # fmt: skip


def main(names: list[str]) -> None:
    for name in names or PROBLEMS:
        problem = PROBLEMS[name]()
        kept = problem.with_budget(replay(problem, keep_all(problem), enforce_budget=False).peak_bytes)
        (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(kept.to_json().encode(), 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
