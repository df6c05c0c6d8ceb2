"""Ops that may give other bits on an accelerator run once there."""

from __future__ import annotations

import pytest
import torch

import solvers
from mebp_compile.graph import Graph, Op, Ref, Storage, Value
from mebp_compile.nondeterministic import NONDETERMINISTIC, same_again
from mebp_compile.planning import Costs, build_problem
from solvers import ScheduleError


@pytest.mark.parametrize("name", sorted(NONDETERMINISTIC))
def test_every_name_is_an_op(name: str) -> None:
    """torch has it: a name that moved would protect nothing."""
    assert torch._C._jit_get_operation(f"aten::{name}")[0] is not None


def test_only_on_an_accelerator() -> None:
    """The CPU's kernels add in one order."""
    assert same_again("aten.index_add.default", "")
    assert not same_again("aten.index_add.default", "cuda:0")
    assert same_again("aten.mm.default", "cuda:0")
    assert same_again("run.dequantise", "cuda:0")
    assert same_again("py.add", "cuda:0")


@pytest.mark.parametrize(("device", "again"), [("", True), ("cuda:0", False)])
def test_no_schedule_runs_one_again(device: str, again: bool) -> None:
    """The problem forbids it, and so does the checker."""
    values = tuple(Value(name, number, "float32", (1024,), (1,)) for number, name in enumerate(("x", "i", "y", "z")))
    storages = (Storage("x", 4096, "parameter"), Storage("i", 4096, "batch"), *(Storage(name, 4096, "activation") for name in ("y", "z")))
    scatter = Op("y", "aten.scatter_add.default", (Ref("x"), 0, Ref("i"), Ref("x")), (), ("y",), (2,), (0, 1))
    double = Op("z", "aten.neg.default", (Ref("y"),), (), ("z",), (3,), (2,))
    graph = Graph("step", storages, values, (scatter, double), (), ("x", "i"), (), device)
    problem = build_problem(graph, Costs({}), 1 << 20, offload=False)
    assert [op.rerunnable for op in problem.ops] == [again, True]
    steps = (solvers.Run(0), solvers.Free(2), solvers.Run(0), solvers.Run(1), solvers.Free(2), solvers.Free(3))
    schedule = solvers.Schedule(steps, frozenset())
    if again:
        assert solvers.replay(problem, schedule).recomputes == 1
    else:
        with pytest.raises(ScheduleError) as caught:
            solvers.replay(problem, schedule)
        assert caught.value.rule == "rerun-forbidden"
