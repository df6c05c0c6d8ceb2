"""The Graph: JSON round trips, what verify refuses, versions, dataflow, networkx."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Recipe

from mebp_compile.capture import capture, find_state
from mebp_compile.errors import GraphError
from mebp_compile.graph import (
    Const,
    Graph,
    LoopChoice,
    Op,
    Ref,
    Storage,
    Value,
    dataflow,
    from_json,
    inputs_of,
    map_refs,
    to_json,
    verify,
    versions,
)
from mebp_compile.lower import lower


@cache
def captured() -> Graph:
    training = Recipe("gpt2", dropout=0.1).build()
    return lower(capture(training.step, find_state(training.step), training.batch(0), {}))


def chain() -> Graph:
    """x -> double -> added in place -> result, with a view of it."""
    storages = (Storage("x", 16, "batch", "batch:0"), Storage("y", 16, "activation"))
    values = (Value("x", 0, "float32", (4,), (1,)), Value("y", 1, "float32", (4,), (1,)), Value("y_t", 1, "float32", (2, 2), (2, 1)))
    ops = (
        Op("y", "aten.mul.Tensor", (Ref("x"), 2.0), outputs=("y",), creates=(1,), reads=(0,)),
        Op("more", "aten.add_.Tensor", (Ref("y"), Ref("x")), (("alpha", 0.5),), reads=(0,), writes=(1,)),
    )
    views = (Op("y_t", "aten.view.default", (Ref("y"), (2, 2)), outputs=("y_t",)),)
    return Graph("chain", storages, values, ops, views, ("x",), (("return:0", "y_t"),))


def test_a_captured_graph_survives_json() -> None:
    """A whole captured step, with every kind of argument, is equal after a round trip, and so is its digest."""
    graph = captured()
    assert from_json(to_json(graph)) == graph
    assert from_json(to_json(graph)).digest == graph.digest


ARGS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.builds(Ref, st.text(min_size=1, max_size=5)) | st.builds(Const, st.just("dtype"), st.text(min_size=1, max_size=5)),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(ARGS, max_size=4).map(tuple), st.lists(st.tuples(st.text(max_size=4), ARGS), max_size=2).map(tuple))
@settings(max_examples=150, deadline=None)
def test_arguments_survive_json(args: tuple[object, ...], kwargs: tuple[tuple[str, object], ...]) -> None:
    """Any nesting of values, constants and numbers; floats to the last bit, -0.0 and infinities included."""
    graph = chain()
    changed = replace(graph, ops=(replace(graph.ops[0], args=args, kwargs=kwargs), *graph.ops[1:]))
    again = from_json(to_json(changed))
    assert again == changed
    assert repr(again) == repr(changed)


def test_loops_survive_json() -> None:
    """An op with a menu of tilings and a body."""
    graph = chain()
    loop = replace(graph.ops[0], menu=(LoopChoice(4, (0,), 100, 7, 50),), body=chain())
    changed = replace(graph, ops=(loop, graph.ops[1]))
    assert from_json(to_json(changed)) == changed


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": 3', '{"name": "x", "ops": [{"nome": 1}]}', '{"name": "x", "values": [{"name": "v"}]}']
)
def test_other_text_is_refused(text: str) -> None:
    """Text that is not a graph."""
    with pytest.raises(GraphError, match="not a graph"):
        from_json(text)


def test_verify_accepts_what_is_right() -> None:
    """The chain, and a captured step."""
    verify(chain())
    verify(captured())


BROKEN = {
    "does not have": lambda g: replace(g, ops=(replace(g.ops[0], args=(Ref("nowhere"),)), g.ops[1])),
    "does not declare": lambda g: replace(g, ops=(replace(g.ops[0], reads=()), g.ops[1])),
    "before anything makes it": lambda g: replace(g, ops=(g.ops[1], g.ops[0])),
    "exists already": lambda g: replace(g, ops=(g.ops[0], replace(g.ops[0], name="again"))),
    "which nothing makes": lambda g: replace(g, ops=()),
}


@pytest.mark.parametrize("words", BROKEN)
def test_verify_refuses_what_is_wrong(words: str) -> None:
    """Each rule of the graph, with the op or result that breaks it named."""
    with pytest.raises(GraphError, match=words):
        verify(BROKEN[words](chain()))


def test_versions_count_writes() -> None:
    """A storage from before the step starts at 0, a new one at 1, and each write in place adds one."""
    seen, final = versions(chain())
    assert seen == [{0: 0}, {0: 0, 1: 1}]
    assert final == [0, 2]


def test_dataflow_goes_from_the_last_writer() -> None:
    """The in-place addition depends on the op that made its target."""
    assert list(dataflow(chain())) == [(0, 1, 1)]


def test_networkx_has_every_op() -> None:
    """The picture has a node for each op with its phase, is acyclic, and edges name storages."""
    import networkx

    picture = captured().to_networkx()
    assert set(picture.nodes) == {op.name for op in captured().ops}
    assert networkx.is_directed_acyclic_graph(picture)
    assert {data["phase"] for _, data in picture.nodes(data=True)} == {"forward", "backward", "update"}
    assert all(data["storage"] for _, _, data in picture.edges(data=True))


def test_arguments_can_be_renamed() -> None:
    """map_refs replaces values inside nested arguments, inputs_of lists them once each, in order."""
    arg = (Ref("a"), (Ref("b"), 3), Ref("a"))
    assert map_refs(arg, {"a": Ref("z")}) == (Ref("z"), (Ref("b"), 3), Ref("z"))
    assert inputs_of(Op("n", "t", arg, (("k", Ref("c")),))) == ("a", "b", "c")


def test_the_listing_has_a_line_for_each_op() -> None:
    """The listing names results with shapes, and everything in JSON is plain JSON."""
    assert chain().listing().splitlines()[0].startswith("y: float32[4] = aten.mul.Tensor(x, 2.0)")
    json.loads(to_json(captured()))
