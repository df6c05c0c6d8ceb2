"""Ops and the link measured on an accelerator: a fake one, whose clock and allocator the test sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mebp_compile import cost
from mebp_compile.graph import Graph, Op, Ref, Storage, Value
from mebp_compile.measure import device_ops, ops
from mebp_compile.measure.accelerator import READ, accelerator_of
from mebp_compile.measure.device_ops import LINK_BYTES, measure_link, memory_of_call, time_of_call

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
from fake_accelerator import FakeAccelerator, Module


class Allocator(Module):
    """The fake module with an allocator that the test drives."""

    def __init__(self) -> None:
        super().__init__(late=False)
        self.now = self.peak = 0

    def take(self, size_bytes: int) -> None:
        self.now += size_bytes
        self.peak = max(self.peak, self.now)

    def memory_allocated(self, device: Any) -> int:
        return self.now

    def max_memory_allocated(self, device: Any) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.peak = self.now


@pytest.fixture
def accelerator() -> FakeAccelerator:
    fake = FakeAccelerator(late=False)
    fake.module = Allocator()
    return fake


def test_peak_and_rest_of_a_call(accelerator: FakeAccelerator) -> None:
    """Above what was there before: 100 bytes of result and 50 of workspace."""
    module = accelerator.module
    module.take(1000)

    def call() -> str:
        module.take(150)
        module.take(-50)
        return "result"

    assert memory_of_call(accelerator, call) == (150, 100, "result")
    assert memory_of_call(accelerator, lambda: None) == (0, 0, None)


def test_calls_are_timed_together(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes 7 us forward in each call, and a synchronisation that takes 40 us once a sample: it is shared by all calls of it."""
    clock = [0]
    monkeypatch.setattr(device_ops.time, "perf_counter_ns", lambda: clock[0])
    monkeypatch.setattr(accelerator, "finish", lambda: clock.__setitem__(0, clock[0] + 40_000))
    time_us, runs = time_of_call(accelerator, lambda: clock.__setitem__(0, clock[0] + 7_000))
    assert runs == device_ops.MOST_CALLS * device_ops.SAMPLES
    assert time_us == pytest.approx(7 + 40 / device_ops.MOST_CALLS)


def test_an_op_on_an_accelerator(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's answer has the form of one on the CPU; the workspace is what the allocator gave beyond the results."""
    monkeypatch.setattr(ops, "accelerator_of", lambda place: accelerator if place else None)
    monkeypatch.setattr(accelerator, "peak_bytes", lambda: 4096 + 512)
    tensor = {"tensor": {"shape": [32, 32], "dtype": "float32", "fill": "normal", "device": "cpu"}}
    request = {"key": "x", "target": "aten.mm.default", "args": [tensor, tensor], "device": "fake:0"}
    answer = ops.measure({"requests": [request], "threads": 1, "fresh_pages": False, "imports": []})["results"]["x"]
    on_cpu = ops.measure({"requests": [{**request, "device": ""}], "threads": 1, "fresh_pages": False, "imports": []})["results"]["x"]
    assert answer.keys() == on_cpu.keys()
    assert answer["outputs"] == on_cpu["outputs"]
    assert answer["workspace_bytes"] == 512
    assert answer["time_us"] > 0


def test_the_link(accelerator: FakeAccelerator) -> None:
    """Both directions are copied on their streams; compute is not delayed by them."""
    accelerator._streams = {kind: accelerator.module.Stream(accelerator.device) for kind in ("read", "write")}
    speeds = measure_link(accelerator)
    assert speeds["interference"] == 0.0
    assert min(speeds["read"], speeds["write"], speeds["latency"]) > 0
    assert accelerator.pinned_bytes == [LINK_BYTES]
    assert {entry[2] for entry in accelerator.module.log if entry[1] == "copies"} == {LINK_BYTES, device_ops.SMALL_BYTES}
    assert READ in accelerator._streams


def test_requests_say_where_tensors_are() -> None:
    """What the step computes with is on its device, an optimizer's step count on the host."""
    values = (Value("count", 0, "float32"), Value("x", 1, "float32", (4,), (1,)), Value("y", 2, "float32", (4,), (1,)))
    storages = (Storage("count", 4, "optimizer", on_host=True), Storage("x", 16, "parameter"), Storage("y", 16, "activation"))
    op = Op("y", "aten.mul.Tensor", (Ref("x"), Ref("count")), (), ("y",), (2,), (1, 0), out_target="aten.mul.out", out=("out",))
    graph = Graph("step", storages, values, (op,), (), ("count", "x"), (), "cuda:0")
    request = cost._request(graph, op, {})
    assert request is not None
    assert request["device"] == "cuda:0"
    assert [arg["tensor"]["device"] for arg in (*request["args"], *request["out"])] == ["cuda:0", "cpu", "cuda:0"]
    on_cpu = cost._request(Graph("step", storages, values, (op,), (), ("count", "x"), ()), op, {})
    assert on_cpu is not None
    assert "device" not in on_cpu
    assert "device" not in on_cpu["args"][0]["tensor"]


def test_no_device_here() -> None:
    """Nothing for the CPU; an error of torch's for one that is not here."""
    assert accelerator_of("") is None
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            accelerator_of("cuda:0")
