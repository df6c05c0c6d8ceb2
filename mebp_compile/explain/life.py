"""The life of one storage, value or op: where it comes from, what the schedule does with it, and what the other choice would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from mebp_compile.config import format_bytes
from mebp_compile.errors import OptionError
from mebp_compile.explain.words import USERS_SHOWN, close_matches, count, duration, more, outside, place_of
from mebp_compile.graph import Graph, describe, inputs_of
from mebp_compile.place import Life
from mebp_compile.planning import Plan
from mebp_compile.walk import Walk, forward_lines, group_of, source_line, walk
from solvers import Free, Prefetch, Run


def why(graph: Graph, plan: Plan, name: str) -> str:
    """The life of one storage, value or op: who makes and uses it, what the schedule does with it and why that pays.

    `name` may also be the path of a parameter ("layers.0.mlp.up_proj.weight"). Raises OptionError, with close matches, if there is none.
    """
    seen, op, storage = walk(graph, plan), _find_op(graph, name), _find_storage(graph, name)
    if storage is None and op is None:
        known = [*(item.name for item in graph.storages), *(item.name for item in graph.values), *(item.name for item in graph.ops)]
        raise OptionError(f"no storage, value or op is called {name!r}", close_matches(name, list(dict.fromkeys(known))))
    text = _why_op(graph, plan, op, seen) if op is not None else []
    if storage is not None:
        text += ([""] if text else []) + _why_storage(graph, plan, storage, seen)
    return "\n".join(text)


def _find_op(graph: Graph, name: str) -> int | None:
    return next((index for index, op in enumerate(graph.ops) if op.name == name), None)


def _find_storage(graph: Graph, name: str) -> int | None:
    """By the name of the storage, of a value in it, or the end of its source."""
    named = {storage.name: index for index, storage in enumerate(graph.storages)}
    if name in graph.value:
        return graph.value[name].storage
    if name in named:
        return named[name]
    found = [index for index, item in enumerate(graph.storages) if f".{item.source.split(':')[-1]}".endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _why_op(graph: Graph, plan: Plan, index: int, seen: Walk) -> list[str]:
    op = graph.ops[index]
    costs = plan.problem.ops[index].choices
    runs = [(number, step.choice) for number, step in enumerate(plan.schedule.steps) if isinstance(step, Run) and step.op == index]
    workspace = f", workspace {format_bytes(costs[runs[0][1]].workspace_bytes)}" if runs and costs[runs[0][1]].workspace_bytes else ""
    again = f"; {len(runs) - 1} of these are recomputes" if len(runs) > 1 else ""
    return [
        f"op {op.name}: {op.target} ({place_of(op)})",
        f"  line      {source_line(op, forward_lines(graph)) or 'not known'}",
        f"  takes     {', '.join(inputs_of(op)) or 'nothing'}",
        f"  makes     {', '.join(describe(graph.value[output]) for output in op.outputs if output) or 'nothing new'}",
        *([f"  modifies  {', '.join(graph.storages[storage].name for storage in op.writes)}"] if op.writes else []),
        f"  runs      at {', '.join(f'step {number}' for number, _ in runs)}{again}; "
        f"{duration(costs[runs[0][1]].time_us) if runs else '-'} each{workspace}",
    ]


def _why_storage(graph: Graph, plan: Plan, index: int, seen: Walk) -> list[str]:
    storage, made = graph.storages[index], graph.producer.get(index)
    values = [value for value in graph.values if value.storage == index]
    kind = group_of(graph, index) if storage.role == "activation" else storage.role
    text = [f"storage {storage.name}: {format_bytes(storage.size_bytes)} ({storage.size_bytes:,} bytes), {kind}"]
    if made is not None:
        op = graph.ops[made]
        text.append(f"  made by   {op.name}: {op.target} ({place_of(op)}), {duration(plan.problem.ops[made].choices[0].time_us)}")
        text.append(f"  line      {source_line(op, forward_lines(graph)) or 'not known'}")
    else:
        text.append(f"  exists    before the step, as {storage.source or storage.role}")
    text.append(f"  values    {', '.join(map(describe, values[:USERS_SHOWN]))}{more(len(values))}")
    text.append(f"  used by   {_users(graph, index)}")
    text.append(f"  home      {_home(graph, plan, index)}")
    text += [f"  {line}" for line in _story(graph, plan, index, seen)]
    return text + [f"  otherwise {line}" for line in _otherwise(graph, plan, index, seen)]


def _users(graph: Graph, index: int) -> str:
    users = [f"{op.name} ({op.phase}{', in place' if index in op.writes else ''})" for op in graph.ops if index in (*op.reads, *op.writes)]
    return f"{', '.join(users[:USERS_SHOWN])}{more(len(users))}" if users else "no op"


def _home(graph: Graph, plan: Plan, index: int) -> str:
    problem = plan.problem.storages[index]
    if problem.persistent:
        resident = not problem.movable or index in plan.schedule.resident
        return "memory, before and after the step" if resident else f"{outside(graph)}: in memory only while it is used"
    if index in {graph.storage_of(name) for _, name in graph.results}:
        return "a result of the step: it stays with the caller, outside of the arena"
    return "made and dropped within the step"


def _story(graph: Graph, plan: Plan, index: int, seen: Walk) -> list[str]:
    """One line for each thing the schedule does with the storage."""
    lines = []
    transfers = {item.issued: item for item in seen.clocks.transfers if item.storage == index}
    for life in sorted((life for life in seen.lives if life.storage == index), key=lambda life: life.start):
        lines.append(f"{_span(life):14} {_birth(graph, plan, life, seen)}; kept {_where(plan, life)}")
    for issued, item in transfers.items():
        wait = seen.clocks.end_us[item.waited] - seen.clocks.start_us[item.waited]
        verb = f"{'written to' if item.write else 'read from'} {outside(graph)}"
        lines.append(
            f"{f'step {issued}':14} {verb} ({duration(item.end_us - item.start_us)}), complete at step {item.waited}, waits {duration(wait)}"
        )
    for number, step in enumerate(plan.schedule.steps):
        if isinstance(step, Free) and step.storage == index:
            lines.append(f"{f'step {number}':14} freed")
    return sorted(lines, key=_first_number)


def _first_number(line: str) -> int:
    digits = "".join(letter if letter.isdigit() else " " for letter in line[:14]).split()
    return int(digits[0]) if digits and not line.startswith("from the start") else -1


def _span(life: Life) -> str:
    return "from the start" if life.start < 0 else f"step {life.start}-{life.end}"


def _birth(graph: Graph, plan: Plan, life: Life, seen: Walk) -> str:
    if life.start < 0:
        return "it is there before the step"
    step = plan.schedule.steps[life.start]
    if isinstance(step, Prefetch):
        return f"fetched from {outside(graph)}"
    assert isinstance(step, Run)
    if not seen.again[life.start]:
        return f"made by {graph.ops[step.op].name}"
    chain = _chain(plan, life.start, seen)
    cost = sum(plan.problem.ops[op].choices[0].time_us for op in chain)
    return f"recomputed by {count(len(chain), 'op')} in {duration(cost)} ({', '.join(graph.ops[op].name for op in chain[-4:])})"


def _chain(plan: Plan, number: int, seen: Walk) -> list[int]:
    """Ops of the run of consecutive recomputes that ends at step `number` and that its op needs."""
    steps, problem = plan.schedule.steps, plan.problem
    last = steps[number]
    assert isinstance(last, Run)
    chain, needed = [last.op], {*problem.ops[last.op].choices[last.choice].reads, *problem.ops[last.op].writes}
    while number > 0 and (not isinstance(steps[number - 1], Run) or seen.again[number - 1]):
        number -= 1
        step = steps[number]
        if isinstance(step, Run) and needed & {*problem.ops[step.op].creates, *problem.ops[step.op].writes}:
            chain.append(step.op)
            needed |= {*problem.ops[step.op].choices[step.choice].reads}
    return chain[::-1]


def _where(plan: Plan, life: Life) -> str:
    offset = plan.placement.offsets.get((life.start, life.storage))
    if offset is None:
        return "by the allocator" if life.start >= 0 else "where the user's objects hold it"
    return f"at arena bytes {offset:,} to {offset + life.size_bytes:,}"


def _otherwise(graph: Graph, plan: Plan, index: int, seen: Walk) -> list[str]:
    """What the other choice would cost: keeping what is dropped, dropping what is kept."""
    spans = sorted((life.start, life.end) for life in seen.lives if life.storage == index)
    gaps = [(end, start) for (_, end), (start, _) in pairwise(spans)]
    size = plan.problem.storages[index].size_bytes
    lines = []
    for start, end in gaps:
        worst = max(range(start, end), key=lambda number: seen.footprint[number])
        over = seen.footprint[worst] + size - plan.problem.budget_bytes
        verdict = f"{format_bytes(over)} over the budget" if over > 0 else f"{format_bytes(-over)} under the budget"
        lines.append(f"kept through steps {start}-{end}, it would put step {worst} {verdict}")
    return lines or [_if_dropped(graph, plan, index, spans)]


def _if_dropped(graph: Graph, plan: Plan, index: int, spans: Sequence[tuple[int, int]]) -> str:
    storage, uses = plan.problem.storages[index], _uses(plan, index)
    if storage.persistent and not storage.movable:
        return "it can't be dropped: it is there before the step and not movable"
    if len(uses) < 2 or not spans:
        return "it could not leave memory earlier: it is used once"
    start, end = max(pairwise(uses), key=lambda pair: pair[1] - pair[0])
    ways = " or ".join(_ways_back(graph, plan, index)) or "more than the solver may spend: it can be neither recomputed nor moved"
    return f"dropping it between its uses at steps {start} and {end} would free {format_bytes(storage.size_bytes)} there and cost {ways}"


def _uses(plan: Plan, index: int) -> list[int]:
    """Schedule steps whose op reads, writes or creates the storage."""
    ops = plan.problem.ops
    return [
        number
        for number, step in enumerate(plan.schedule.steps)
        if isinstance(step, Run) and index in (*ops[step.op].choices[step.choice].reads, *ops[step.op].writes, *ops[step.op].creates)
    ]


def _ways_back(graph: Graph, plan: Plan, index: int) -> list[str]:
    """How a dropped storage could come back, with its price."""
    problem, storage, made = plan.problem, plan.problem.storages[index], graph.producer.get(index)
    ways = []
    if made is not None and problem.ops[made].rerunnable and not any(index in op.writes for op in graph.ops):
        ways.append(f"{duration(min(choice.time_us for choice in problem.ops[made].choices))} or more to recompute")
    if storage.movable and problem.can_offload:
        write_us, read_us = (math.ceil(storage.size_bytes / speed) for speed in (problem.write_bytes_per_us, problem.read_bytes_per_us))
        ways.append(f"{duration(2 * problem.latency_us + write_us + read_us)} of transfers")
    return ways
