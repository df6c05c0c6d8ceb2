"""The pictures: self-contained, well-formed, and with the plan's own numbers in them."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Planned, long_plan, random_plan, roomy, tight

from mebp_compile.config import format_bytes
from mebp_compile.errors import DiskError, OptionError
from mebp_compile.viz import graph_dot, graph_svg, timeline_html, timeline_svg, trace_json, write
from mebp_compile.viz.clusters import MOST_NODES, picture
from mebp_compile.viz.scale import representatives, steps_scale, time_scale
from mebp_compile.viz.timeline import ticks
from mebp_compile.walk import walk
from solvers import Run

STEPS = [roomy(), tight(True), tight(False)]
NAMES = ["roomy", "offload", "recompute"]


class Page(HTMLParser):
    """Collects what could reach outside of the file, the figures of the tiles and the script."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tiles: list[str] = []
        self.script = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action") or tag == "link"
        ]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            self.tiles.append(data)
        if self.open and self.open[-1] == "script":
            self.script += data


def parse(text: str) -> tuple[Page, dict[str, list[object]]]:
    page = Page()
    page.feed(text)
    found = re.search(r"const D=(\{.*?\}),\[W,", page.script, re.DOTALL)
    assert found is not None
    return page, json.loads(found[1].replace("<\\/", "</"))


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_html_is_self_contained(step: Planned) -> None:
    """No link, source, import or URL leads out of the file."""
    text = timeline_html(step.graph, step.plan)
    page, _ = parse(text)
    assert page.links == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not re.search(r"@[A-Z]+@", text)


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_html_shows_the_plans_figures(step: Planned) -> None:
    """Peak, keep-all and counts in the tiles, and the timeline in the page's data, are the plan's."""
    page, data = parse(timeline_html(step.graph, step.plan))
    assert page.tiles[:2] == [format_bytes(step.plan.peak_bytes), format_bytes(step.plan.keep_all_bytes)]
    assert str(step.plan.report.recomputes) in page.tiles
    assert data["live"] == list(step.plan.report.timeline)
    assert max(data["footprint"]) == step.plan.peak_bytes  # type: ignore[type-var]
    assert len(data["again"]) == step.plan.report.recomputes
    assert len(data["steps"]) == len(step.plan.schedule.steps)


def test_html_data_lists_every_live_byte() -> None:
    """The lives in the page, the constant and the workspace add up to the live bytes of each step."""
    step = tight(offload=True)
    _, data = parse(timeline_html(step.graph, step.plan))
    sizes = [item[1] for item in data["storages"]]  # type: ignore[index]
    total = [data["constant"] + extra for extra in data["workspace"]]  # type: ignore[operator]
    for storage, start, end, _ in data["lives"]:  # type: ignore[misc]
        for number in range(max(0, start), end):
            total[number] += sizes[storage]
    assert total == data["live"]


def test_html_escapes_what_it_shows() -> None:
    """A name that looks like markup can't end the script or open a tag."""
    step = random_plan(1)
    from dataclasses import replace

    text = timeline_html(replace(step.graph, name="</script><img src=x>"), step.plan)
    assert "<img" not in text
    assert text.count("</script>") == 1


def test_measured_bytes_are_drawn_or_refused() -> None:
    """A measured curve appears in the picture; one with the wrong number of values is an OptionError."""
    step = random_plan(2)
    measured = [size + 1 for size in step.plan.report.timeline]
    assert "measured</span>" in timeline_html(step.graph, step.plan, measured)
    assert "measured</span>" not in timeline_html(step.graph, step.plan)
    with pytest.raises(OptionError, match="measured"):
        timeline_html(step.graph, step.plan, measured[1:])


def test_long_schedule_is_decimated_without_losing_its_peak() -> None:
    """More than 10,000 steps give a file of a few MB, and the bucket with the peak is drawn at its full height."""
    step = long_plan()
    assert len(step.plan.schedule.steps) > 10_000
    text = timeline_html(step.graph, step.plan)
    assert len(text) < 6_000_000
    seen = walk(step.graph, step.plan)
    for scale in (steps_scale(seen), time_scale(seen)):
        chosen = representatives(scale, step.plan.report.timeline)
        assert max(step.plan.report.timeline[number] for number in chosen) == step.plan.report.peak_bytes
        assert len(chosen) < 4000


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_svg_of_any_plan_is_xml(seed: int) -> None:
    """Timeline and own graph layout parse as XML for every plan."""
    step = random_plan(seed)
    for text in (timeline_svg(step.graph, step.plan), graph_svg(step.graph, step.plan, graphviz=False)):
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_timeline_svg_names_peak_and_budget(step: Planned) -> None:
    """The drawing carries the peak and the budget as text."""
    text = timeline_svg(step.graph, step.plan)
    ElementTree.fromstring(text)
    assert f"peak {format_bytes(step.plan.peak_bytes)}" in text
    assert f"budget {format_bytes(step.plan.problem.budget_bytes)}" in text


@pytest.mark.parametrize("top", [1, 7, 1000, 5000, 3 * 2**20, 2.5 * 2**30])
def test_ticks_are_round_and_few(top: float) -> None:
    """Between 1 and 12 ticks from zero, none above the top."""
    marks = ticks(top)
    assert marks[0] == 0
    assert len(marks) <= 12
    assert marks[-1] <= top


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_picture_holds_every_op_once_and_has_no_circle(step: Planned) -> None:
    """The nodes share out all ops, edges go between different nodes, and the graph can be sorted."""
    import networkx

    shown = picture(step.graph, step.plan)
    assert len(shown.nodes) <= MOST_NODES
    assert sorted(index for node in shown.nodes for index in node.ops) == list(range(len(step.graph.ops)))
    net = networkx.DiGraph((a, b) for a, b, _ in shown.edges)
    assert networkx.is_directed_acyclic_graph(net)


def test_picture_marks_what_is_recomputed_and_offloaded() -> None:
    """A small graph has a node per op; its fate is what the schedule does with it."""
    for seed in range(40):
        step = random_plan(seed)
        runs = Counter(item.op for item in step.plan.schedule.steps if isinstance(item, Run))
        nodes = picture(step.graph, step.plan).nodes
        assert len(nodes) == len(step.graph.ops)
        if any(count > 1 for count in runs.values()):
            assert {node.ops[0] for node in nodes if any("recomputed" in note for note in node.notes)} == {
                op for op, n in runs.items() if n > 1
            }
            return
    pytest.fail("no random plan recomputes anything")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydot's own parser
def test_dot_is_read_back_by_pydot() -> None:
    """The dot text has the picture's nodes and edges."""
    import pydot

    step = tight(offload=False)
    shown = picture(step.graph, step.plan)
    parsed = pydot.graph_from_dot_data(graph_dot(step.graph, step.plan))
    assert parsed is not None
    assert len([node for node in parsed[0].get_nodes() if node.get_name().startswith("n") and node.get_name() != "node"]) == len(
        shown.nodes
    )
    assert len(parsed[0].get_edges()) == len(shown.edges)


def test_graph_svg_works_with_and_without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a `dot` program the own layout is used; both are XML and name a layer."""
    step = tight(offload=False)
    text = graph_svg(step.graph, step.plan)
    ElementTree.fromstring(text)
    assert "layers.0" in text
    monkeypatch.setattr(shutil, "which", lambda _: None)
    own = graph_svg(step.graph, step.plan)
    ElementTree.fromstring(own)
    assert "layers.0" in own
    assert "recomputed" in own


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_trace_counters_and_slices_are_the_plans(seed: int) -> None:
    """The live counter's maximum is the replayed peak; compute slices don't overlap and with the waits make up the whole time."""
    step = random_plan(seed)
    events = json.loads(trace_json(step.graph, step.plan))["traceEvents"]
    assert max(event["args"]["bytes"] for event in events if event["name"] == "live bytes") == step.plan.report.peak_bytes
    kinds = [sum(event["args"].values()) for event in events if event["name"] == "live by kind"]
    assert kinds == list(step.plan.report.timeline)
    compute = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert len(compute) == step.plan.report.runs
    assert sum(event["args"]["recompute"] for event in compute) == step.plan.report.recomputes
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(compute))
    waits = sum(event["dur"] for event in events if event["ph"] == "X" and event["tid"] == 3)
    assert sum(event["dur"] for event in compute) + waits == step.plan.time_us - step.plan.faults_us


def test_write_chooses_by_suffix(tmp_path: Path) -> None:
    """Each suffix gives its picture, a name with "timeline" the timeline's SVG, and no temporary file stays behind."""
    step = random_plan(5)
    starts = {"t.html": "<!DOCTYPE html>", "g.dot": "digraph", "t.json": '{"traceEvents"', "timeline.svg": "<svg"}
    for name, start in starts.items():
        assert write(tmp_path / name, step.graph, step.plan).read_text().startswith(start)
    assert "<svg" in write(tmp_path / "graph.svg", step.graph, step.plan).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*starts, "graph.svg"])


def test_write_refuses_other_files(tmp_path: Path) -> None:
    """An unknown suffix is an OptionError, a folder that is not there a DiskError."""
    step = random_plan(5)
    with pytest.raises(OptionError, match=r"\.html"):
        write(tmp_path / "picture.png", step.graph, step.plan)
    with pytest.raises(DiskError):
        write(tmp_path / "nowhere" / "t.html", step.graph, step.plan)
