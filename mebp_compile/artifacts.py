"""A plan as a folder: graph.json, problem.json, schedule.json, offsets.json, plan.json (numbers) and program.py. No torch.

`save_artifacts` writes each file whole or not at all, plan.json last, with the digests of the others: a folder whose saving was cut short
does not load. `load_artifacts` gives back equal objects; `check_artifacts` proves them again from nothing but the graph and the schedule.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import solvers
from mebp_compile import codegen
from mebp_compile.config import format_bytes
from mebp_compile.errors import DiskError, GraphError, OptionError
from mebp_compile.graph import PERSISTENT, Graph, from_json, to_json, verify
from mebp_compile.overhead import PAGE_BYTES, charged_sizes, constant_overhead
from mebp_compile.pages import Decommit
from mebp_compile.place import ALIGN, Life, Placement, lives, spans
from mebp_compile.planning import Plan, faults_us, tensor_peak
from mebp_compile.walk import walk
from mebp_compile.whole_file import write_whole
from solvers.baselines import keep_all

FORMAT_VERSION = 3
DATA = ("graph.json", "problem.json", "schedule.json", "offsets.json")
PLAN, PROGRAM = "plan.json", "program.py"
AGAIN = "save it again with step.save(folder), or plan again"
_IN_FILES_OF_THEIR_OWN = ("problem", "schedule", "report", "placement")


# --- save ---


def save_artifacts(folder: str | Path, graph: Graph, plan: Plan, code: str) -> Path:
    """Write the artifacts into `folder`, which is made if need be; older ones there are replaced. Raises DiskError."""
    folder = Path(folder)
    texts = {
        "graph.json": to_json(graph),
        "problem.json": plan.problem.to_json(),
        "schedule.json": plan.schedule.to_json(),
        "offsets.json": _offsets_text(plan.placement),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {**texts, PROGRAM: code, PLAN: _numbers_text(plan, texts)}.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise DiskError(f"can't save the artifacts in {folder}: {error.strerror}", "give a folder that can be written") from error
    return folder


def _offsets_text(placement: Placement) -> str:
    rows = [[step, storage, offset] for (step, storage), offset in sorted(placement.offsets.items())]
    data = {"columns": ["step", "storage", "offset"], "offsets": rows, "decommits": placement.decommits}
    return json.dumps(data, separators=(",", ":"))


def _numbers_text(plan: Plan, texts: dict[str, str]) -> str:
    """Every number of the plan that has no file of its own, one a line, and the digests of the files that have."""
    numbers = {field.name: getattr(plan, field.name) for field in fields(Plan) if field.name not in _IN_FILES_OF_THEIR_OWN}
    placement = {field.name: getattr(plan.placement, field.name) for field in fields(Placement) if field.name not in ("offsets", "decommits")}
    report = {field.name: getattr(plan.report, field.name) for field in fields(solvers.Report)}
    digests = {name: _digest(text) for name, text in texts.items()}
    data = {"format": FORMAT_VERSION, **numbers, "placement": placement, "report": report, "sha256": digests}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- load ---


def load_artifacts(folder: str | Path) -> tuple[Graph, Plan, str]:
    """(graph, plan, code) as they were saved. Raises OptionError for a folder without artifacts, GraphError for damaged or mixed ones."""
    folder = Path(folder)
    texts = {name: _read(folder, name) for name in (*DATA, PLAN, PROGRAM)}
    try:
        data = json.loads(texts[PLAN])
        if data.pop("format") != FORMAT_VERSION:
            raise GraphError(f"{folder / PLAN} has another format than {FORMAT_VERSION}", AGAIN)
        digests = data.pop("sha256")
        damaged = [name for name in DATA if digests[name] != _digest(texts[name])]
        if damaged:
            raise GraphError(
                f"{' and '.join(damaged)} in {folder} are not what {PLAN} was written with (edited, or saving was cut short)", AGAIN
            )
        return from_json(texts["graph.json"]), _plan(texts, data), texts[PROGRAM]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise GraphError(f"the artifacts in {folder} can't be read: {error!r}", AGAIN) from error


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise OptionError(f"{folder} has no {name}", "give a folder written by step.save, `mebp plan --out` or MEBP_DUMP") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DiskError(f"can't read {folder / name}: {error}", "check the folder and its permissions") from error


def _plan(texts: dict[str, str], data: dict[str, Any]) -> Plan:
    placement, report = data.pop("placement"), data.pop("report")
    places = json.loads(texts["offsets.json"])
    offsets = {(step, storage): offset for step, storage, offset in places["offsets"]}
    decommits = tuple(Decommit(*row) for row in places["decommits"])
    return Plan(
        problem=solvers.Problem.from_json(texts["problem.json"]),
        schedule=solvers.Schedule.from_json(texts["schedule.json"]),
        report=solvers.Report(**{key: _frozen(value) for key, value in report.items()}),
        placement=Placement(offsets, **{key: _frozen(value) for key, value in placement.items()}, decommits=decommits),
        **{key: _frozen(value) for key, value in data.items()},
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value


# --- check ---


def check_artifacts(folder: str | Path) -> str:
    """Prove a saved plan again, and say what was proven, a line for each claim.

    The graph holds its rules; the problem is this graph's; the schedule replays within the budget to the same report; no two lives share
    bytes of the arena; peaks and times are what plan.json says. Raises GraphError naming the first claim that is false.
    """
    graph, plan, code = load_artifacts(folder)
    return "\n".join(f"ok  {line}" for line in check_plan(graph, plan, code))


def check_plan(graph: Graph, plan: Plan, code: str) -> Iterator[str]:
    """The claims of `check_artifacts`, one by one, for objects in memory."""
    verify(graph)
    yield f"graph {graph.digest}: {len(graph.ops):,} ops on {len(graph.storages):,} storages, each value made once and before its use"
    _check_problem(graph, plan.problem)
    yield "problem: the same ops, reads, writes and sizes as the graph"
    _check_report(plan)
    yield (
        f"schedule: {len(plan.schedule.steps):,} steps replay to a peak of {plan.report.peak_bytes:,} bytes and {plan.report.time_us:,} us, "
        f"within the budget of {plan.problem.budget_bytes:,} bytes"
    )
    placed = _placed(graph, plan)
    _check_offsets(graph, plan, placed)
    yield f"offsets: {len(plan.placement.offsets):,} tensors share {plan.placement.arena_bytes:,} bytes of arena without overlap"
    if plan.placement.decommits:
        _check_decommits(graph, plan, placed)
        yield f"decommits: {len(plan.placement.decommits):,} times pages of the arena go back to the system, none that a tensor lies on"
    _check_footprint(graph, plan)
    yield f"peak: {plan.peak_bytes:,} bytes ({format_bytes(plan.peak_bytes)}) with arena and workspace, keep-all {plan.keep_all_bytes:,} bytes"
    yield _program_line(graph, plan, code)


def _check_problem(graph: Graph, problem: solvers.Problem) -> None:
    problem.validate()
    _equal("the number of ops", len(graph.ops), len(problem.ops))
    _equal("the number of storages", len(graph.storages), len(problem.storages))
    for op, planned in zip(graph.ops, problem.ops, strict=True):
        mine = (op.name, set(op.reads), set(op.creates), set(op.writes), op.rng)
        _equal(f"op {op.name}", mine, (planned.name, set(planned.choices[0].reads), set(planned.creates), set(planned.writes), planned.rng))
    moved = frozenset(index for index, block in enumerate(problem.storages) if block.movable)
    for storage, block, size_bytes in zip(graph.storages, problem.storages, charged_sizes(graph, moved), strict=True):
        unused = block.size_bytes == 0 and storage.role not in PERSISTENT
        _equal(f"storage {storage.name}", (storage.name, size_bytes), (block.name, size_bytes if unused else block.size_bytes))
    _equal("constant_bytes", constant_overhead(graph), problem.constant_bytes)


def _check_report(plan: Plan) -> None:
    try:
        report = solvers.replay(plan.problem, plan.schedule)
    except solvers.ScheduleError as error:
        raise GraphError(f"the schedule does not hold: {error}", AGAIN) from error
    for field in fields(solvers.Report):
        _equal(f"report.{field.name}", getattr(report, field.name), getattr(plan.report, field.name))


def _check_offsets(graph: Graph, plan: Plan, placed: Sequence[Life]) -> None:
    """Sweep over the schedule with the intervals that are in the arena now: a new one may not touch its neighbours."""
    events = sorted([(life.end, 0, life) for life in placed] + [(life.start, 1, life) for life in placed], key=lambda event: event[:2])
    now: list[tuple[int, int, int]] = []
    for _, begins, life in events:
        offset = plan.placement.offsets[life.start, life.storage]
        item = (offset, offset + life.size_bytes, life.storage)
        if not begins:
            now.remove(item)
            continue
        at = bisect_left(now, item)
        for other in now[max(0, at - 1) : at + 1]:
            if other[0] < item[1] and item[0] < other[1]:
                names = (graph.storages[life.storage].name, graph.storages[other[2]].name)
                raise GraphError(f"at step {life.start} {names[0]} and {names[1]} share bytes {max(item[0], other[0])} of the arena", AGAIN)
        insort(now, item)


def _check_decommits(graph: Graph, plan: Plan, placed: Sequence[Life]) -> None:
    """Each is of pages of the arena, before a step that there is, and meets no life of that step."""
    life, steps, last = spans(placed, plan.placement.offsets), len(plan.schedule.steps), 0
    for step, low, high in plan.placement.decommits:
        if not (last <= step < steps and 0 <= low < high < plan.placement.arena_bytes + PAGE_BYTES and low % PAGE_BYTES == high % PAGE_BYTES == 0):
            raise GraphError(f"bytes {low} to {high} given back at step {step} are no pages of the arena, or out of order", AGAIN)
        last = step
        for number in np.flatnonzero((life.start <= step) & (step < life.end) & (life.low < high) & (low < life.high)).tolist():
            raise GraphError(f"at step {step} pages of {graph.storages[placed[number].storage].name} are given back while it lives", AGAIN)


def _placed(graph: Graph, plan: Plan) -> list[Life]:
    """The lives that have an offset, each aligned and inside the arena; every offset belongs to a life that may lie there."""
    every = {(life.start, life.storage): life for life in lives(graph, plan.problem, plan.schedule)}
    result = []
    for key, offset in plan.placement.offsets.items():
        life = every.get(key)
        if life is None or not life.fits_arena:
            raise GraphError(
                f"offsets.json places storage {key[1]} made at step {key[0]}, which is not made there or can't lie in the arena", AGAIN
            )
        if offset < 0 or offset % ALIGN or offset + life.size_bytes > plan.placement.arena_bytes:
            raise GraphError(
                f"{graph.storages[key[1]].name} at offset {offset} is not aligned to {ALIGN} bytes or ends outside of the arena", AGAIN
            )
        if life.size_bytes:
            result.append(life)
    return result


def _check_footprint(graph: Graph, plan: Plan) -> None:
    peak = max(walk(graph, plan).footprint, default=plan.problem.constant_bytes + plan.placement.arena_bytes)
    _equal("peak_bytes", peak, plan.peak_bytes)
    _equal("placement.peak_bytes", peak, plan.placement.peak_bytes)
    if peak > plan.problem.budget_bytes:
        raise GraphError(f"the footprint is {peak:,} bytes, the budget {plan.problem.budget_bytes:,}", AGAIN)
    _equal("tensor_bytes", tensor_peak(graph, plan.problem, plan.schedule), plan.tensor_bytes)
    _equal("faults_us", faults_us(graph, plan.problem, plan.schedule, plan.placement), plan.faults_us)
    kept = solvers.replay(plan.problem, keep_all(plan.problem), enforce_budget=False)
    _equal("keep_all_bytes and keep_all_time_us", (kept.peak_bytes, kept.time_us), (plan.keep_all_bytes, plan.keep_all_time_us))


def _program_line(graph: Graph, plan: Plan, code: str) -> str:
    try:
        compile(code, PROGRAM, "exec")
    except SyntaxError as error:
        raise GraphError(f"{PROGRAM} is not Python: {error}", AGAIN) from error
    same = code == codegen.generate(graph, plan)
    return f"program: {len(code.splitlines()):,} lines, {'what this plan generates' if same else 'edited: not what this plan generates'}"


def _equal(what: str, found: object, said: object) -> None:
    if found != said:
        short = [text if len(text) <= 200 else f"{text[:200]}..." for text in (repr(found), repr(said))]
        raise GraphError(f"{what}: the plan says {short[1]}, checking gives {short[0]}", AGAIN)


__all__: Sequence[str] = ["check_artifacts", "check_plan", "load_artifacts", "save_artifacts"]
