"""explain, why and summary say what the plan does, with the plan's own numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Planned, chain, costs_by_bytes, planned, random_plan, roomy, tight

from mebp_compile.config import format_bytes
from mebp_compile.errors import GraphError, OptionError
from mebp_compile.explain import explain, summary, why
from mebp_compile.explain.words import duration
from mebp_compile.place import lives
from mebp_compile.walk import GROUPS, clocks, forward_lines, group_of, source_line, walk
from solvers import Free, Offload, Prefetch, Run


def runs_of(step: Planned) -> Counter[int]:
    return Counter(item.op for item in step.plan.schedule.steps if isinstance(item, Run))


def table(text: str) -> dict[str, list[str]]:
    """The rows of the layer table: label -> cells."""
    lines = text[text.index("outside the arena") :].splitlines()[1:]
    rows = [re.split(r"  +", line.strip()) for line in lines[: lines.index("")]]
    return {row[0]: row[1:] for row in rows}


def test_summary_gives_the_plans_numbers() -> None:
    """Budget, peak, keep-all, recomputes and bytes moved in the summary are those of the plan."""
    step = tight(offload=True)
    text, plan = summary(step.graph, step.plan), step.plan
    assert plan.report.recomputes > 0
    assert plan.report.offloads > 0
    for size in (plan.problem.budget_bytes, plan.peak_bytes, plan.keep_all_bytes, plan.report.written_bytes, plan.report.read_bytes):
        assert format_bytes(size) in text
    assert f"{plan.report.recomputes} recompute" in text
    assert f"at step {plan.report.peak_step}" in text


def test_summary_of_a_roomy_plan_says_that_nothing_is_done() -> None:
    """Without recompute and offload the summary says so."""
    assert "nothing is recomputed or moved" in summary(roomy().graph, roomy().plan)


@pytest.mark.parametrize("step", [roomy(), tight(True), tight(False)], ids=["roomy", "offload", "recompute"])
def test_layer_table_adds_up_to_the_plan(step: Planned) -> None:
    """The total row has every op, every recompute, all that was written and the time of all runs."""
    rows = table(explain(step.graph, step.plan))
    ops, _, again, offloaded, _, time = rows["all"]
    assert int(ops) == len(step.graph.ops) == sum(int(row[0]) for label, row in rows.items() if label != "all")
    assert int(again.split()[0].replace("-", "0")) == step.plan.report.recomputes
    assert offloaded == (format_bytes(step.plan.report.written_bytes) if step.plan.report.offloads else "-")
    problem = step.plan.problem
    assert time == duration(sum(problem.ops[s.op].choices[s.choice].time_us for s in step.plan.schedule.steps if isinstance(s, Run)))


def test_peak_section_lists_what_is_live_there() -> None:
    """The parts at the peak are the live bytes by kind, and the largest live storage comes first."""
    step = tight(offload=False)
    seen, at = walk(step.graph, step.plan), step.plan.report.peak_step
    text = explain(step.graph, step.plan)
    line = next(line for line in text.splitlines() if line.startswith("live at the peak"))
    for name in GROUPS:
        assert (f"{name} {format_bytes(seen.live[name][at])}" in line) == (seen.live[name][at] > 0)
    assert format_bytes(step.plan.report.peak_bytes) in line
    first = text[text.index(line) :].splitlines()[2]
    assert step.graph.storages[seen.living(at)[0].storage].name in first
    assert "modeling_qwen2.py:" in text


def test_module_filter_shows_that_module_only() -> None:
    """With module= every row lies inside it, and its ops are those of the graph."""
    step = tight(offload=False)
    rows = table(explain(step.graph, step.plan, module="layers.0.mlp"))
    labels = [label for label in rows if label != "all"]
    assert labels
    assert all(label == "layers.0.mlp" or label.startswith("layers.0.mlp.") for label in labels)
    assert int(rows["all"][0]) == sum(1 for op in step.graph.ops if ".layers.0.mlp" in op.module)


def test_unknown_module_names_close_ones() -> None:
    """A module without ops is an OptionError that suggests modules."""
    with pytest.raises(OptionError, match=r"layers\.0\.mlp"):
        explain(roomy().graph, roomy().plan, module="layers.0.mpl")


def test_kept_bytes_of_a_chain_are_its_hidden_states() -> None:
    """With room for everything each layer keeps exactly the hidden state that the backward reads."""
    graph = chain(4)
    step = planned(graph, costs_by_bytes(graph), 10**9, offload=False)
    rows = table(explain(graph, step.plan))
    sizes = {item.name: item.size_bytes for item in graph.storages}
    assert [rows[f"layers.{i}"][1] for i in range(4)] == [format_bytes(sizes[f"hidden_{i}"]) for i in range(4)]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_why_tells_the_life_of_every_storage(seed: int) -> None:
    """Every life appears with its steps, every Free and Offload with its step, and every re-creation as a recompute or a fetch."""
    step = random_plan(seed)
    every = lives(step.graph, step.plan.problem, step.plan.schedule)
    for index, storage in enumerate(step.graph.storages):
        text = why(step.graph, step.plan, storage.name)
        mine = [life for life in every if life.storage == index]
        for life in mine:
            assert ("from the start" if life.start < 0 else f"step {life.start}-{life.end} ") in text
        frees = [n for n, s in enumerate(step.plan.schedule.steps) if isinstance(s, Free) and s.storage == index]
        assert re.findall(r"step (\d+) +freed", text) == [str(n) for n in frees]
        offloads = [n for n, s in enumerate(step.plan.schedule.steps) if isinstance(s, Offload) and s.storage == index]
        assert re.findall(r"step (\d+) +written to disk", text) == [str(n) for n in offloads]
        births = [step.plan.schedule.steps[life.start] for life in mine if life.start >= 0]
        fetched = sum(isinstance(birth, Prefetch) for birth in births)
        assert text.count("fetched from disk") == fetched
        assert text.count("recomputed by") == max(0, len(births) - fetched - 1)
        assert f"{storage.size_bytes:,} bytes" in text


def test_why_follows_a_tensor_from_its_line_to_its_offset() -> None:
    """For a tensor in the arena: the line of the model, the op, its size and its bytes in the arena."""
    step = roomy()
    (start, storage), offset = max(step.plan.placement.offsets.items(), key=lambda item: item[1])
    text = why(step.graph, step.plan, step.graph.storages[storage].name)
    size = step.graph.storages[storage].size_bytes
    assert f"arena bytes {offset:,} to {offset + size:,}" in text
    assert re.search(r"line +\w+\.py:\d+", text)
    assert f"step {start}-" in text


def test_why_of_an_op_lists_its_runs() -> None:
    """An op that runs again is listed with all its steps, and its second run is called a recompute."""
    step = tight(offload=False)
    index = next(op for op, count in runs_of(step).items() if count > 1)
    steps = [n for n, s in enumerate(step.plan.schedule.steps) if isinstance(s, Run) and s.op == index]
    text = why(step.graph, step.plan, step.graph.ops[index].name)
    assert all(f"step {n}" in text for n in steps)
    assert f"{len(steps) - 1} of these" in text


def test_why_says_what_keeping_would_cost() -> None:
    """For a storage that leaves memory, keeping it is weighed against the fullest step of its absence."""
    step = tight(offload=True)
    storage = next(s.storage for s in step.plan.schedule.steps if isinstance(s, Offload))
    first, second = sorted((life.start, life.end) for life in walk(step.graph, step.plan).lives if life.storage == storage)[:2]
    fullest = max(walk(step.graph, step.plan).footprint[first[1] : second[0]])
    over = fullest + step.plan.problem.storages[storage].size_bytes - step.plan.problem.budget_bytes
    assert f"{format_bytes(abs(over))} {'over' if over > 0 else 'under'} the budget" in why(
        step.graph, step.plan, step.graph.storages[storage].name
    )


def test_why_knows_parameters_by_their_path() -> None:
    """The path of a parameter in the model finds its storage."""
    text = why(roomy().graph, roomy().plan, "layers.1.mlp.up_proj.weight")
    assert "parameter:model:model.layers.1.mlp.up_proj.weight" in text
    assert "in place" in text


def test_unknown_name_suggests_close_ones() -> None:
    """A misspelt name is an OptionError that names the right one."""
    with pytest.raises(OptionError, match="layers_0_mlp_up_proj_mm"):
        why(roomy().graph, roomy().plan, "layers_0_mlp_upproj_mm")


def test_backward_op_is_led_back_to_its_forward_line() -> None:
    """A backward op has no line of its own; it shows that of the forward op it serves."""
    graph = chain(3)
    backward = next(op for op in graph.ops if op.name == "backward_2")
    assert source_line(backward, forward_lines(graph)).startswith("model.py:102 in forward")


def test_groups_follow_role_and_phase() -> None:
    """Storages made in the forward are activations, those made later gradients; persistent ones go by role."""
    graph = chain(2)
    named = {item.name: group_of(graph, index) for index, item in enumerate(graph.storages)}
    assert (named["weight_0"], named["hidden_1"], named["grad_weight_0"]) == ("parameters", "activations", "gradients")


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_walk_agrees_with_the_replay(seed: int) -> None:
    """Step clocks end at the replay's time, waits add up to its stall, the kinds to its timeline and the footprint to the placed peak."""
    step = random_plan(seed)
    times, seen, report = clocks(step.plan.problem, step.plan.schedule), walk(step.graph, step.plan), step.plan.report
    spent = [end - start for start, end in zip(times.start_us, times.end_us, strict=True)]
    assert times.end_us[-1] == report.time_us
    assert sum(us for us, item in zip(spent, step.plan.schedule.steps, strict=True) if not isinstance(item, Run)) == report.stall_us
    assert tuple(map(sum, zip(*seen.live.values(), strict=True))) == report.timeline
    assert max(seen.footprint) == step.plan.peak_bytes


def test_a_plan_that_does_not_add_up_is_refused() -> None:
    """A plan whose timeline is not its schedule's raises GraphError instead of being explained."""
    step = random_plan(3)
    wrong = replace(step.plan, report=replace(step.plan.report, timeline=(1, *step.plan.report.timeline[1:])))
    with pytest.raises(GraphError, match="mebp check"):
        explain(step.graph, wrong)


@pytest.mark.parametrize("module", ["explain", "viz", "artifacts", "cli", "walk", "progress"])
def test_readers_import_no_torch(module: str) -> None:
    """Importing what only reads plans brings in neither torch nor transformers nor ortools."""
    code = (
        f"import sys, mebp_compile.{module}; sys.exit(bool({{'torch', 'transformers', 'peft', 'ortools', 'networkx'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
