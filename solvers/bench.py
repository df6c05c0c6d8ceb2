"""The instance suite: frozen problems, the best value and bound known of each, and what the solver of today makes of them.

A folder holds problems (<name>.json or <name>.json.gz) and best.json, one entry for each problem and budget. `run` solves an entry and
compares; `updated` takes over what is better, and nothing else. The records are history: only a better answer changes them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from solvers.baselines import keep_all
from solvers.check import replay
from solvers.problem import Problem, read_problem
from solvers.solve import smallest, solve

FORMAT_VERSION = 1
TABLE = "best.json"
TOLERANCE = 0.005  # how much worse than the record a value or a bound may be before it counts as a regression
SEED = 0


class BenchError(ValueError):
    """The suite can't be run or recorded. The message names the instance and says what to try next."""


@dataclass(frozen=True, slots=True)
class Record:
    """The best answer known with one effort: its time, the seconds and the limit it was found with, what found it, and at which commit."""

    time_us: int
    seconds: float
    limit_s: float
    method: str
    commit: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A problem under a budget. file: beside best.json. bound_us: the best lower bound known, of any schedule. records: by effort."""

    name: str
    file: str
    budget_bytes: int
    bound_us: int = 0
    records: Mapping[str, Record] = field(default_factory=dict)

    @property
    def best_us(self) -> int | None:
        """The least time known, whatever the effort; None before the first record."""
        return min((record.time_us for record in self.records.values()), default=None)


@dataclass(frozen=True, slots=True)
class Row:
    """One instance as solved now, beside what was known of it."""

    entry: Entry
    effort: str
    found: Record
    bound_us: int

    @property
    def known_us(self) -> int | None:
        """The record with this effort."""
        record = self.entry.records.get(self.effort)
        return record.time_us if record else None

    @property
    def best_bound_us(self) -> int:
        return max(self.bound_us, self.entry.bound_us)

    @property
    def gap(self) -> float:
        """What the time found is above the best bound known."""
        return self.found.time_us / self.best_bound_us - 1 if self.best_bound_us else 0.0

    def faults(self) -> list[str]:
        """What is wrong with the row, in words: a value worse than the record, or a bound above a schedule that exists."""
        result = []
        if self.known_us is not None and self.found.time_us > self.known_us * (1 + TOLERANCE):
            result.append(f"{100 * (self.found.time_us / self.known_us - 1):.2f} % slower than the record of {self.known_us} us")
        least = min(filter(None, (self.found.time_us, self.entry.best_us)))
        if self.best_bound_us > least:
            result.append(f"the bound of {self.best_bound_us} us is above a schedule of {least} us: one of the two is wrong")
        return result


def read_entries(folder: Path) -> list[Entry]:
    """The entries of a folder's best.json. Raises BenchError."""
    try:
        data = json.loads((folder / TABLE).read_text())
        if data["format"] != FORMAT_VERSION:
            raise BenchError(f"{folder / TABLE} has format {data['format']!r}, not {FORMAT_VERSION}: take it from the same version")
        return [_entry(item) for item in data["instances"]]
    except FileNotFoundError:
        raise BenchError(f"{folder} has no {TABLE}: name the folder of the instances with --instances") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BenchError(f"{folder / TABLE} is no table of instances: {error!r}") from error


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(**{**data, "records": {effort: Record(**record) for effort, record in data["records"].items()}})


def write_entries(folder: Path, entries: Iterable[Entry]) -> None:
    """best.json, sorted by name, readable in a diff."""
    ordered = sorted((asdict(entry) for entry in entries), key=lambda item: str(item["name"]))
    path = folder / TABLE
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps({"format": FORMAT_VERSION, "instances": ordered}, indent=1) + "\n")
    fresh.replace(path)


def problem_of(folder: Path, entry: Entry) -> Problem:
    return read_problem(folder / entry.file).with_budget(entry.budget_bytes)


def run(folder: Path, entry: Entry, effort: str, time_limit_s: float) -> Row:
    """Solve one instance. Raises Infeasible, ProblemError, OSError."""
    problem = problem_of(folder, entry)
    started = time.monotonic()
    solution = solve(problem, effort, time_limit_s, SEED)
    seconds = round(time.monotonic() - started, 1)
    found = Record(solution.report.time_us, seconds, time_limit_s, solution.method, commit_of(Path(__file__).parent))
    return Row(entry, effort, found, solution.bound_us)


def updated(row: Row) -> Entry:
    """The entry with what the row improves. Raises BenchError where a bound and a value contradict each other: neither is then recorded."""
    entry = replace(row.entry, bound_us=row.best_bound_us)
    known = row.entry.records.get(row.effort)
    if known is None or (row.found.time_us, row.found.seconds) < (known.time_us, known.seconds):
        entry = replace(entry, records={**entry.records, row.effort: row.found})
    if entry.best_us is not None and entry.bound_us > entry.best_us:
        raise BenchError(f"{entry.name}: {'; '.join(row.faults())}; nothing was recorded, find out which with `python -m solvers check`")
    return entry


def new_entries(path: Path, shares: Iterable[float]) -> list[Entry]:
    """Entries of a problem at budgets that lie between the smallest found (0 %) and what keep-all needs (100 %)."""
    problem = read_problem(path)
    least = smallest(problem)[0]
    most = replay(problem, keep_all(problem), enforce_budget=False).peak_bytes
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    return [Entry(f"{stem}@{100 * share:g}%", path.name, int(least + share * (most - least))) for share in shares]


def commit_of(folder: Path) -> str:
    """The short commit that last changed the folder, with "+" where it differs from that; "unknown" outside of git."""
    commit = _git(folder, "log", "-1", "--format=%h", "--", ".")
    return f"{commit}{'+' if _git(folder, 'status', '--porcelain', '--', '.') else ''}" if commit else "unknown"


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- what is printed ---

HEAD = f"{'instance':32} {'ops':>6} {'budget':>9} {'ms':>10} {'record':>10} {'bound':>10} {'gap':>7} {'seconds':>8}  method"


def machine_line() -> str:
    """Where the seconds come from."""
    load, commit = os.getloadavg()[0], commit_of(Path(__file__).parent)
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}, commit {commit}"


def row_line(row: Row, op_count: int) -> str:
    known = "-" if row.known_us is None else f"{row.known_us / 1e3:.2f}"
    mark = " !" if row.faults() else (" improved" if row.known_us is not None and row.found.time_us < row.known_us else "")
    return (
        f"{row.entry.name:32} {op_count:6} {row.entry.budget_bytes / 1e6:7.1f}MB {row.found.time_us / 1e3:10.2f} {known:>10} "
        f"{row.best_bound_us / 1e3:10.2f} {100 * row.gap:6.2f}% {row.found.seconds:8.1f}  {row.found.method}{mark}"
    )
