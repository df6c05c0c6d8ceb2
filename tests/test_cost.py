"""Costs of a graph's ops: measured once, kept in one file, with room where nothing could be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned import tiny_graph

from mebp_compile import cost
from mebp_compile.config import Options
from mebp_compile.cost import AT_ONCE, CostTable, measure_costs
from mebp_compile.errors import CacheError
from mebp_compile.graph import Graph, Op, Ref, Storage, Value
from mebp_compile.lower.stream import Record

Json = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[Json]]:
    """An empty cache, and the requests of each child that would have run; the answers are made up from the request."""
    batches: list[list[Json]] = []

    def answer(requests: list[Json], **options: Any) -> dict[str, Json]:
        batches.append(requests)
        return {request["key"]: _answer(request) for request in requests}

    monkeypatch.setenv("MEBP_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "measure_ops", answer)
    return batches


def _answer(request: Json) -> Json:
    if "index:" in json.dumps(request) and request.get("target") == "aten.gather.default":
        return {"error": "IndexError: index 1 is out of bounds"}
    if request.get("target") == "aten.never.default":
        return {"error": "there is no such op"}
    return {"time_us": 7.6, "workspace_bytes": 320, "equal": True}


def one_op(target: str, index_rows: int = 1) -> Graph:
    """A graph of one op that takes int64 indices and a float table."""
    table, ids = Storage("table", 64, "parameter", "parameter:m:t"), Storage("ids", 8, "batch", "batch:0")
    storages = (table, ids, Storage("made", 96, "activation"))
    values = (
        Value("table", 0, "float32", (index_rows, 16), (16, 1)),
        Value("ids", 1, "int64", (1, 1), (1, 1)),
        Value("made", 2, "float32", (1, 24), (24, 1)),
    )
    op = Op("made", target, (Ref("table"), 0, Ref("ids")), outputs=("made",), creates=(2,), reads=(0, 1))
    return Graph("one", storages, values, (op,), (), ("table", "ids"), (("return:0", "made"),))


def test_each_distinct_call_is_measured_once(asked: list[list[Json]]) -> None:
    """A second graph of the same calls starts no child; equal layers share their measurements; every op has a cost."""
    graph = tiny_graph()
    costs, _ = measure_costs(graph, Options(10**9))
    assert set(costs.ops) == {op.name for op in graph.ops}
    keys = [request["key"] for some in asked for request in some]
    assert len(set(keys)) == len(keys) < len(graph.ops)
    assert all(len(some) <= AT_ONCE for some in asked)
    children = len(asked)
    again, _ = measure_costs(graph, Options(10**9))
    assert again == costs
    assert len(asked) == children


def test_processes_share_what_they_measure(asked: list[list[Json]]) -> None:
    """Two tables of one file, as two processes have them: none loses what the other measured, and none measures it again."""
    first, second = ({"target": f"aten.{name}.default", "args": []} for name in ("relu", "neg"))
    mine, theirs = CostTable(), CostTable()
    theirs.lookup([second])
    mine.lookup([first])
    assert CostTable().known.keys() == {cost._key(first), cost._key(second)}
    assert mine.lookup([second]).keys() == theirs.lookup([first]).keys() == CostTable().known.keys()
    assert [len(some) for some in asked] == [1, 1]


def test_what_is_measured_is_what_a_plan_gets(asked: list[list[Json]]) -> None:
    """Workspace as measured, and the time of the call from Python on top of the op's."""
    costs, _ = measure_costs(one_op("aten.add.Tensor"), Options(10**9))
    assert costs.ops["made"].workspace_bytes == 320
    assert costs.ops["made"].time_us == cost.CALL_US + 7


def test_indices_that_do_not_fit_are_tried_as_zeros(asked: list[list[Json]]) -> None:
    """A lookup in a table of one row fails with random indices and is measured with zeros."""
    costs, _ = measure_costs(one_op("aten.gather.default"), Options(10**9))
    assert [len(batch) for batch in asked] == [1, 1]
    assert "index:" not in json.dumps(asked[1])
    assert costs.ops["made"].workspace_bytes == 320


def test_what_can_not_be_measured_gets_room_for_all_that_it_touches(asked: list[list[Json]]) -> None:
    """An op that fails alone is given the bytes of its inputs and outputs as workspace, so that the budget still holds."""
    costs, _ = measure_costs(one_op("aten.never.default"), Options(10**9))
    assert costs.ops["made"].workspace_bytes == 64 + 8 + 96


def test_a_lookup_on_disk_has_its_rows_as_workspace(asked: list[list[Json]]) -> None:
    """Packed and dense rows of every id, since no two ids need be equal."""
    graph = one_op("run.embedding")
    storages = (*graph.storages, Storage("table_packed", 1000, "weight", "weight:m:t"))
    op = Op("made", "run.embedding", ("table", Ref("ids")), outputs=("made",), creates=(2,), reads=(1,))
    streamed = Graph("one", storages, graph.values, (op,), (), graph.inputs, graph.results)
    record = Record("int4", 1000, (10, 96), (10, 4), "float16")
    costs, _ = measure_costs(streamed, Options(10**9), {"parameter:m:t": record})
    assert costs.ops["made"].workspace_bytes >= 96 + 100
    assert asked == []


def test_a_damaged_table_is_named(asked: list[list[Json]]) -> None:
    """A cost table that is no JSON is reported with its path and what to do."""
    measure_costs(one_op("aten.add.Tensor"), Options(10**9))
    path = CostTable().path
    path.write_text("{")
    with pytest.raises(CacheError, match=str(path)):
        measure_costs(one_op("aten.add.Tensor"), Options(10**9))


def test_no_request_of_a_training_step_fails() -> None:
    """Every call of a captured step can be measured by itself: indices fit their tables, outputs have their geometry."""
    graph = tiny_graph()
    measure_costs(graph, Options(10**9))
    known = CostTable().known
    requests = {op.name: cost._request(graph, op, {}) for op in graph.ops}
    answers = {name: known[cost._key(request)] for name, request in requests.items() if request}
    failed = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    assert not failed
