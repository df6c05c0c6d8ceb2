"""solvers.node_link: both dialects of published graphs, as problems."""

import json
from pathlib import Path

import pytest

from solvers.__main__ import main
from solvers.baselines import keep_all
from solvers.check import replay
from solvers.node_link import problem_of
from solvers.problem import ProblemError, read_problem
from solvers.solve import solve

EDGES = [(0, 1), (1, 2), (0, 3), (2, 3)]
SIZES, TIMES = [40, 80, 20, 20], [6, 4, 10, 2]


def keras_dialect(**more: object) -> str:
    """As Checkmate's extraction from Keras was stored."""
    nodes = [{"id": k, "name": f"n{k}", "backward": k > 1, "cost_cpu": TIMES[k], "cost_ram": SIZES[k]} for k in range(4)]
    return json.dumps({"directed": True, "graph": {"name": "g", **more}, "nodes": nodes, "links": [{"source": a, "target": b} for a, b in EDGES]})


def layered_dialect() -> str:
    """As the random layered graphs were."""
    nodes = [{"name": k, "duration": TIMES[k], "out_cost": SIZES[k]} for k in range(4)]
    links = [{"0": a, "1": b} for a, b in EDGES]
    return json.dumps({"directed": True, "graph": {"name": "g", "order": [0, 1, 2, 3]}, "nodes": nodes, "links": links})


@pytest.mark.parametrize("text", [keras_dialect(), layered_dialect()], ids=["keras", "layered"])
def test_a_graph_is_a_problem(text: str) -> None:
    """Sizes in units of 20, times of 2; node 0 lives up to node 3, or is made again before it."""
    problem = problem_of(text)
    assert [s.size_bytes for s in problem.storages] == [2, 4, 1, 1]
    assert [op.choices[0].time_us for op in problem.ops] == [3, 2, 5, 1]
    assert problem.ops[3].choices[0].reads == (0, 2)
    report = replay(problem, keep_all(problem))
    assert (report.peak_bytes, report.time_us) == (7, 11)
    assert solve(problem.with_budget(6)).report.time_us == 14


def test_the_order_and_the_phases_of_the_file() -> None:
    """They are kept."""
    problem = problem_of(keras_dialect())
    assert [op.phase for op in problem.ops] == ["forward", "forward", "backward", "backward"]
    assert [op.name for op in problem.ops] == ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps({"graph": {}, "nodes": [{"id": 0}], "links": []}), keras_dialect(order=[3, 2, 1, 0]), keras_dialect(order=[0, 1, 2]),
     keras_dialect().replace('"target": 3', '"target": 0'), keras_dialect().replace('"target": 3', '"target": 9')],
    ids=["empty", "list", "nothing", "no costs", "wrong order", "short order", "cycle", "unknown node"],
)  # fmt: skip
def test_what_is_no_graph(text: str) -> None:
    """Is refused with a ProblemError."""
    with pytest.raises(ProblemError):
        problem_of(text)


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the problem that the graph is."""
    graph, problem = tmp_path / "graph.json", tmp_path / "problem.json"
    graph.write_text(layered_dialect())
    assert main(["convert", str(graph), str(problem)]) == 0
    assert "4 ops" in capsys.readouterr().out
    assert read_problem(problem) == problem_of(layered_dialect())
    assert main(["convert", str(problem), str(graph)]) == 1
