"""Command line: `python -m solvers solve problem.json --budget 60%`, and check, compare, convert, pack and bench."""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from solvers import bench
from solvers.baselines import keep_all
from solvers.check import Report, ScheduleError, replay
from solvers.compare import comparison
from solvers.fitting import fit_arena
from solvers.node_link import problem_of
from solvers.offsets import Lifespan, lifespans, max_load_bytes, place
from solvers.picture import picture
from solvers.problem import Problem, ProblemError, read_problem
from solvers.schedule import Schedule, format, format_bytes
from solvers.solve import EFFORTS, Infeasible, Solution, solve

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text: str, problem: Problem) -> int:
    """Bytes from '123456', '256MB', '1.5GiB', or '60%' (of the keep-all peak). Raises ValueError for other text."""
    match = re.fullmatch(r"([0-9.]+)\s*(%|[KMG]?i?B|)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"budget {text!r} is not understood: write bytes, 256MB, 1.5GiB or 60%")
    number, unit = float(match.group(1)), match.group(2).upper()
    if unit == "%":
        return int(replay(problem, keep_all(problem), enforce_budget=False).peak_bytes * number / 100)
    return int(number * _UNITS[unit])


def summary(problem: Problem, report: Report) -> str:
    """A few lines about a replayed schedule."""
    where = f"step {report.peak_step}" if report.peak_step >= 0 else "the start"
    return "\n".join([
        f"peak     {format_bytes(report.peak_bytes)} of {format_bytes(problem.budget_bytes)}, at {where}",
        f"time     {report.time_us / 1e6:.6f} s, {report.stall_us / 1e6:.6f} s of it waiting for the disk",
        f"runs     {report.runs}, {report.recomputes} of them recomputes",
        f"disk     {format_bytes(report.written_bytes)} written in {report.offloads} offloads, "
        f"{format_bytes(report.read_bytes)} read in {report.prefetches} prefetches",
    ])  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m solvers", description="Schedule a training step within a budget.")
    commands = parser.add_subparsers(dest="command", required=True)
    solving = commands.add_parser("solve", help="find a schedule")
    solving.add_argument("problem", type=Path)
    solving.add_argument("--budget", help="bytes, 256MB, 1.5GiB, or a percentage of the keep-all peak")
    solving.add_argument("--effort", choices=EFFORTS, default="balanced")
    solving.add_argument("--time-limit", type=float, default=20.0, help="seconds")
    solving.add_argument("--seed", type=int, default=0)
    solving.add_argument("--out", type=Path, help="write the schedule here as JSON")
    solving.add_argument("--arena", action="store_true", help="move transfers until all storages fit in one arena, and take that schedule")
    solving.add_argument("--steps", action="store_true", help="print every step")
    solving.add_argument("--picture", action="store_true", help="draw memory over the steps, and what is run again, written and read")
    checking = commands.add_parser("check", help="replay a schedule")
    checking.add_argument("problem", type=Path)
    checking.add_argument("schedule", type=Path)
    checking.add_argument("--budget", help="instead of the problem's")
    comparing = commands.add_parser("compare", help="fixed and tuned schedules, each beside what is solved in the same bytes")
    comparing.add_argument("problem", type=Path)
    comparing.add_argument("--budgets", default="50%,25%,15%", help="of the tuned ones")
    comparing.add_argument("--effort", choices=EFFORTS, default="balanced")
    comparing.add_argument("--time-limit", type=float, default=20.0, help="seconds for each line")
    converting = commands.add_parser("convert", help="write a published graph (networkx node-link JSON with costs) as a problem")
    converting.add_argument("graph", type=Path)
    converting.add_argument("problem", type=Path)
    packing = commands.add_parser("pack", help="offsets in one arena for blocks that live for a while")
    packing.add_argument("blocks", type=Path, help="a CSV file with the columns id, lower, upper, size: in memory during [lower, upper)")
    packing.add_argument("--enough", type=int, default=0, metavar="BYTES", help="an arena that need not be smaller; otherwise the smallest")
    packing.add_argument("--work", type=int, default=64, metavar="N", help="when to stop, in billions of looks at a block: about a second each")
    _add_bench(commands.add_parser("bench", help="run the instance suite against the best values known"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", type=Path, default=Path("tests/instances"), help="folder of problems and best.json")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="instances whose name contains it; may be repeated")
    parser.add_argument("--effort", choices=EFFORTS, default="balanced")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each instance")
    parser.add_argument("--update", action="store_true", help="write what is better into best.json")
    parser.add_argument("--add", type=Path, metavar="PROBLEM", help="first add entries of this problem, which lies in the folder")
    parser.add_argument("--shares", default="0.1,0.3,0.6", help="of --add: budgets between the smallest found (0) and keep-all's (1)")


def _bench(arguments: argparse.Namespace) -> int:
    """Run the suite, a line each; 1 where a value is worse than the record or a bound crosses a value."""
    folder: Path = arguments.instances
    if arguments.add:
        _add_entries(folder, arguments.add, [float(share) for share in arguments.shares.split(",")])
    entries = {entry.name: entry for entry in bench.read_entries(folder)}
    chosen = [name for name in entries if not arguments.only or any(text in name for text in arguments.only)]
    if not chosen:
        raise bench.BenchError(f"no instance is called so: {', '.join(arguments.only)}; there are {', '.join(entries)}")
    print(f"{bench.machine_line()}\n{bench.HEAD}", flush=True)
    faults = []
    for name in chosen:
        row = bench.run(folder, entries[name], arguments.effort, arguments.time_limit)
        faults += [f"{name}: {fault}" for fault in row.faults()]
        print(bench.row_line(row, len(bench.problem_of(folder, row.entry).ops)), flush=True)
        if arguments.update:
            written = {entry.name: entry for entry in bench.read_entries(folder)}  # by now perhaps by another run too
            bench.write_entries(folder, (written | {name: bench.updated(row)}).values())
    print("\n".join(faults) or "nothing is worse than its record")
    return 1 if faults else 0


def _add_entries(folder: Path, problem: Path, shares: list[float]) -> None:
    """Entries of the problem that best.json does not have yet; an existing one keeps its budget."""
    if problem.resolve().parent != folder.resolve():
        raise bench.BenchError(f"{problem} is not in {folder}: put it there first")
    entries = {entry.name: entry for entry in (bench.read_entries(folder) if (folder / bench.TABLE).exists() else [])}
    bench.write_entries(folder, ({entry.name: entry for entry in bench.new_entries(problem, shares)} | entries).values())


def _pack(arguments: argparse.Namespace) -> str:
    """Place the blocks of a file; what to print."""
    with arguments.blocks.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"lower", "upper", "size"} <= rows[0].keys():
        raise ValueError(f"{arguments.blocks} has no columns lower, upper and size")
    items = [Lifespan(k, int(row["lower"]), int(row["upper"]), int(row["size"]), align=1) for k, row in enumerate(rows)]
    started = time.perf_counter()
    placement = place(items, enough_bytes=arguments.enough, work=arguments.work * 10**9)
    seconds = time.perf_counter() - started
    return f"{len(items)} blocks in {placement.arena_bytes:,} bytes; none need less than {placement.lower_bound_bytes:,}; {seconds:.2f} s"


def _in_one_arena(problem: Problem, solution: Solution) -> tuple[Solution, list[str]]:
    """The solution with its transfers moved, and what to print of its arena."""
    fitted = fit_arena(problem, solution.schedule)
    arena, solved, own = fitted.placement.arena_bytes, max_load_bytes(lifespans(problem, solution.schedule)), fitted.placement.lower_bound_bytes
    above, above_own = 100 * (arena / solved - 1), 100 * (arena / own - 1)
    slower = 100 * (fitted.time_us / solution.report.time_us - 1)
    line = f"arena    {arena:,} bytes, {above:.3f} % above the most at once as solved, {above_own:.3f} % above its own; step {slower:+.2f} %"
    return replace(solution, schedule=fitted.schedule, report=replay(problem, fitted.schedule)), [line]


def _order_gap(solution: Solution) -> Iterator[str]:
    """A line about the bound of base order, where there is one and it is not the same."""
    bound_us, time_us = solution.order_bound_us, solution.report.time_us
    if bound_us and bound_us != solution.bound_us:
        yield f"         {100 * (time_us / bound_us - 1):.2f} % above the bound of {bound_us / 1e6:.6f} s (first runs in base order)"


def _convert(arguments: argparse.Namespace) -> str:
    """Write a graph as a problem; what to print."""
    problem = problem_of(arguments.graph.read_text())
    arguments.problem.write_text(problem.to_json())
    peak = replay(problem, keep_all(problem)).peak_bytes
    return f"{len(problem.ops)} ops in {arguments.problem}; keeping everything needs {peak:,} units of memory"


def _compare(arguments: argparse.Namespace) -> int:
    """Print the table line by line: it takes a while."""
    problem = read_problem(arguments.problem)
    budgets = [parse_budget(text, problem) for text in arguments.budgets.split(",")]
    for line in comparison(problem, budgets, arguments.effort, arguments.time_limit):
        print(line, flush=True)
    return 0


def _run(arguments: argparse.Namespace) -> str:
    """Carry out the command; returns what to print."""
    if arguments.command == "pack":
        return _pack(arguments)
    if arguments.command == "convert":
        return _convert(arguments)
    problem = read_problem(arguments.problem)
    if arguments.budget:
        problem = problem.with_budget(parse_budget(arguments.budget, problem))
    if arguments.command == "check":
        return summary(problem, replay(problem, Schedule.from_json(arguments.schedule.read_text())))
    solution = solve(problem, arguments.effort, arguments.time_limit, arguments.seed)
    solution, arena = _in_one_arena(problem, solution) if arguments.arena else (solution, [])
    if arguments.out:
        arguments.out.write_text(solution.schedule.to_json())
    lines = [
        summary(problem, solution.report),
        f"gap      {100 * solution.gap:.2f} % above the bound of {solution.bound_us / 1e6:.6f} s (any schedule)",
        *_order_gap(solution),
        f"method   {solution.method}",
        *arena,
    ]
    lines += [picture(problem, solution.schedule)] if arguments.picture else []
    return "\n".join(lines + ([format(solution.schedule, problem)] if arguments.steps else []))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr: infeasible, broken schedule, or bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "bench":
            return _bench(parsed)
        if parsed.command == "compare":
            return _compare(parsed)
        print(_run(parsed))
    except (Infeasible, ProblemError, ScheduleError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
