"""Measured ops: argument forms, workspaces, failures, and bit-equality of programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mebp_compile.errors import MeasureError
from mebp_compile.measure.malloc_meter import library_path
from mebp_compile.measure.ops import measure_ops
from mebp_compile.measure.requests import decode, tensor_spec

Json = dict[str, Any]
SMALL = 4096  # Python's and the dispatcher's own allocations in a call, and malloc's rounding


def spec(*shape: int, **more: Any) -> Json:
    return {"tensor": {"shape": list(shape), **more}}


def bf16(*shape: int) -> Json:
    return spec(*shape, dtype="bfloat16")


HEADS = [bf16(1, 4, 128, 64)] * 3
REQUESTS: list[Json] = [
    {"key": "add", "target": "aten.add.Tensor", "args": [spec(300, 300), spec(300, 300)], "kwargs": {"alpha": 2}},
    {"key": "mm", "target": "aten.mm.default", "args": [bf16(64, 256), bf16(256, 512)]},
    {"key": "cold", "target": "aten.mm.default", "args": [bf16(64, 256), bf16(256, 512)], "between_bytes": 1 << 20},
    {"key": "mm.out", "target": "aten.mm.out", "args": [bf16(64, 256), bf16(256, 512)], "out": [bf16(64, 512)]},
    {"key": "view", "target": "aten.view.default", "args": [spec(8, 8), [-1]]},
    {"key": "inplace", "target": "aten.add_.Tensor", "args": [spec(300, 300), 1.0]},
    {"key": "cat", "target": "aten.cat.default", "args": [[spec(10, 3), spec(5, 3)]]},
    {"key": "cast", "target": "aten._to_copy.default", "args": [bf16(9)], "kwargs": {"dtype": {"dtype": "float32"}}},
    {"key": "max", "target": "aten.max.dim_max", "args": [spec(9, 4), 0]}
    | {"out": [spec(4), spec(4, dtype="int64")], "out_names": ["max", "max_values"]},
    {"key": "sdpa", "target": "aten._scaled_dot_product_flash_attention_for_cpu.default", "args": HEADS},
    {"key": "embedding", "target": "aten.embedding.default"}
    | {"args": [spec(50, 8), spec(1, 6, dtype="int64", fill="index:50")]},
    {"key": "mismatch", "target": "aten.mm.default", "args": [spec(2, 3), spec(2, 3)]},
    {"key": "unknown", "target": "aten.no_such_op.default", "args": []},
    {"key": "packet", "target": "aten.mm", "args": [spec(2, 3), spec(3, 2)]},
    {"key": "form", "target": "aten.relu.default", "args": [{"tensoor": {}}]},
]


TILED = "return torch.cat([torch.mm(inputs['a'], tile) for tile in inputs['b'].split(128, 1)], 1)"
EQUAL_CASES = {  # first program, whether equal, second program
    "tiles": ("return torch.mm(inputs['a'], inputs['b'])", True, TILED),
    "nan": ("return inputs['a'] * float('nan')", True, "return inputs['a'] * float('nan')"),
    "sign of zero": ("return inputs['a'] * 0.0", False, "return torch.zeros_like(inputs['a'])"),
    "one bit": ("return inputs['a']", False, "return torch.nextafter(inputs['a'], inputs['b'][:64, :256])"),
    "dtype": ("return inputs['a']", False, "return inputs['a'].double()"),
    "mutated input": ("return torch.ones(1)", False, "inputs['a'].add_(1)\nreturn torch.ones(1)"),
    "strides": ("return inputs['a'].t()", True, "return inputs['a'].t().contiguous()"),
    "count": ("return [inputs['a'], inputs['a']]", False, "return [inputs['a']]"),
    "threads": ("return torch.tensor([torch.get_num_threads()])", True, "return torch.tensor([3])"),
    "random": ("return torch.rand(3)", True, "return torch.rand(3)"),
}
INPUTS = {"a": spec(64, 256), "b": spec(256, 512)}
PROGRAMS = [
    {"key": key, "kind": "equal", "inputs": INPUTS, "first": first, "second": second}
    for key, (first, _, second) in EQUAL_CASES.items()
]
BROKEN = {"key": "broken", "kind": "equal", "inputs": {}, "first": "return no_such_name", "second": "return 1"}


@pytest.fixture(scope="module")
def measured() -> dict[str, Json]:
    return measure_ops([*REQUESTS, *PROGRAMS, BROKEN], threads=3)


BAD = {"mismatch", "unknown", "packet", "form", "broken"}


def good_ops(measured: dict[str, Json]) -> dict[str, Json]:
    return {key: result for key, result in measured.items() if key not in BAD and key not in EQUAL_CASES}


def test_every_request_has_a_result(measured: dict[str, Json]) -> None:
    """Good requests have a positive time and their outputs' geometry; bad ones an error of their own, and none is
    lost.
    """
    assert list(measured) == [request["key"] for request in [*REQUESTS, *PROGRAMS, BROKEN]]
    assert {key for key, result in measured.items() if "error" in result} == BAD
    assert all(result["time_us"] > 0 and result["runs"] >= 1 for result in good_ops(measured).values())
    assert "no_such_op" in measured["unknown"]["error"]
    assert "overload" in measured["packet"]["error"]
    assert "NameError" in measured["broken"]["error"]


def test_outputs_are_described(measured: dict[str, Json]) -> None:
    """Shapes, strides, dtypes and new bytes are those that torch's own rules give."""
    new = {"shape": [300, 300], "stride": [300, 1], "dtype": "float32", "new_bytes": 360_000}
    assert measured["add"]["outputs"] == [new]
    assert measured["inplace"]["outputs"] == [{**new, "new_bytes": 0}]
    assert measured["view"]["outputs"] == [{"shape": [64], "stride": [1], "dtype": "float32", "new_bytes": 0}]
    retained = {key: result["retained_bytes"] for key, result in good_ops(measured).items()}
    sdpa = 128 * 4 * 64 * 2 + 128 * 4 * 4
    expected = {"add": 360_000, "mm": 65536, "cold": 65536, "mm.out": 0, "view": 0, "inplace": 0, "cat": 180, "cast": 36}
    assert retained == expected | {"sdpa": sdpa, "embedding": 192, "max": retained["max"]}


@pytest.mark.skipif(library_path() is None, reason="the malloc meter's library is not built (no compiler)")
def test_workspaces(measured: dict[str, Json]) -> None:
    """Elementwise ops have none; attention has one; bf16 mm has the same one with and without out=."""
    workspace = {key: result["workspace_bytes"] for key, result in good_ops(measured).items()}
    assert all(workspace[key] < SMALL for key in ("add", "view", "inplace", "cat", "cast", "embedding"))
    assert workspace["sdpa"] > SMALL
    assert abs(workspace["mm"] - workspace["mm.out"]) < SMALL
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert workspace["mm"] > SMALL


def test_without_the_meter_workspaces_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is not built, workspaces are None and times are measured all the same."""
    monkeypatch.setattr("mebp_compile.measure.ops.library_path", lambda: None)
    result = measure_ops([REQUESTS[0]], threads=1)["add"]
    assert result["workspace_bytes"] is None
    assert result["once_bytes"] is None
    assert result["time_us"] > 0


def test_an_op_that_kills_the_child_costs_only_itself() -> None:
    """The other requests of the batch are measured, and the deadly one reports how the child died."""
    deadly = {"key": "deadly", "target": "mebp_test.die.default", "args": [spec(2)]}
    requests = [deadly, REQUESTS[0]]
    results = measure_ops(requests, threads=1, imports=["deadly_op"])
    assert "SIGKILL" in results["deadly"]["error"]
    assert results["add"]["time_us"] > 0


def test_equal_keys_are_refused() -> None:
    """Two requests with one key would hide each other."""
    with pytest.raises(MeasureError, match="same key"):
        measure_ops([REQUESTS[0], REQUESTS[0]])


def test_equality_is_of_raw_bytes(measured: dict[str, Json]) -> None:
    """NaN equals NaN, -0.0 differs from 0.0, one bit, a dtype or a changed input is a difference; the child computes
    with the threads asked for.
    """
    assert {key: measured[key]["equal"] for key in EQUAL_CASES} == {key: case[1] for key, case in EQUAL_CASES.items()}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.uint8]),
)
def test_specs_keep_the_geometry(shape: list[int], random: Any, dtype: torch.dtype) -> None:
    """A tensor's spec decodes to the same shape, stride and dtype on a storage of exactly the bytes it needs."""
    order = list(range(len(shape)))
    random.shuffle(order)
    tensor = torch.empty(shape, dtype=dtype, device="meta").permute(order)
    made = decode(tensor_spec(tensor))
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), dtype)
    assert made.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize


def test_fills() -> None:
    """Each fill gives the values it names; an unknown one, or an unknown dtype, is refused."""
    assert decode(spec(5, fill="zeros")).tolist() == [0.0] * 5
    assert decode(spec(5, fill="ones", dtype="int64")).tolist() == [1] * 5
    index = decode(spec(1000, fill="index:7", dtype="int64"))
    assert sorted(set(index.tolist())) == list(range(7))
    assert set(decode(spec(1000, fill="mask")).tolist()) == {0.0, float("-inf")}
    assert decode(spec(1000, fill="mask", dtype="bool")).dtype is torch.bool
    assert decode(spec(3_000_000)).std().item() == pytest.approx(1, abs=0.1)
    expanded = decode(spec(4, 3, stride=[0, 1]))
    assert expanded.untyped_storage().nbytes() == 12
    for bad in (spec(2, fill="pretty"), spec(2, dtype="float33"), {"dtype": "nn"}, {}):
        with pytest.raises(MeasureError):
            decode(bad)


def test_constants() -> None:
    """Devices, dtypes, memory formats, lists and scalars decode to what they name."""
    values = [{"device": "cpu"}, {"dtype": "int8"}, {"memory_format": "channels_last"}, {"layout": "strided"}, 1, None]
    expected = [torch.device("cpu"), torch.int8, torch.channels_last, torch.strided, 1, None]
    assert decode(values) == expected


BLOCKS = {"kind": "equal_blocks", "kwargs": {}, "over": None, "tokens": 20, "lengths": [8, 16]}


def test_blocks_of_rows_are_compared_with_the_whole() -> None:
    """Rows of a softmax are independent, in place too; a sum over the rows, shown as if it were one of each row, is not."""
    softmax = {**BLOCKS, "target": "aten._softmax.default", "args": [spec(1, 20, 8), 2, False], "places": [1, None, None], "made": [[0, 1]]}
    over = {**BLOCKS, "target": "aten.mul.out", "args": [spec(20, 8), spec(20, 1)], "places": [0, 0], "made": [[0, 0]], "over": [0, "out"]}
    running = {**BLOCKS, "target": "aten.cumsum.default", "args": [spec(20, 8), 0], "places": [0, None], "made": [[0, 0]]}
    asked = {"softmax": softmax, "over": over, "running": running}
    found = measure_ops([{"key": key, **request} for key, request in asked.items()], threads=1)
    assert found == {"softmax": {"equal": [True, True]}, "over": {"equal": [True, True]}, "running": {"equal": [False, False]}}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_rows_and_columns_is_compared_with_the_whole(transposed: bool) -> None:
    """Sums of a few exact products are the same however they are cut."""
    w = spec(96, 4, fill="ones") if transposed else spec(4, 96, fill="ones")
    request = {"kind": "equal_product", "x": spec(20, 4, fill="ones"), "w": w, "transposed": transposed, "lengths": [8]}
    tiles = {"tiles": [[0, 64], [64, 96]], "alone": False}, {"tiles": [[0, 32], [32, 48], [48, 96]], "alone": True}
    found = measure_ops([{"key": str(number), **request, **cut} for number, cut in enumerate(tiles)], threads=2)
    assert found == {"0": {"equal": [True]}, "1": {"equal": [True]}}
