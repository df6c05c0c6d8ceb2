"""Saved plans: equal when loaded, proven by check, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Planned, random_plan, roomy, tight

import solvers
from mebp_compile.artifacts import check_artifacts, check_plan, load_artifacts, save_artifacts
from mebp_compile.errors import DiskError, GraphError, OptionError
from mebp_compile.overhead import PAGE_BYTES
from mebp_compile.pages import Decommit
from mebp_compile.planning import Plan
from solvers import Run, Schedule


def save(folder: Path, step: Planned) -> Path:
    return save_artifacts(folder, step.graph, step.plan, step.code)


@pytest.mark.parametrize("step", [roomy(), tight(True)], ids=["roomy", "offload"])
def test_loads_what_was_saved(step: Planned, tmp_path: Path) -> None:
    """Graph, plan and code come back equal, and nothing but the six files is left in the folder."""
    folder = save(tmp_path / "step", step)
    assert load_artifacts(folder) == (step.graph, step.plan, step.code)
    names = ["graph.json", "offsets.json", "plan.json", "problem.json", "program.py", "schedule.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_saving_again_replaces(tmp_path: Path) -> None:
    """A second plan saved into the same folder is the one that loads."""
    save(tmp_path, roomy())
    save(tmp_path, tight(True))
    assert load_artifacts(tmp_path)[1] == tight(True).plan


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_check_accepts_every_plan(seed: int) -> None:
    """All claims hold for every plan that make_plan gives, and the figures in them are the plan's."""
    step = random_plan(seed)
    text = "\n".join(check_plan(step.graph, step.plan, step.code))
    assert f"{step.plan.peak_bytes:,} bytes" in text
    assert f"{step.plan.report.peak_bytes:,} bytes" in text


def test_check_reads_a_folder(tmp_path: Path) -> None:
    """Each claim is a line that begins with ok, the budget among them."""
    text = check_artifacts(save(tmp_path, tight(True)))
    assert len(text.splitlines()) == 7
    assert all(line.startswith("ok  ") for line in text.splitlines())
    assert f"{tight(True).plan.problem.budget_bytes:,} bytes" in text


@pytest.mark.parametrize("name", ["graph.json", "problem.json", "schedule.json", "offsets.json"])
def test_mixed_or_edited_files_do_not_load(name: str, tmp_path: Path) -> None:
    """A file of another plan, as an interrupted save leaves it, is refused by name."""
    save(tmp_path / "a", roomy())
    save(tmp_path / "b", random_plan(1))
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(GraphError, match=name):
        load_artifacts(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 99, "sha256": {}}'])
def test_a_damaged_plan_file_is_a_typed_error(text: str, tmp_path: Path) -> None:
    """Whatever stands in plan.json, loading raises GraphError."""
    (save(tmp_path, random_plan(1)) / "plan.json").write_text(text)
    with pytest.raises(GraphError):
        load_artifacts(tmp_path)


def test_a_folder_without_artifacts_is_an_option_error(tmp_path: Path) -> None:
    """The error names the missing file and how to get one."""
    with pytest.raises(OptionError, match=r"graph\.json"):
        load_artifacts(tmp_path)


def test_saving_where_a_file_is_gives_a_disk_error(tmp_path: Path) -> None:
    """A folder that can't be made is a DiskError."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        save(tmp_path / "file", random_plan(1))


def without_last_step(plan: Plan) -> Plan:
    return replace(plan, schedule=Schedule(plan.schedule.steps[:-1], plan.schedule.resident))


def without_a_run(plan: Plan) -> Plan:
    at = next(number for number, step in enumerate(plan.schedule.steps) if isinstance(step, Run))
    return replace(plan, schedule=Schedule((*plan.schedule.steps[:at], *plan.schedule.steps[at + 1 :]), plan.schedule.resident))


def under_a_smaller_budget(plan: Plan) -> Plan:
    return replace(plan, problem=plan.problem.with_budget(plan.report.peak_bytes - 1))


def with_smaller_peak(plan: Plan) -> Plan:
    return replace(plan, peak_bytes=plan.peak_bytes - 64)


def with_larger_storage(plan: Plan) -> Plan:
    first = replace(plan.problem.storages[0], size_bytes=plan.problem.storages[0].size_bytes + 64)
    return replace(plan, problem=replace(plan.problem, storages=(first, *plan.problem.storages[1:])))


def with_other_time(plan: Plan) -> Plan:
    return replace(plan, report=replace(plan.report, time_us=plan.report.time_us - 1))


def with_other_keep_all(plan: Plan) -> Plan:
    return replace(plan, keep_all_bytes=plan.keep_all_bytes + 64)


def with_all_at_zero(plan: Plan) -> Plan:
    return replace(plan, placement=replace(plan.placement, offsets=dict.fromkeys(plan.placement.offsets, 0)))


def with_unaligned_offset(plan: Plan) -> Plan:
    key = next(iter(plan.placement.offsets))
    return replace(plan, placement=replace(plan.placement, offsets={**plan.placement.offsets, key: plan.placement.offsets[key] + 8}))


def with_offset_of_nothing(plan: Plan) -> Plan:
    return replace(plan, placement=replace(plan.placement, offsets={**plan.placement.offsets, (0, 10**6): 0}))


def with_smaller_arena(plan: Plan) -> Plan:
    return replace(plan, placement=replace(plan.placement, arena_bytes=plan.placement.arena_bytes - 64))


def with_a_page_of_a_tensor(plan: Plan) -> Plan:
    (step, _), low = min(plan.placement.offsets.items())
    return with_decommits(plan, (Decommit(step, low - low % PAGE_BYTES, low - low % PAGE_BYTES + PAGE_BYTES),))


def with_half_a_page(plan: Plan) -> Plan:
    return with_decommits(plan, (Decommit(0, 0, PAGE_BYTES // 2),))


def without_decommits(plan: Plan) -> Plan:
    return with_decommits(plan, ())


def with_decommits(plan: Plan, decommits: tuple[Decommit, ...]) -> Plan:
    return replace(plan, placement=replace(plan.placement, decommits=decommits))


LIES: list[tuple[Callable[[Plan], Plan], str]] = [
    (without_last_step, "schedule does not hold|report"), (without_a_run, "schedule does not hold"), (under_a_smaller_budget, "over-budget"),
    (with_smaller_peak, "peak_bytes"), (with_larger_storage, "storage "), (with_other_time, "report.time_us"),
    (with_other_keep_all, "keep_all_bytes"),
    (with_all_at_zero, "share bytes"), (with_unaligned_offset, "not aligned"), (with_offset_of_nothing, "not made there"),
    (with_smaller_arena, "outside of the arena"), (with_a_page_of_a_tensor, "given back while it lives"), (with_half_a_page, "no pages of the arena"),
]  # fmt: skip


@pytest.mark.parametrize(("lie", "said"), LIES)
def test_check_finds_every_lie(lie: Callable[[Plan], Plan], said: str, tmp_path: Path) -> None:
    """A plan changed in one place, and saved with good digests, does not pass: a GraphError says what is wrong."""
    step = roomy()
    save_artifacts(tmp_path, step.graph, lie(step.plan), step.code)
    with pytest.raises(GraphError, match=said):
        check_artifacts(tmp_path)


def test_check_counts_pages_that_stay() -> None:
    """A plan that gives pages back and one that says it needn't do not have the same peak."""
    step = tight(True)
    assert step.plan.placement.decommits
    with pytest.raises(GraphError, match="peak_bytes"):
        list(check_plan(step.graph, without_decommits(step.plan), step.code))


def test_check_names_the_two_that_overlap(tmp_path: Path) -> None:
    """Two tensors moved onto the same bytes are named with the step at which they meet."""
    step = roomy()
    with pytest.raises(GraphError, match=r"share bytes \d+ of the arena"):
        list(check_plan(step.graph, with_all_at_zero(step.plan), step.code))


def test_an_edited_program_passes_and_is_called_edited(tmp_path: Path) -> None:
    """program.py may be changed by hand: check says so; what is not Python is refused."""
    folder = save(tmp_path, random_plan(1))
    assert "what this plan generates" in check_artifacts(folder)
    (folder / "program.py").write_text(random_plan(1).code + "# mine\n")
    assert "edited" in check_artifacts(folder)
    (folder / "program.py").write_text("def train_step(run:\n")
    with pytest.raises(GraphError, match="not Python"):
        check_artifacts(folder)


def test_plan_json_is_for_people_too(tmp_path: Path) -> None:
    """plan.json has one number a line, by the names of Plan and Report."""
    folder = save(tmp_path, roomy())
    data: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    assert data["peak_bytes"] == roomy().plan.peak_bytes
    assert data["report"]["time_us"] == solvers.replay(roomy().plan.problem, roomy().plan.schedule).time_us
    assert len((folder / "plan.json").read_text().splitlines()) == len(data) + 2
